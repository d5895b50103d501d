"""Kernels of the backward of ``softmax_loss``: one over rows, one over columns for each summed gradient."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .gradient import (
    hard_gradients,
    loss_gradient,
    statistic_gradient,
    statistics_row,
)
from .rows import classes, load_tile, pair_slot, resolve, row_start, soft_targets
from .sums import piece_rows, piece_span
from .terms import two_parts


class Upstream(NamedTuple):
    """Gradients of the outputs; None is zero."""

    loss: Tensor | None  # (R,) of any stride, or () with stride 0
    lse: Tensor | None  # (R,) float64
    mass: Tensor | None  # (G, C)
    hit: Tensor | None  # (G, C)
    joint: Tensor | None  # (num_cells, C)
    stats_scale: Tensor | None  # (), how many times mass, hit and joint count
    loss_stride: int


class RowGradients(NamedTuple):
    """What the column kernel needs of each row: its gradient is scale * p' - soft_scale * t, but at_a and at_b at
    the labels a and b."""

    scale: Tensor  # (R,)
    soft_scale: Tensor  # (R,)
    at_a: Tensor  # (R,)
    at_b: Tensor  # (R,)
    margin: Tensor  # (R,) gradient of the margin
    a: Tensor  # (R,) int32, -1 for none
    b: Tensor  # (R,) int32, -1 for none
    slot: Tensor  # (R,) int32 row of `pair`, -1 for none
    active: Tensor  # (R,) int32, 0 for rows with a gradient, else -1


@triton.jit
def row_totals(
    x,
    up,
    start,
    rows,
    present,
    statistics,
    smoothing,
    STATS: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """sum_c t_c of soft targets, and <p, r> of the statistics; both (N,)."""
    soft = tl.zeros(rows.shape, ACC)
    dot = tl.zeros(rows.shape, ACC)
    for first in range(0, x.num_classes, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = present[:, None] & (columns < classes(x))[None, :]
        if SOFT:
            soft += tl.sum(soft_targets(x, rows, columns, inside, smoothing, ACC), 1)
        if STATS:
            z = load_tile(x.logits, start, columns, inside, 0.0, ACC)
            p, r = statistic_gradient(x, up, z, columns, statistics)
            dot += tl.sum(p * r, 1)
    return soft, dot


@triton.jit
def write_row(out, rows, present, active, share_a, slot, row):
    """Keeps what the column kernel needs of each row."""
    scale, soft_scale, a, at_a, b, at_b = row
    tl.store(out.scale + rows, scale, mask=present)
    tl.store(out.soft_scale + rows, soft_scale, mask=present)
    tl.store(out.a + rows, a.to(tl.int32), mask=present)
    tl.store(out.b + rows, b.to(tl.int32), mask=present)
    tl.store(out.at_a + rows, at_a, mask=present)
    tl.store(out.at_b + rows, at_b, mask=present)
    tl.store(out.margin + rows, tl.where(active & (share_a > 0.0), -at_a, 0.0), mask=present)
    tl.store(out.active + rows, tl.where(active, 0, -1), mask=present)
    tl.store(out.slot + rows, tl.where(active, slot, -1).to(tl.int32), mask=present)


@triton.jit(do_not_specialize=["num_rows", "num_cells", "pair_rows", "ignore_index"])
def _softmax_loss_bwd_kernel(
    x,
    up,
    out,
    grad,
    lse,
    lse_raw,
    num_rows,
    num_cells,
    pair_rows,
    ignore_index,
    label_smoothing: tl.float64,
    gamma: tl.float64,
    STATS: tl.constexpr,
    SOFT: tl.constexpr,
    FOCAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns BLOCK_N rows: reads their logits once (twice with statistics), labels, perturbations, lse and
    upstream gradients; writes their gradient and, if any, RowGradients."""
    smoothing, power = tl.full((), label_smoothing, ACC), tl.full((), gamma, ACC)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < num_rows
    a, share_a, b, share_b, label, group, valid, _ = resolve(x, rows, present, ignore_index, ACC)
    total = tl.load(lse + rows, mask=present, other=0.0)
    active = valid & (total != float("-inf"))  # -inf: every logit is, the gradient is 0
    high, low = two_parts(tl.where(active, total, 0.0), ACC)
    slot = pair_slot(x, rows, valid, a, pair_rows)
    start = row_start(x.logits, rows)
    upstream = tl.zeros((BLOCK_N,), ACC)
    upstream_lse = upstream
    if up.loss is not None:
        upstream = tl.load(up.loss + rows * up.loss_stride, mask=active, other=0.0)
        if x.sample_weight is not None:
            upstream *= tl.load(x.sample_weight + rows, mask=active, other=0.0)
    if up.lse is not None:
        upstream_lse = tl.load(up.lse + rows, mask=active, other=0.0).to(ACC)

    statistics, stats_scale = (active,), tl.full((), 1.0, ACC)
    if STATS:
        if up.stats_scale is not None:
            stats_scale = tl.load(up.stats_scale)
        statistics = statistics_row(x, up, rows, active, a, share_a, b, share_b, label, group, num_cells, lse_raw, ACC)
    soft = tl.zeros((BLOCK_N,), ACC)
    dot = soft
    if SOFT or STATS:
        soft, dot = row_totals(x, up, start, rows, present, statistics, smoothing, STATS, SOFT, BLOCK_C, ACC)
    share = tl.full((BLOCK_N,), 1.0, ACC)
    hard = tl.zeros((BLOCK_N,), ACC)
    at_a, at_b = hard, hard
    if x.soft_target is None:
        share = share_a + share_b
        soft = share * soft
        labels, lse_parts, upstreams = (a, share_a, b, share_b), (high, low), (upstream, upstream_lse)
        hard, at_a, at_b = hard_gradients(
            x, start, active, labels, slot, lse_parts, soft, upstreams, smoothing, power, FOCAL, ACC
        )
    row = (upstream * (hard + soft) + upstream_lse, upstream * share, a, at_a, b, at_b)
    if out is not None:
        write_row(out, rows, present, active, share_a, slot, row)
    grad_start = row_start(grad, rows)
    for first in range(0, x.num_classes, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = present[:, None] & (columns < classes(x))[None, :]
        z = load_tile(x.logits, start, columns, inside, 0.0, ACC)
        gradient = loss_gradient(x, z, rows, columns, inside, slot, high, low, row, smoothing, SOFT, ACC)
        if STATS:
            p, r = statistic_gradient(x, up, z, columns, statistics)
            gradient += stats_scale * p * (r - dot[:, None])
        gradient = tl.where(active[:, None], gradient, 0.0)
        pointers = grad_start[:, None] + columns.to(tl.int64)[None, :] * grad.stride_c
        tl.store(pointers, gradient.to(grad.data.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "keys", "splits", "rows_per_split"])
def _gradient_sums_kernel(
    x,
    lse,
    row,
    total,
    margin,
    pieces,
    keys,
    splits,
    rows_per_split,
    num_rows,
    label_smoothing: tl.float64,
    SOFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns BLOCK_C columns of one piece of rows: reads their logits, lse and RowGradients, writes the
    sum of the perturbed logits' gradient to total (splits, keys, C), and that of the margins' to margin, if any."""
    smoothing = tl.full((), label_smoothing, ACC)
    piece, key, begin, end = piece_span(pieces, keys, splits, rows_per_split, num_rows)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = columns < classes(x)
    total_sum = tl.zeros((BLOCK_C,), ACC)
    margin_sum = tl.zeros((BLOCK_C,), ACC)
    for first in range(begin, end, BLOCK_N):
        rows, active = piece_rows(pieces, key, first + tl.arange(0, BLOCK_N), end)
        inside = active[:, None] & within[None, :]
        a = tl.load(row.a + rows, mask=active, other=-1)
        if total is not None:
            scale = tl.load(row.scale + rows, mask=active, other=0.0)
            soft_scale = tl.load(row.soft_scale + rows, mask=active, other=0.0)
            at_a = tl.load(row.at_a + rows, mask=active, other=0.0)
            b = tl.load(row.b + rows, mask=active, other=-1)
            at_b = tl.load(row.at_b + rows, mask=active, other=0.0)
            slot = tl.load(row.slot + rows, mask=active, other=-1).to(tl.int64)
            high, low = two_parts(tl.load(lse + rows, mask=active, other=0.0), ACC)
            z = load_tile(x.logits, row_start(x.logits, rows), columns, inside, 0.0, ACC)
            values = (scale, soft_scale, a, at_a, b, at_b)
            gradient = loss_gradient(x, z, rows, columns, inside, slot, high, low, values, smoothing, SOFT, ACC)
            total_sum += tl.sum(tl.where(inside, gradient, 0.0), 0)
        if margin is not None:
            own = tl.load(row.margin + rows, mask=active, other=0.0)
            margin_sum += tl.sum(tl.where(columns[None, :] == a[:, None], own[:, None], 0.0), 0)
    at = piece * classes(x) + columns
    if total is not None:
        tl.store(total + at, total_sum, mask=within)
    if margin is not None:
        tl.store(margin + at, margin_sum, mask=within)
