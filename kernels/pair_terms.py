"""``pair_terms`` by direct differences, which do not cancel where rows are close.

A program owns a tile of outputs and runs through all of what it sums in blocks of (slot, class, feature), so that
nothing is added by two programs. float32 on the ordinary cores: matrix products of rounded factors would cancel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import acc_type

_THRESHOLD = tl.constexpr(1e-12)  # as in classfair.reference.pair_terms
_SLOTS, _CLASSES, _FEATURES = 8, 32, 16  # 4096 differences at a time
_COLUMNS = 1024
_INTEGERS = ["num_classes", "num_features", "num_rows"]


@triton.jit
def _slot_rows(tensor, label, rows, used, columns, num_features, ACC: tl.constexpr):
    """(K, D') numbers of the rows of `tensor` that belong to slots `rows`, 0 outside."""
    present = rows < used
    own = tl.load(label + rows, mask=present, other=0)
    inside = present[:, None] & (columns < num_features)[None, :]
    return tl.load(tensor + own[:, None] * num_features + columns[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _class_rows(tensor, classes, num_classes, columns, num_features, ACC: tl.constexpr):
    """(C', D') numbers of rows of `tensor`, 0 outside."""
    inside = (classes < num_classes)[:, None] & (columns < num_features)[None, :]
    at = tensor + classes.to(tl.int64)[:, None] * num_features + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(ACC)


@triton.jit(do_not_specialize=_INTEGERS)
def _pair_terms_fwd_kernel(
    weight,
    cov,
    label,
    num_slots,
    variance,
    square,
    num_classes,
    num_features,
    num_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns BLOCK_M slots x BLOCK_C classes: reads their rows, writes variance and square, those that are
    there; zeros in unused slots."""
    used = tl.load(num_slots)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    classes = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    form = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    distance = form
    # Tiles of unused slots run no iteration.
    for first in range(0, tl.where(tl.program_id(0).to(tl.int64) * BLOCK_M < used, num_features, 0), BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        own = _slot_rows(weight, label, rows, used, columns, num_features, ACC)
        other = _class_rows(weight, classes, num_classes, columns, num_features, ACC)
        difference = other[None, :, :] - own[:, None, :]
        product = difference * difference
        if square is not None:
            distance += tl.sum(product, 2)
        if cov is not None:
            diagonal = _slot_rows(cov, label, rows, used, columns, num_features, ACC)
            form += tl.sum(product * diagonal[:, None, :], 2)
    inside = (rows < num_rows)[:, None] & (classes < num_classes)[None, :]
    at = rows[:, None] * num_classes + classes[None, :]
    live = (rows < used)[:, None]
    if cov is not None:
        tl.store(variance + at, tl.where(live, form, 0.0), mask=inside)
    if square is not None:
        tl.store(square + at, tl.where(live, distance, 0.0), mask=inside)


@triton.jit
def _threshold(square, row, num_classes, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Below or at which the squares of one row count as 0."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, num_classes, BLOCK):
        classes = first + tl.arange(0, BLOCK)
        total += tl.load(square + row * num_classes + classes, mask=classes < num_classes, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0) / num_classes
    return (tl.where(mean > 1.0, mean, 1.0) * _THRESHOLD).to(ACC)


@triton.jit(do_not_specialize=_INTEGERS[:2])
def _normalize_kernel(
    variance,
    square,
    cov,
    label,
    num_slots,
    num_classes,
    num_features,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns a slot: variance becomes its ratio to square, between the extremes of the diagonal."""
    row = tl.program_id(0).to(tl.int64)
    live = tl.where(row < tl.load(num_slots), num_classes, 0)
    own = tl.load(label + row)
    low, high = tl.full((BLOCK,), float("inf"), ACC), tl.full((BLOCK,), float("-inf"), ACC)
    for first in range(0, num_features, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < num_features
        diagonal = tl.load(cov + own * num_features + columns, mask=inside, other=0.0)
        low = tl.where(inside & (diagonal < low), diagonal, low)
        high = tl.where(inside & (diagonal > high), diagonal, high)
    least, largest = tl.min(low, 0), tl.max(high, 0)
    zero = _threshold(square, row, num_classes, BLOCK, ACC)
    for first in range(0, num_classes, BLOCK):
        classes = first + tl.arange(0, BLOCK)
        inside = classes < live
        at = row * num_classes + classes
        distance = tl.load(square + at, mask=inside, other=0.0)
        near = distance <= zero
        ratio = tl.load(variance + at, mask=inside, other=0.0) / tl.where(near, 1.0, distance)
        ratio = tl.where(ratio < least, least, tl.where(ratio > largest, largest, ratio))  # NaN passes
        tl.store(variance + at, tl.where(near, 0.0, ratio), mask=inside)


@triton.jit(do_not_specialize=_INTEGERS[:1])
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
        zero = _threshold(square, row, num_classes, BLOCK, ACC)
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


@triton.jit(do_not_specialize=_INTEGERS[:2])
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
    other = _class_rows(weight, classes, num_classes, columns, num_features, ACC)
    total = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    for first in range(0, used, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        own = _slot_rows(weight, label, rows, used, columns, num_features, ACC)
        diagonal = own
        if cov is not None:
            diagonal = _slot_rows(cov, label, rows, used, columns, num_features, ACC)
        slope, _ = _slopes(form, distance, rows, used, classes, num_classes, diagonal)
        total += tl.sum(slope * (other[None, :, :] - own[:, None, :]), 0)
    at = grad_weight + classes.to(tl.int64)[:, None] * num_features + columns[None, :]
    tl.store(at, total, mask=(classes < num_classes)[:, None] & (columns < num_features)[None, :])


@triton.jit(do_not_specialize=_INTEGERS[:2])
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
    own = _slot_rows(weight, label, rows, used, columns, num_features, ACC)
    diagonal = own
    if cov is not None:
        diagonal = _slot_rows(cov, label, rows, used, columns, num_features, ACC)
    total = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    total_cov = total
    for first in range(0, tl.where(tl.program_id(0).to(tl.int64) * BLOCK_M < used, num_classes, 0), BLOCK_C):
        classes = first + tl.arange(0, BLOCK_C)
        other = _class_rows(weight, classes, num_classes, columns, num_features, ACC)
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


def _launch(weight: Tensor) -> dict:
    sizes = {"BLOCK_M": _SLOTS, "BLOCK_C": _CLASSES, "BLOCK_D": _FEATURES}
    return {**sizes, "ACC": acc_type(weight), "enable_fp_fusion": True}


def _row_launch(weight: Tensor) -> dict:
    return {"BLOCK": _COLUMNS, "ACC": acc_type(weight), "enable_fp_fusion": True}


def pair_terms_fwd(
    weight: Tensor, cov: Tensor | None, label: Tensor, num_slots: Tensor, normalize: bool, want_square: bool
) -> tuple[Tensor, Tensor]:
    """See ``classfair.ops.pair_terms``."""
    (classes, features), rows = weight.shape, label.shape[0]
    variance = weight.new_empty((0, 0) if cov is None else (rows, classes))
    square = weight.new_empty((rows, classes) if want_square else (0, 0))
    if rows == 0 or (cov is None and not want_square):
        return variance, square
    grid = (triton.cdiv(rows, _SLOTS), triton.cdiv(classes, _CLASSES))
    with torch.cuda.device_of(weight):
        _pair_terms_fwd_kernel[grid](
            weight,
            cov,
            label,
            num_slots,
            variance,
            square if want_square else None,
            classes,
            features,
            rows,
            **_launch(weight),
        )
        if normalize and cov is not None:
            _normalize_kernel[(rows,)](
                variance, square, cov, label, num_slots, classes, features, **_row_launch(weight)
            )
    return variance, square


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
    columns = triton.cdiv(features, _FEATURES)
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
            **_row_launch(weight),
        )
        inputs = (weight, cov, label, num_slots, form, distance)
        _class_gradient_kernel[(triton.cdiv(classes, _CLASSES), columns)](
            *inputs, grad_weight, classes, features, **_launch(weight)
        )
        _slot_gradient_kernel[(triton.cdiv(rows, _SLOTS), columns)](
            *inputs, grad_weight, grad_cov if want_cov else None, classes, features, **_launch(weight)
        )
    return grad_weight, grad_cov
