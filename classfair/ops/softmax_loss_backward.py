"""The backward of ``softmax_loss`` as a Function, and tangents from gradients: derivatives of every order."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from classfair import backends, reference
from classfair._schema import NUM_TENSORS, Scalars, Tensors

NUM_UPSTREAM = 5  # gradients that come in; the scale of those of the statistics follows, None here
NUM_DIFFERENTIABLE = 4  # of the tensors: logits, offset, margin and pair


class SoftmaxLossBackward(torch.autograd.Function):
    """The fused backward; its own backward differentiates the reference formula, so every order is exact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return backends.namespace(inputs[-1]).softmax_loss_bwd(*inputs[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        first = NUM_UPSTREAM + 1
        ctx.num_inputs, last = len(inputs), first + NUM_TENSORS
        saved = (*inputs[:NUM_UPSTREAM], *inputs[first:last])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.scalars, ctx.wants = Scalars._make(inputs[last + 3 : -4]), inputs[-4:-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        wanted = [g is not None and w for g, w in zip(grads, (True, *ctx.wants), strict=True)]
        result: list[Any] = [None] * ctx.num_inputs
        if any(wanted):
            formula, present, values = _formula(ctx, wanted)
            pulled = torch.func.vjp(formula, *values)[1](tuple(g for g, w in zip(grads, wanted, strict=True) if w))
            for i, value in zip(present, pulled, strict=True):
                result[i if i < NUM_UPSTREAM else i + 1] = value
        return tuple(result)


class SoftmaxLossBackwardForwardMode(SoftmaxLossBackward):
    """With forward mode, which Dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        wanted = [True, *ctx.wants]
        formula, present, values = _formula(ctx, wanted)
        given = [tangents[i if i < NUM_UPSTREAM else i + 1] for i in present]
        pushed = iter(push_forward(formula, values, given))
        # A None would do here, but not under vmap.
        unwanted = [values[0].new_zeros(shape) for shape in ((), (0,), (0,), (0, 0))]
        return tuple(next(pushed) if want else empty for want, empty in zip(wanted, unwanted, strict=True))


def _formula(ctx: Any, wanted: list[bool]) -> tuple[Callable[..., tuple[Any, ...]], list[int], list[Tensor]]:
    """The wanted gradients as a function of what is differentiable and there; its places and values."""
    tensors = ctx.saved_tensors
    present = [i for i, t in enumerate(tensors[: NUM_UPSTREAM + NUM_DIFFERENTIABLE]) if t is not None]

    def formula(*values: Tensor) -> tuple[Any, ...]:
        full = list(tensors)
        for i, value in zip(present, values, strict=True):
            full[i] = value
        upstream, t = tuple(full[:NUM_UPSTREAM]), Tensors._make(full[NUM_UPSTREAM:])
        result = reference.softmax_loss_backward(upstream, t, ctx.scalars, ctx.wants)
        return tuple(r for r, w in zip(result, wanted, strict=True) if w)

    return formula, present, [tensors[i] for i in present]


def push_forward(formula: Callable[..., tuple[Any, ...]], values: Sequence[Any], tangents: Sequence[Any]) -> tuple:
    """Tangents of a formula's outputs; None among the values and tangents is what is not there.

    The gradient is linear in what comes in from above, and the transpose of that map is this one. Forward mode itself
    does not nest in the forward mode that asks.
    """
    there = [v for v in values if v is not None]
    given = [torch.zeros_like(v) if g is None else g for v, g in zip(values, tangents, strict=True) if v is not None]

    def of_present(*own: Tensor) -> tuple[Any, ...]:
        rest = iter(own)
        return formula(*(None if v is None else next(rest) for v in values))

    outputs, pull, *_ = torch.func.vjp(of_present, *there)
    transposed = torch.func.vjp(lambda *upstream: pull(upstream), *map(torch.zeros_like, outputs))[1]
    return transposed(tuple(given))
