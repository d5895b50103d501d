"""Squared distance and mapped variance of every pair of slot and class."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import CLASSES, INTEGERS, SLOTS, class_rows, launch, row_launch, slot_rows, threshold


@triton.jit(do_not_specialize=INTEGERS)
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
        own = slot_rows(weight, label, rows, used, columns, num_features, ACC)
        other = class_rows(weight, classes, num_classes, columns, num_features, ACC)
        difference = other[None, :, :] - own[:, None, :]
        product = difference * difference
        if square is not None:
            distance += tl.sum(product, 2)
        if cov is not None:
            diagonal = slot_rows(cov, label, rows, used, columns, num_features, ACC)
            form += tl.sum(product * diagonal[:, None, :], 2)
    inside = (rows < num_rows)[:, None] & (classes < num_classes)[None, :]
    at = rows[:, None] * num_classes + classes[None, :]
    live = (rows < used)[:, None]
    if cov is not None:
        tl.store(variance + at, tl.where(live, form, 0.0), mask=inside)
    if square is not None:
        tl.store(square + at, tl.where(live, distance, 0.0), mask=inside)


@triton.jit(do_not_specialize=INTEGERS[:2])
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
    zero = threshold(square, row, num_classes, BLOCK, ACC)
    for first in range(0, num_classes, BLOCK):
        classes = first + tl.arange(0, BLOCK)
        inside = classes < live
        at = row * num_classes + classes
        distance = tl.load(square + at, mask=inside, other=0.0)
        near = distance <= zero
        ratio = tl.load(variance + at, mask=inside, other=0.0) / tl.where(near, 1.0, distance)
        ratio = tl.where(ratio < least, least, tl.where(ratio > largest, largest, ratio))  # NaN passes
        tl.store(variance + at, tl.where(near, 0.0, ratio), mask=inside)


def pair_terms_fwd(
    weight: Tensor, cov: Tensor | None, label: Tensor, num_slots: Tensor, normalize: bool, want_square: bool
) -> tuple[Tensor, Tensor]:
    """See ``classfair.ops.pair_terms``."""
    (classes, features), rows = weight.shape, label.shape[0]
    variance = weight.new_empty((0, 0) if cov is None else (rows, classes))
    square = weight.new_empty((rows, classes) if want_square else (0, 0))
    if rows == 0 or (cov is None and not want_square):
        return variance, square
    grid = (triton.cdiv(rows, SLOTS), triton.cdiv(classes, CLASSES))
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
            **launch(weight),
        )
        if normalize and cov is not None:
            _normalize_kernel[(rows,)](variance, square, cov, label, num_slots, classes, features, **row_launch(weight))
    return variance, square
