"""A reduced ``softmax_loss`` and a group penalty of its statistics, in one operator and one autograd node.

For eager mode on the CPU, where each small operator around the kernels and each further autograd node costs as much as
the loss of a small batch. Elsewhere the same is put together from ``softmax_loss``, ``dependence`` and ``iou_penalty``.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from classfair import backends, reference
from classfair.ops import _library
from classfair.ops._autograd import transformed
from classfair.ops.softmax_loss import (
    NUM_SAVED,
    NUM_TENSORS,
    SCALARS,
    STATS_DIFFERENTIABLE,
    TENSORS,
    SoftmaxLoss,
    SoftmaxLossFunction,
    contiguous,
    count_table,
    softmax_loss,
)


class Term(NamedTuple):
    """``weight`` times a penalty of the statistics, added to the loss: :func:`classfair.ops.iou_penalty` (unpaired,
    with ``skip``) or :func:`classfair.ops.dependence` of ``mass``, or with ``cell`` of ``joint``."""

    kind: str  # of KINDS
    weight: float = 1.0
    weighted: bool = False
    cell: Tensor | None = None  # (M,) int64
    num_cells: Tensor | None = None  # () int64

    def of(self, counts: Tensor, mass: Tensor, hit: Tensor, joint: Tensor) -> Tensor:
        """By its formula."""
        count = count_table(counts, mass.shape, 0)
        if self.kind == "iou":
            return self.weight * reference.iou_penalty(mass, hit, count, False, True)
        rows = mass if self.cell is None else joint
        information = self.kind == "mi"
        return self.weight * reference.dependence(rows, count, self.cell, self.num_cells, information, self.weighted)


_CELL = NUM_TENSORS - 1  # the last of the tensors
#: As csrc/cpu/reduced_loss.cpp numbers them.
KINDS = ("none", "l2", "mi", "iou")
NO_TERM = Term("none")


def _eager_only(*_: Any) -> Any:
    raise NotImplementedError("classfair: reduced_loss is for eager mode")


_library.define(
    f"reduced_loss_fwd({TENSORS}, {SCALARS}, bool mean, int term, float term_weight, bool weighted, Tensor? term_cell,"
    " Tensor? term_num_cells) -> (Tensor loss, Tensor lse, Tensor lse_raw, Tensor prediction, Tensor mass, Tensor hit,"
    " Tensor joint, Tensor counts, Tensor total_weight, Tensor grad_rows, Tensor grad_hit)",
    _eager_only,
)
_library.define(
    f"reduced_loss_bwd(Tensor upstream, {TENSORS}, Tensor lse, Tensor lse_raw, Tensor total_weight, Tensor? grad_mass,"
    f" Tensor? grad_hit, Tensor? grad_joint, {SCALARS}, bool mean, float? term_weight, bool want_offset,"
    " bool want_margin, bool want_pair)"
    " -> (Tensor grad_logits, Tensor grad_offset, Tensor grad_margin, Tensor grad_pair)",
    _eager_only,
)


class ReducedLossFunction(Function):
    """Outputs: the loss and, where they are differentiable, mass, hit and, with cells, joint. What has no gradient goes
    to ``rest``, because autograd takes 2 to 4 microseconds for each output."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *own, reduction, term, rest = inputs
        loss, lse, *statistics, total_weight, grad_rows, grad_hit = backends.namespace("native").reduced_loss_fwd(
            *own, reduction == "mean", KINDS.index(term.kind), *term[1:]
        )
        lse_raw, _, mass, hit, joint, _ = statistics
        rest += [lse, total_weight, *statistics]
        gradients: tuple = (None, None, None)
        if term.kind != "none":
            of_mass, of_joint = (grad_rows, None) if term.cell is None else (None, grad_rows)
            gradients = (of_mass, grad_hit if term.kind == "iou" else None, of_joint)
        ctx.save_for_backward(*own[:NUM_TENSORS], lse, lse_raw if own[-1] else lse, total_weight, *gradients)
        ctx.scalars, ctx.reduction, ctx.backend, ctx.term = own[NUM_TENSORS:], reduction, "native", term
        ctx.set_materialize_grads(False)
        if own[-1] != STATS_DIFFERENTIABLE:
            return loss
        return (loss, mass, hit) if own[_CELL] is None else (loss, mass, hit, joint)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple:
        tensors = ctx.saved_tensors
        saved, gradients = tensors[:NUM_SAVED], tensors[NUM_SAVED:]
        statistics = (*others, None, None, None)[:3]
        if torch.is_grad_enabled() or upstream is None:
            if upstream is not None and ctx.term.kind != "none":
                statistics = tuple(map(_sum, statistics, ReducedLossFunction._differentiable(ctx, saved, upstream)))
            grads = (upstream, None, None, None, None, *statistics)
            return *SoftmaxLossFunction.pull_back(ctx, saved, grads), None
        weight = ctx.term.weight  # times upstream, what the statistics' gradients are multiplied with
        if any(g is not None for g in statistics):
            own = (g if g is None else g * (upstream * weight) for g in gradients)
            statistics = tuple(map(_sum, map(contiguous, statistics), own))
            weight = None
        else:
            statistics = gradients
        wants = ctx.needs_input_grad[1:4]
        result = backends.namespace("native").reduced_loss_bwd(
            upstream, *saved, *statistics, *ctx.scalars, ctx.reduction == "mean", weight, *wants
        )
        return *SoftmaxLossFunction.gradients(ctx, result), None

    @staticmethod
    def _differentiable(ctx: Any, saved: tuple, upstream: Tensor) -> tuple[Tensor, ...]:
        """What the term sends into mass, hit and joint."""
        *statistics, counts = SoftmaxLossFunction.apply(*saved[:NUM_TENSORS], *ctx.scalars, "none", "native")[5:]
        return torch.func.vjp(partial(ctx.term.of, counts), *statistics)[1](upstream)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def serves(logits: Tensor, reduction: str, backend: str) -> bool:
    """Whether the operator can compute this loss."""
    return backend == "native" and reduction != "none" and logits.device.type == "cpu" and not transformed()


def reduced_loss(term: Term = NO_TERM, **arguments: Any) -> SoftmaxLoss:
    """:func:`classfair.ops.softmax_loss` where it :func:`serves`, plus a term, which needs ``stats=2``.

    Gradients: as of :func:`classfair.ops.softmax_loss` except from ``lse``, every order. Determinism: bitwise, any
    number of threads.
    """
    return softmax_loss(**arguments, apply=partial(_apply, term))


def _apply(term: Term, *inputs: Any) -> tuple[Tensor, ...]:
    rest: list[Tensor] = []
    *own, stats, reduction, _ = inputs
    output = ReducedLossFunction.apply(*own, stats, reduction, term, rest)
    lse, total_weight, *statistics = rest
    if stats != STATS_DIFFERENTIABLE:
        return output, lse, total_weight, *statistics[: len(statistics) if stats else 0]
    loss, *statistics[2 : len(output) + 1] = output
    return loss, lse, total_weight, *statistics
