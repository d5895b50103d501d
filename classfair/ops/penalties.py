"""``dependence`` and ``iou_penalty``: value and gradient of a group penalty in one pass over batch statistics.

They are small, but a dozen small torch operators forward and as many backward would cost as much as the loss itself.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from classfair import backends, reference
from classfair.ops import _library
from classfair.ops._autograd import quick_apply, scaled, transformed


def _dependence_fake(rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0]), torch.empty_like(rows)


def _iou_fake(mass: Tensor, hit: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return mass.new_empty(()), torch.empty_like(mass), torch.empty_like(hit)


# Parts of the value are to be summed: of one segment each, or of one row, as the back-end likes.
_library.define(
    "dependence(Tensor rows, Tensor count, Tensor? cell, Tensor? num_cells, bool mutual_information, bool weighted)"
    " -> (Tensor parts, Tensor grad_rows)",
    _dependence_fake,
)
_library.define(
    "iou_penalty(Tensor mass, Tensor hit, Tensor count, bool paired, bool skip)"
    " -> (Tensor value, Tensor grad_mass, Tensor grad_hit)",
    _iou_fake,
)


class DependenceFunction(torch.autograd.Function):
    """Keeps the gradient that came with the value; it may be as large as the logits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        count: Tensor,
        cell: Tensor | None,
        num_cells: Tensor | None,
        mutual_information: bool,
        weighted: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        kernels = backends.namespace(backend)
        parts, gradient = kernels.dependence(rows, count, cell, num_cells, mutual_information, weighted)
        return parts.sum(), gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.options, ctx.backend = inputs[4:6], inputs[6]
        ctx.mark_non_differentiable(output[1])
        ctx.gradient = None if transformed() else output[1]  # to be scaled in place, which what is saved may not be
        ctx.save_for_backward(*inputs[:4], output[1] if transformed() else None)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        rows, *constant, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = partial(_dependence_of, constant, ctx.options)
            (gradient,) = torch.func.vjp(formula, rows)[1](upstream)
        elif gradient is not None:
            gradient = gradient * upstream
        else:
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:  # an earlier backward of the same graph used it up
                gradient = backends.namespace(ctx.backend).dependence(rows, *constant, *ctx.options)[1]
            gradient = scaled(gradient, upstream)
        return gradient, None, None, None, None, None, None


class IoUPenaltyFunction(torch.autograd.Function):
    """Saves the gradients that came with the value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mass: Tensor, hit: Tensor, count: Tensor, paired: bool, skip: bool, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backends.namespace(backend).iou_penalty(mass, hit, count, paired, skip)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.options = inputs[3:5]
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        mass, hit, count, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = partial(_iou_of, count, ctx.options)
            gradients = torch.func.vjp(formula, mass, hit)[1](upstream)
        else:
            gradients = [g * upstream for g in gradients]
        return *gradients, None, None, None, None


_apply_dependence = quick_apply(DependenceFunction, first_only=True)
_apply_iou_penalty = quick_apply(IoUPenaltyFunction, first_only=True)


def _dependence_of(constant: Any, options: Any, rows: Tensor) -> Tensor:
    return reference.dependence(rows, *constant, *options)


def _iou_of(count: Tensor, options: Any, mass: Tensor, hit: Tensor) -> Tensor:
    return reference.iou_penalty(mass, hit, count, *options)


def dependence(
    rows: Tensor,  # (M, C)
    count: Tensor,  # (G, C) int64
    cell: Tensor | None = None,  # (M,) int64
    num_cells: Tensor | None = None,  # () int64
    *,
    mutual_information: bool = False,
    weighted: bool = False,
    backend: str = "reference",
) -> Tensor:
    """How far the mean prediction depends on the group; :mod:`classfair.fairness` is the safe way in.

    ``rows[m]`` is the sum of p(c|x) over n_m samples. Without ``cell`` row g is group g, and its n_g are the row sums
    of ``count``: one segment. With ``cell`` row m < ``num_cells`` is the cell label * G + group, ascending, and n_m
    its number in ``count[group, label]``; the rows of one label are a segment; further rows count for nothing.
    In a segment of N samples, with q(c) = sum_m rows[m, c] / N and over rows with n_m > 0:

        sum_mc (rows[m, c] / n_m - q(c))^2,  or with ``mutual_information``
        sum_mc rows[m, c] / N log(rows[m, c] N / (n_m sum_m rows[m, c])),  0 log 0 = 0,

    summed over segments, if ``weighted`` with the segment's share of all samples in ``count``.

    ``rows`` is float32 or float64; ``cell`` is contiguous. A row that is 0 has gradient 0 from its logarithm.
    Returns: () in the dtype of ``rows``. Gradients: ``rows``, every order. Determinism: bitwise, any number of threads.
    """
    if backend == "reference":
        return reference.dependence(rows, count, cell, num_cells, mutual_information, weighted)
    arguments = (rows.contiguous(), count.contiguous(), cell, num_cells)
    return _apply_dependence(*arguments, mutual_information, weighted, backend)


def iou_penalty(
    mass: Tensor,  # (G, C)
    hit: Tensor,  # (G, C)
    count: Tensor,  # (G, C) int64
    *,
    paired: bool = False,
    skip: bool = True,
    backend: str = "reference",
) -> Tensor:
    """How far the groups' intersections over union differ; :mod:`classfair.fairness` is the safe way in.

    IoU of class c in a group: hit / (mass + count - hit), 0 / 0 = 0. A group's IoU is its mean over classes, that of
    all the same from the sums over groups; with ``skip`` over classes with count > 0 only. The penalty is the sum over
    groups with a sample of (IoU of group - IoU of all)^2, or if ``paired`` the sum over pairs of such groups of the
    squared difference.

    ``mass`` and ``hit`` are float32 or float64 and alike.
    Returns: () in the dtype of ``mass``. Gradients: ``mass``, ``hit``, every order. Determinism: bitwise, any number of
    threads.
    """
    if backend == "reference":
        return reference.iou_penalty(mass, hit, count, paired, skip)
    return _apply_iou_penalty(mass.contiguous(), hit.contiguous(), count.contiguous(), paired, skip, backend)
