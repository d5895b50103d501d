"""``dependence`` and ``iou_penalty``: value and gradient of a group penalty in one pass over batch statistics.

Divisions are correctly rounded, so that what is equal by definition is equal in bits: a perfect classifier gives 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_COLUMNS = 4096  # of a tile
_GROUPS = tl.constexpr(16)  # taken at a time


class Rows(NamedTuple):
    """Inputs of ``dependence``; what is None is compiled out."""

    data: Tensor  # (M, C)
    count: Tensor  # (G, C)
    by_group: Tensor | None  # (G,) its row sums
    cell: Tensor | None  # (M,)
    num_cells: Tensor | None  # ()
    num_groups: int
    num_classes: int
    mutual_information: tl.constexpr
    weighted: tl.constexpr


@triton.jit
def _over(a, b):
    """a / b, rounded correctly; Triton's own division of float32 is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _segment(x, row):
    """First row of those that share a row's label, and the end of them; an unused row is alone."""
    first = row
    last = row + 1
    if x.cell is None:
        first = row * 0
        last = first + x.num_groups
    else:
        label = tl.load(x.cell + row) // x.num_groups
        # Unused rows hold cell 0 and come last: they belong to nothing.
        used = tl.load(x.num_cells)
        low = tl.where(row < used, 0, row)
        high = tl.where(row < used, used, last)
        while (first > low) & (tl.load(x.cell + first - 1, mask=first > low, other=0) // x.num_groups == label):
            first -= 1
        while (last < high) & (tl.load(x.cell + last, mask=last < high, other=0) // x.num_groups == label):
            last += 1
    return first, last


@triton.jit
def _samples(x, row):
    """Samples behind a row, 0 for an unused one."""
    if x.cell is None:
        return tl.load(x.by_group + row)
    else:
        used = row < tl.load(x.num_cells)
        cell = tl.load(x.cell + row)
        at = cell % x.num_groups * x.num_classes + cell // x.num_groups
        return tl.load(x.count + at, mask=used, other=0)


@triton.jit
def _segment_size(x, first, last, ACC: tl.constexpr):
    """Samples of a segment, added like its rows, how many rows have one, and its share of all samples or 1."""
    size = tl.zeros((), ACC)
    filled = tl.zeros((), tl.int32)
    for m in range(first, last):
        n = _samples(x, m)
        size += n.to(ACC)
        filled += (n > 0).to(tl.int32)
    weight = tl.full((), 1.0, ACC)
    if x.weighted:
        total = tl.zeros((), tl.int64)
        for g in range(x.num_groups):
            total += tl.load(x.by_group + g)
        weight = _over(size, tl.maximum(total, 1).to(ACC))
    return size, filled, weight


@triton.jit
def _row(x, m, columns, end, ACC: tl.constexpr):
    """Sums of probabilities (C',), 0 outside and without a sample; samples, at least 1; where they are (C',)."""
    n = _samples(x, m)
    there = columns < tl.where(n > 0, end, 0)
    return tl.load(x.data + m * x.num_classes + columns, mask=there, other=0.0), tl.maximum(n, 1).to(ACC), there


@triton.jit
def _squared_differences(x, gradient, total, first, last, size, weight, columns, end, ACC: tl.constexpr):
    """Terms of the value (C',); writes the gradient."""
    mean = _over(total, size)
    value = tl.zeros(total.shape, ACC)
    gaps = value
    for m in range(first, last):
        p, n, there = _row(x, m, columns, end, ACC)
        d = tl.where(there, _over(p, n) - mean, 0.0)
        value += d * d
        gaps += d
    for m in range(first, last):
        p, n, there = _row(x, m, columns, end, ACC)
        slope = weight * (2.0 * _over(_over(p, n) - mean, n) - 2.0 * _over(gaps, size))
        tl.store(gradient + m * x.num_classes + columns, tl.where(there, slope, 0.0), mask=columns < end)
    return weight * value


@triton.jit
def _mutual_information(x, gradient, total, first, last, size, weight, columns, end, ACC: tl.constexpr):
    """Terms of the value (C',); writes the gradient."""
    # A ratio of products, which are equal where row and class are independent.
    TINY: tl.constexpr = 2.2250738585072014e-308 if ACC.primitive_bitwidth == 64 else 1.1754943508222875e-38
    share = _over(weight, size)
    value = tl.zeros(total.shape, ACC)
    for m in range(first, last):
        p, n, _ = _row(x, m, columns, end, ACC)
        positive = p > 0
        ratio = _over(p * size, tl.where(positive, total * n, 1.0))
        information = tl.where(positive, share * tl.log(tl.where(ratio < TINY, TINY, ratio)), 0.0)
        value += p * information
        tl.store(gradient + m * x.num_classes + columns, information, mask=columns < end)
    return value


@triton.jit
def _dependence_kernel(x, parts, gradient, BLOCK: tl.constexpr):
    """One program owns one of K equal parts of the columns of a segment of K rows: reads them three times, the last two
    from cache; writes their gradient and its part of the value."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    first, last = _segment(x, row)
    size, filled, weight = _segment_size(x, first, last, ACC)
    width = (x.num_classes + last - first - 1) // (last - first)
    begin = (row - first) * width
    end = tl.minimum(begin + width, x.num_classes)
    value = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        if filled < 2:  # nothing to differ from
            for m in range(first, last):
                tl.store(gradient + m * x.num_classes + columns, tl.zeros((BLOCK,), ACC), mask=columns < end)
        else:
            total = tl.zeros((BLOCK,), ACC)
            for m in range(first, last):
                p, _, _ = _row(x, m, columns, end, ACC)
                total += p
            if x.mutual_information:
                value += _mutual_information(x, gradient, total, first, last, size, weight, columns, end, ACC)
            else:
                value += _squared_differences(x, gradient, total, first, last, size, weight, columns, end, ACC)
    tl.store(parts + row, tl.sum(value, 0))


def _launch(columns: int) -> dict:
    block = min(_MAX_COLUMNS, triton.next_power_of_2(max(1, columns)))
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 256)), "enable_fp_fusion": True}


def dependence(
    rows: Tensor,  # (M, C)
    count: Tensor,  # (G, C)
    cell: Tensor | None,  # (M,)
    num_cells: Tensor | None,  # ()
    mutual_information: bool,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """See ``classfair.ops.dependence``."""
    parts, gradient = rows.new_empty(rows.shape[0]), torch.empty_like(rows)
    by_group = count.sum(1) if cell is None or weighted else None
    flags = (tl.constexpr(mutual_information), tl.constexpr(weighted))
    x = Rows(rows, count, by_group, cell, num_cells, *count.shape, *flags)
    with torch.cuda.device_of(rows):
        _dependence_kernel[(rows.shape[0],)](x, parts, gradient, **_launch(rows.shape[1]))
    return parts, gradient


@triton.jit
def _overlap(mass, hit, count, first, last, num_classes, columns, inside, skip: tl.constexpr, ACC: tl.constexpr):
    """Of the groups [first, last) together: IoU and 1 / union (C',), 0 where a class does not count; where it does
    (C',); samples (C',)."""
    inter = tl.zeros(columns.shape, ACC)
    union = inter
    samples = tl.zeros(columns.shape, tl.int64)
    for g in range(first, last):
        at = g * num_classes + columns
        n = tl.load(count + at, mask=inside, other=0)
        own = tl.load(hit + at, mask=inside, other=0.0)
        inter += own
        union += tl.load(mass + at, mask=inside, other=0.0) + n.to(ACC) - own
        samples += n
    counts = inside & (samples > 0) if skip else inside
    there = counts & (union > 0)
    union = tl.where(there, union, 1.0)
    return tl.where(there, _over(inter, union), 0.0), _over(there.to(ACC), union), counts, samples


@triton.jit(do_not_specialize=["num_groups"])
def _iou_kernel(mass, hit, count, mean, weight, num_groups, num_classes, SKIP: tl.constexpr, BLOCK: tl.constexpr):
    """One program owns a group, the last one all of them: reads its rows, writes the mean IoU (G + 1,) and the weight
    of a class in it (G + 1,), 0 where there is no sample."""
    ACC: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    first = tl.where(row < num_groups, row, 0)
    last = tl.where(row < num_groups, row + 1, num_groups)
    total = tl.zeros((BLOCK,), ACC)
    valid = tl.zeros((BLOCK,), tl.int64)
    samples = valid
    for start in range(0, num_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_classes
        iou, _, counts, n = _overlap(mass, hit, count, first, last, num_classes, columns, inside, SKIP, ACC)
        total += iou
        valid += counts.to(tl.int64)
        samples += n
    number = tl.maximum(tl.sum(valid, 0), 1).to(ACC)
    tl.store(mean + row, _over(tl.sum(total, 0), number))
    tl.store(weight + row, _over((tl.sum(samples, 0) > 0).to(ACC), number))


@triton.jit
def _gaps(mean, weight, row, num_groups, ACC: tl.constexpr):
    """What a row's IoU is above that of the groups with a sample, added up; and the sum of squares. Of a group without
    a sample: 0."""
    mine = tl.load(mean + row)
    own = tl.load(weight + row)
    gaps = tl.zeros((_GROUPS,), ACC)
    squares = gaps
    for start in range(0, num_groups, _GROUPS):
        groups = start + tl.arange(0, _GROUPS)
        inside = groups < num_groups
        both = tl.load(weight + groups, mask=inside, other=0.0) * own > 0
        gap = tl.where(both, mine - tl.load(mean + groups, mask=inside, other=0.0), 0.0)
        gaps += gap
        squares += gap * gap
    return tl.sum(gaps, 0), tl.sum(squares, 0)


@triton.jit(do_not_specialize=["num_groups"])
def _iou_gradient_kernel(
    mass,
    hit,
    count,
    mean,
    weight,
    value,
    grad_mass,
    grad_hit,
    num_groups,
    num_classes,
    PAIRED: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK classes of a group: reads its IoU and that of all, writes the gradients; the first one
    writes the value."""
    ACC: tl.constexpr = mean.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_classes
    own = tl.load(weight + group)
    iou, inverse, counts, _ = _overlap(mass, hit, count, group, group + 1, num_classes, columns, inside, SKIP, ACC)
    if PAIRED:
        gap, penalty = _gaps(mean, weight, group, num_groups, ACC)
    else:
        all_gaps, penalty = _gaps(mean, weight, num_groups, num_groups, ACC)
        gap = tl.where(own > 0, tl.load(mean + group) - tl.load(mean + num_groups), 0.0)
    # d(I/U): U holds -I.
    slope = tl.where(counts, 2.0 * gap * own * inverse, 0.0)
    of_mass = -slope * iou
    of_hit = slope - of_mass
    if not PAIRED:
        iou, inverse, counts, _ = _overlap(mass, hit, count, 0, num_groups, num_classes, columns, inside, SKIP, ACC)
        slope = tl.where(counts, 2.0 * all_gaps * tl.load(weight + num_groups) * inverse, 0.0)
        of_mass -= slope * iou
        of_hit += slope + slope * iou
    at = group * num_classes + columns
    tl.store(grad_mass + at, of_mass, mask=inside)
    tl.store(grad_hit + at, of_hit, mask=inside)
    if (tl.program_id(1) == 0) & (group == 0):
        if PAIRED:
            for other in range(1, num_groups):
                penalty += _gaps(mean, weight, other, num_groups, ACC)[1]
            penalty = 0.5 * penalty  # a pair is met from both sides
        tl.store(value, penalty)


def iou_penalty(
    mass: Tensor,  # (G, C)
    hit: Tensor,  # (G, C)
    count: Tensor,  # (G, C)
    paired: bool,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``classfair.ops.iou_penalty``."""
    (groups, classes), new = mass.shape, mass.new_empty
    mean, weight, value = new(groups + 1), new(groups + 1), new(())
    grad_mass, grad_hit = torch.empty_like(mass), torch.empty_like(hit)
    launch = {**_launch(min(classes, 1024)), "SKIP": skip}
    with torch.cuda.device_of(mass):
        _iou_kernel[(groups + 1,)](mass, hit, count, mean, weight, groups, classes, **launch)
        _iou_gradient_kernel[(groups, triton.cdiv(classes, launch["BLOCK"]))](
            mass, hit, count, mean, weight, value, grad_mass, grad_hit, groups, classes, PAIRED=paired, **launch
        )
    return value, grad_mass, grad_hit
