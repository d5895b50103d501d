"""Gradients of weights and diagonals: those that classes receive as others, then those of the slots' own rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import CLASSES, FEATURES, INTEGERS, SLOTS, class_rows, launch, row_launch, slot_rows, threshold


@triton.jit(do_not_specialize=INTEGERS[:1])
def _coefficients_kernel(
    grad_variance,
    grad_square,
    ratio,
    square,
    label,
    num_slots,
    form,
    distance,
    num_classes,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns a slot: writes the doubled gradients (M, C) of the form and of the squared distance."""
    row = tl.program_id(0).to(tl.int64)
    live = tl.where(row < tl.load(num_slots), num_classes, 0)
    own = tl.load(label + row)
    zero = tl.zeros((), ACC)
    if ratio is not None:
        zero = threshold(square, row, num_classes, BLOCK, ACC)
    for first in range(0, num_classes, BLOCK):
        classes = first + tl.arange(0, BLOCK)
        present = classes < num_classes
        inside = (classes < live) & (classes != own)  # exactly no gradient at the own class
        at = row * num_classes + classes
        of_form, of_square = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        if grad_variance is not None:
            of_form = tl.load(grad_variance + at, mask=inside, other=0.0)
        if grad_square is not None:
            of_square = tl.load(grad_square + at, mask=inside, other=0.0)
        if ratio is not None:
            apart = tl.load(square + at, mask=inside, other=0.0)
            near = apart <= zero
            of_form = tl.where(near, 0.0, of_form / tl.where(near, 1.0, apart))
            of_square -= of_form * tl.load(ratio + at, mask=inside, other=0.0)
        tl.store(form + at, 2.0 * of_form, mask=present)
        tl.store(distance + at, 2.0 * of_square, mask=present)


@triton.jit
def _slopes(form, distance, rows, used, classes, num_classes, diagonal):
    """Factor (M', C', D') of the differences in the gradient, and the form's share of it (M', C')."""
    inside = (rows < used)[:, None] & (classes < num_classes)[None, :]
    at = rows[:, None] * num_classes + classes[None, :]
    of_form = tl.load(form + at, mask=inside, other=0.0)
    of_square = tl.load(distance + at, mask=inside, other=0.0)
    return of_form[:, :, None] * diagonal[:, None, :] + of_square[:, :, None], of_form


@triton.jit(do_not_specialize=INTEGERS[:2])
def _class_gradient_kernel(
    weight,
    cov,
    label,
    num_slots,
    form,
    distance,
    grad_weight,
    num_classes,
    num_features,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns BLOCK_C classes x BLOCK_D features: runs through the slots, writes what they give as others."""
    used = tl.load(num_slots)
    classes = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    other = class_rows(weight, classes, num_classes, columns, num_features, ACC)
    total = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    for first in range(0, used, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        own = slot_rows(weight, label, rows, used, columns, num_features, ACC)
        diagonal = own
        if cov is not None:
            diagonal = slot_rows(cov, label, rows, used, columns, num_features, ACC)
        slope, _ = _slopes(form, distance, rows, used, classes, num_classes, diagonal)
        total += tl.sum(slope * (other[None, :, :] - own[:, None, :]), 0)
    at = grad_weight + classes.to(tl.int64)[:, None] * num_features + columns[None, :]
    tl.store(at, total, mask=(classes < num_classes)[:, None] & (columns < num_features)[None, :])


@triton.jit(do_not_specialize=INTEGERS[:2])
def _slot_gradient_kernel(
    weight,
    cov,
    label,
    num_slots,
    form,
    distance,
    grad_weight,
    grad_cov,
    num_classes,
    num_features,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns BLOCK_M slots x BLOCK_D features: runs through the classes, adds what they give as own rows to
    their labels' rows of grad_weight, and writes those of grad_cov. Labels are distinct, and the classes' part is
    already there."""
    used = tl.load(num_slots)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    own = slot_rows(weight, label, rows, used, columns, num_features, ACC)
    diagonal = own
    if cov is not None:
        diagonal = slot_rows(cov, label, rows, used, columns, num_features, ACC)
    total = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    total_cov = total
    for first in range(0, tl.where(tl.program_id(0).to(tl.int64) * BLOCK_M < used, num_classes, 0), BLOCK_C):
        classes = first + tl.arange(0, BLOCK_C)
        other = class_rows(weight, classes, num_classes, columns, num_features, ACC)
        slope, of_form = _slopes(form, distance, rows, used, classes, num_classes, diagonal)
        difference = other[None, :, :] - own[:, None, :]
        total += tl.sum(slope * difference, 1)
        if grad_cov is not None:
            total_cov += tl.sum(of_form[:, :, None] * difference * difference, 1)
    present = rows < used
    at = tl.load(label + rows, mask=present, other=0)[:, None] * num_features + columns[None, :]
    inside = present[:, None] & (columns < num_features)[None, :]
    tl.store(grad_weight + at, tl.load(grad_weight + at, mask=inside, other=0.0) - total, mask=inside)
    if grad_cov is not None:
        tl.store(grad_cov + at, 0.5 * total_cov, mask=inside)


def pair_terms_bwd(
    grad_variance: Tensor | None,
    grad_square: Tensor | None,
    weight: Tensor,
    cov: Tensor | None,
    label: Tensor,
    num_slots: Tensor,
    variance: Tensor,
    square: Tensor,
    normalize: bool,
    want_cov: bool,
) -> tuple[Tensor, Tensor]:
    """See ``classfair.ops.pair_terms``."""
    (classes, features), rows = weight.shape, label.shape[0]
    grad_weight = torch.empty_like(weight)
    grad_cov = torch.zeros_like(weight) if want_cov else weight.new_empty(0)
    if rows == 0 or (grad_variance is None and grad_square is None):
        return grad_weight.zero_(), grad_cov
    form, distance = weight.new_empty(rows, classes), weight.new_empty(rows, classes)
    normalized = normalize and grad_variance is not None
    columns = triton.cdiv(features, FEATURES)
    with torch.cuda.device_of(weight):
        _coefficients_kernel[(rows,)](
            grad_variance,
            grad_square,
            variance if normalized else None,
            square if normalized else None,
            label,
            num_slots,
            form,
            distance,
            classes,
            **row_launch(weight),
        )
        inputs = (weight, cov, label, num_slots, form, distance)
        _class_gradient_kernel[(triton.cdiv(classes, CLASSES), columns)](
            *inputs, grad_weight, classes, features, **launch(weight)
        )
        _slot_gradient_kernel[(triton.cdiv(rows, SLOTS), columns)](
            *inputs, grad_weight, grad_cov if want_cov else None, classes, features, **launch(weight)
        )
    return grad_weight, grad_cov
