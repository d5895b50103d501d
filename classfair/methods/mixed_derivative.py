"""The second derivative that a virtual step needs: of the training loss, along a direction and in omega."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from classfair import _validate as check
from classfair.nn import WithFeatures


class Outputs(NamedTuple):
    """What a loss needs of one forward pass."""

    features: Tensor  # (N, D)
    logits: Tensor  # (N, C)
    weight: Tensor  # (C, D), of the head


class Network(nn.Module):
    """The whole model."""

    def __init__(self, model: WithFeatures) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Outputs:
        features, logits = self.model(images)
        return Outputs(features, logits, cast(Tensor, self.model.head.weight))


class Head(nn.Module):
    """The classifier alone, on features."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Outputs:
        return Outputs(features, self.head(features), cast(Tensor, self.head.weight))


class Problem(NamedTuple):
    """The training loss as a function of parameters and weights of terms."""

    run: Callable[[dict[str, Tensor]], AbstractContextManager[Outputs]]  # :func:`lent`: the same dropout in every call
    loss: Callable[[Outputs], Tensor]  # depends on omega
    theta: dict[str, Tensor]
    omega: Tensor


def gradients(value: Any, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Of a tensor, or of several with ``grad_outputs``; zeros for what it does not depend on."""
    # Autocast is for forward passes.
    with torch.autocast(inputs[0].device.type, enabled=False):
        found = torch.autograd.grad(value, inputs, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def along(problem: Problem, direction: list[Tensor]) -> Tensor:
    """The derivative of the loss along a direction of the parameters, differentiable in omega.

    Forward mode carries the direction through the network; the second derivative is that of the loss alone.
    """
    with torch.no_grad(), forward_ad.dual_level():
        pairs = zip(problem.theta.items(), direction, strict=True)
        duals = {name: forward_ad.make_dual(p.detach(), d) for (name, p), d in pairs}
        with problem.run(duals) as out:
            features, logits, weight = map(forward_ad.unpack_dual, out)
    seeds = [t.primal.detach().requires_grad_() for t in (logits, weight)]
    loss = problem.loss(Outputs(features.primal.detach(), *seeds))
    both = zip(gradients(loss, seeds, create_graph=True), (logits.tangent, weight.tangent), strict=True)
    return sum(((g * t.detach()).sum() for g, t in both if t is not None), loss.new_zeros(()))


def by_jvp(problem: Problem, direction: list[Tensor]) -> Tensor:
    return gradients(along(problem, direction), [problem.omega])[0]


def by_double_backward(problem: Problem, direction: list[Tensor]) -> Tensor:
    with problem.run(problem.theta) as out:
        first = gradients(problem.loss(out), list(problem.theta.values()), create_graph=True)
        connected = [(g, d) for g, d in zip(first, direction, strict=True) if g.requires_grad]
        return gradients([g for g, _ in connected], [problem.omega], grad_outputs=[d for _, d in connected])[0]


def by_finite_difference(problem: Problem, direction: list[Tensor]) -> Tensor:
    """Central, of forward passes in full precision; the direction has norm 1."""
    theta, acc = problem.theta, check.acc_dtype(direction[0])
    step = torch.finfo(acc).eps ** (1 / 3)

    def gradient(sign: int) -> Tensor:
        with torch.no_grad(), torch.autocast(direction[0].device.type, enabled=False):
            pairs = zip(theta.items(), direction, strict=True)
            with problem.run({name: p + sign * step * d for (name, p), d in pairs}) as out:
                pass
        return gradients(problem.loss(out), [problem.omega])[0]

    return (gradient(1) - gradient(-1)) / (2 * step)


#: The derivative in omega of that along a direction of the parameters, by method.
MIXED = {
    "jvp": by_jvp,
    "double_backward": by_double_backward,
    "finite_difference": by_finite_difference,
    "last_layer": by_jvp,  # of a network that is the head
}


def norm(values: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(v, dtype=check.acc_dtype(v)) for v in values]).norm()


@contextlib.contextmanager
def lent(module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor) -> Iterator[Outputs]:
    """A forward pass with other parameters, which the module has until the end of the context.

    Activation checkpoints run parts of the module again in the backward pass, which so belongs into the context.
    Buffers and random numbers are as before afterwards.
    """
    instead = {id(p): parameters[name] for name, p in module.named_parameters() if name in parameters}
    instead |= {id(buffer): buffer.clone() for buffer in module.buffers()}
    tables: list[Any] = [table for m in module.modules() for table in (m._parameters, m._buffers)]
    kept = [(table, dict(table)) for table in tables]
    try:
        for table in tables:  # a tensor may be in several
            table.update({name: instead[id(t)] for name, t in table.items() if id(t) in instead})
        with torch.random.fork_rng([inputs.device] if inputs.device.type == "cuda" else []):
            yield module(inputs)
    finally:
        for table, content in kept:
            table.update(content)


def works(method: str, problem: Problem, direction: list[Tensor]) -> bool:
    try:
        MIXED[method](problem, direction)
    except RuntimeError:
        return method == "last_layer"  # whose network is another one
    return True
