"""Who computes a step: torch eager, torch.compile and every back-end of classfair, on the same inputs.

The torch formulations are the ones a careful user would write: ``F.cross_entropy`` does the loss, the pair rows are
gathered by ``F.embedding`` (the fastest gather with a gradient on the CPU), statistics cost one softmax in float32
and one reduction each. They compute no more than the objective needs: the integer counts, which come with every
BatchStats, are left out where nobody asked for monitoring. Probabilities of mixed labels are made before the clock
starts, because loaders make them, in other processes.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import classfair
from classfair import backends

from .workloads import OBJECTIVES, Case, Inputs, Objective, make_inputs

#: Plain eager F.cross_entropy, in every comparison; all ratios are to it.
YARDSTICK = "F.cross_entropy"

#: A loss, and the statistics that somebody wants to read.
LossAndStats = tuple[Tensor, tuple[Tensor, ...]]

#: Largest relative error (Euclidean norm) of a quantity of a step. A float32 log_softmax over 21841 classes loses two
#: digits. Eager bfloat16 stores log-probabilities of about -10 in three digits, so that a probability is off by
#: several per cent of itself.
TOLERANCE = {"float32": 5e-5, "bfloat16": 4e-2}


class Step(NamedTuple):
    """What a step produces."""

    loss: Tensor
    stats: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


class Provider(NamedTuple):
    """One way to compute an objective."""

    name: str
    objective: Objective
    loss: Callable[[Inputs], LossAndStats]

    def step(self, inputs: Inputs) -> Step:
        """Forward and backward."""
        loss, stats = self.loss(inputs)
        return Step(loss, stats, torch.autograd.grad(loss, inputs.leaves(self.objective)))


def formula(
    objective: Objective,
    logits: Tensor,  # (N, C)
    target: Tensor,  # (N,)
    offset: Tensor,  # (C,)
    rows: Tensor,  # (M, C)
    slot: Tensor,  # (N,)
    mass_weight: Tensor,  # (C,)
    hit_weight: Tensor,  # (C,)
    probabilities: Tensor,  # (N, C)
) -> LossAndStats:
    """The objective in plain torch. Takes tensors, because torch.compile pays at every call to look into a tuple."""
    perturbed = logits
    if objective.offset:
        perturbed = perturbed + offset
    if objective.pair:
        perturbed = perturbed + F.embedding(slot, rows)
    labels = probabilities if objective.mixed else target
    loss = F.cross_entropy(perturbed, labels, label_smoothing=objective.label_smoothing)
    if objective.stats == "none":
        return loss, ()
    if objective.stats == "values":
        with torch.no_grad():
            return loss, (*_mass_and_hit(logits, target), *_counts(logits, target))
    mass, hit = _mass_and_hit(logits, target)
    return loss + mass @ mass_weight + hit @ hit_weight, ()


def torch_loss(run: Callable[..., LossAndStats], inputs: Inputs) -> LossAndStats:
    """The formula of an objective, eager or compiled, on the inputs."""
    i = inputs
    return run(i.logits, i.target, i.offset, i.pair.rows, i.pair.slot, i.mass_weight, i.hit_weight, i.probabilities)


def _mass_and_hit(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    p = logits.softmax(1, dtype=accumulate)
    true = p.gather(1, target.unsqueeze(1)).squeeze(1)
    return p.sum(0), p.new_zeros(p.shape[1]).index_add(0, target, true)


def _counts(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    prediction = logits.argmax(1)
    zeros = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    one = torch.ones_like(target)
    count, predicted = zeros.index_add(0, target, one), zeros.index_add(0, prediction, one)
    correct = zeros.index_add(0, target, (prediction == target).to(torch.int64))
    return count, predicted, correct


def classfair_loss(objective: Objective, backend: str, inputs: Inputs) -> LossAndStats:
    """The objective by one back-end, through the public functions."""
    keywords = {
        "offset": inputs.offset if objective.offset else None,
        "pair": inputs.pair if objective.pair else None,
        "label_smoothing": objective.label_smoothing,
        "backend": backend,
    }
    target = inputs.target
    if objective.mixed:
        target = classfair.MixedTarget(inputs.target, inputs.target_b, inputs.lam)
    if objective.stats == "none":
        return classfair.cross_entropy(inputs.logits, target, **keywords), ()
    differentiable = objective.stats == "differentiable"
    loss, stats = classfair.cross_entropy_with_stats(inputs.logits, target, differentiable=differentiable, **keywords)
    if differentiable:
        loss = loss + stats.mass[0] @ inputs.mass_weight + stats.hit[0] @ inputs.hit_weight
        return loss, ()
    return loss, (stats.mass[0], stats.hit[0], stats.count[0], stats.predicted[0], stats.correct[0])


def autocast_loss(inputs: Inputs) -> LossAndStats:
    """What mixed-precision training runs on a GPU: bfloat16 logits, cast to float32 by autocast."""
    with torch.autocast(inputs.logits.device.type, torch.bfloat16):
        return F.cross_entropy(inputs.logits, inputs.target), ()


def kernels(device: str) -> tuple[str, ...]:
    """Back-ends of their own code, without the oracle."""
    return tuple(b for b in backends.usable("softmax_loss", torch.device(device)) if b != "reference")


def names(case: Case, device: str) -> tuple[str, ...]:
    """All providers of a case."""
    plain = case.objective == "plain"
    eager = () if plain else ("torch eager",)
    autocast = ("autocast",) if plain and device == "cuda" and case.dtype == "bfloat16" else ()
    return (YARDSTICK, *autocast, *eager, "torch.compile", *kernels(device), "reference")


def make(name: str, case: Case) -> Provider:
    """A provider by name; compilation happens in its first step."""
    objective = OBJECTIVES[case.objective]
    if name == YARDSTICK:
        return _eager(name, OBJECTIVES["plain"])
    if name == "torch eager":
        return _eager(name, objective)
    if name == "torch.compile":
        torch.compiler.reset()  # many shapes of one function: each case starts afresh, none hits the recompile limit
        compiled = torch.compile(partial(formula, objective), fullgraph=True, dynamic=False)
        return Provider(name, objective, partial(torch_loss, compiled))
    if name == "autocast":
        return Provider(name, objective, autocast_loss)
    return Provider(name, objective, partial(classfair_loss, objective, name))


def _eager(name: str, objective: Objective) -> Provider:
    return Provider(name, objective, partial(torch_loss, partial(formula, objective)))


@lru_cache(maxsize=2)  # the yardstick's and the case's own: one for all providers of a case
def _truth(objective: Objective, case: Case, device: str) -> Step:
    return _eager("float64", objective).step(make_inputs(case, device).exact(objective))


def verify(provider: Provider, case: Case, inputs: Inputs) -> None:
    """The gate before timing: a step against float64; AssertionError for a wrong provider."""
    truth = _truth(provider.objective, case, inputs.logits.device.type)
    labels = inputs.labels(provider.objective)
    got = _quantities(provider.step(inputs), labels)
    for name, value in _quantities(truth, labels).items():
        error = ((got[name].double() - value).norm() / value.norm()).item()
        if not error <= TOLERANCE[case.dtype]:  # NaN is wrong too
            raise AssertionError(f"{case.key}: {provider.name} is wrong, relative error {error:.2g} of the {name}")


def _quantities(step: Step, labels: Tensor) -> dict[str, Tensor]:
    """What the gate compares: two parts of the logit gradient, of which the larger would hide the other."""
    logits, *terms = step.gradients
    return {
        "loss": step.loss,
        "gradient at the true class": logits.gather(1, labels),
        "gradient elsewhere": logits.scatter(1, labels, 0.0),
        **dict(zip(("gradient of the offset", "gradient of the pair rows"), terms, strict=False)),
        **dict(zip(("mass", "hit", "count"), (s.double() for s in step.stats), strict=False)),
    }
