"""Kernels of the forward of ``softmax_loss``: one over rows, one over columns for each table of statistics."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .rows import (
    class_weight,
    classes,
    hard_labels,
    joint_cell,
    load_tile,
    logit_at,
    own_margin,
    pair_slot,
    perturb,
    resolve,
    row_start,
    soft_targets,
)
from .sums import (
    piece_rows,
    piece_span,
)
from .terms import add_block, first_max, focal_weight, two_parts


class Outputs(NamedTuple):
    """What the row kernel writes."""

    loss: Tensor  # (R,)
    lse: Tensor  # (R,) float64
    weight_parts: Tensor  # (programs, 1) each program's part of total_weight
    loss_parts: Tensor  # (programs, 1) and of the sum of the losses
    lse_raw: Tensor | None  # (R,) float64
    prediction: Tensor | None  # (R,)
    counts: Tensor | None  # (replicas, 3 * G * C + 2)
    group: Tensor | None  # (R,) int32, -1 for rows in no statistic
    cell: Tensor | None  # (R,) int32, -1 for rows in no cell


@triton.jit
def log_sums(
    x,
    start,
    present,
    slot,
    label,
    margin,
    STATS: tl.constexpr,
    PERTURBED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Maximum and sum of exponentials above it, of perturbed and of raw logits, and the prediction; all (N,)."""
    raw_top = tl.full(present.shape, float("-inf"), ACC)
    raw_sum = tl.zeros(present.shape, ACC)
    top, total = raw_top, raw_sum
    best = tl.zeros(present.shape, tl.int32)
    nan = tl.full(present.shape, 2147483647, tl.int32)
    for first in range(0, x.num_classes, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = present[:, None] & (columns < classes(x))[None, :]
        z = load_tile(x.logits, start, columns, inside, float("-inf"), ACC)
        if STATS:
            best, nan = first_max(z, columns, raw_top, best, nan)
        if STATS or not PERTURBED:
            raw_top, raw_sum = add_block(raw_top, raw_sum, z)
        if PERTURBED:
            z = perturb(x, z, columns, inside, slot, label, margin)
            top, total = add_block(top, total, z)
    if not PERTURBED:
        top, total = raw_top, raw_sum
    return top, total, raw_top, raw_sum, tl.where(nan < x.num_classes, nan, best).to(tl.int64)


@triton.jit
def log_sum_exp(top, total):
    """float64 (N,) from its two parts; -inf where every logit is."""
    safe = tl.where(top == float("-inf"), 0.0, top)
    return safe.to(tl.float64) + tl.log(total).to(tl.float64)


@triton.jit
def hard_loss(x, y, share, nll, keep, gamma, FOCAL: tl.constexpr, ACC: tl.constexpr):
    """share * (1 - e) * w_y * focal * nll (N,)."""
    if FOCAL:
        nll = focal_weight(nll, gamma) * nll
    return tl.where(share > 0.0, share * keep * class_weight(x, y, ACC) * nll, 0.0)


@triton.jit
def soft_loss(
    x,
    start,
    rows,
    present,
    slot,
    label,
    margin,
    top,
    log_sum,
    smoothing,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """sum_c t_c nll_c of dense targets, or of the smoothed part of hard ones (N,)."""
    loss = tl.zeros(rows.shape, ACC)
    for first in range(0, x.num_classes, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = present[:, None] & (columns < classes(x))[None, :]
        z = load_tile(x.logits, start, columns, inside, 0.0, ACC)
        z = perturb(x, z, columns, inside, slot, label, margin)
        t = soft_targets(x, rows, columns, inside, smoothing, ACC)
        if x.soft_target is not None:
            inside = t != 0.0  # 0 * inf
        loss += tl.sum(tl.where(inside, t * (log_sum[:, None] - (z - top[:, None])), 0.0), 1)
    return loss


@triton.jit
def write_statistics(x, out, rows, present, valid, invalid, label, group, prediction, lse, num_cells, replicas):
    """Prediction and keys of each row; integer atomics into one of `replicas` copies of the counts."""
    finite = tl.abs(lse) < float("inf")
    counted = valid & finite & (label >= 0) & (group >= 0)
    tl.store(out.prediction + rows, prediction, mask=present)
    tl.store(out.group + rows, tl.where(counted, group, -1).to(tl.int32), mask=present)
    if x.cell is not None:
        cell = joint_cell(x, rows, counted, num_cells)
        tl.store(out.cell + rows, cell.to(tl.int32), mask=present)
    table = tl.cast(x.num_groups, tl.int64) * x.num_classes
    counts = out.counts + tl.program_id(0) % replicas * (3 * table + 2)
    at, one = counts + group * x.num_classes, tl.full(rows.shape, 1, tl.int64)
    tl.atomic_add(at + label, one, mask=counted, sem="relaxed")
    tl.atomic_add(at + table + label, one, mask=counted & (prediction == label), sem="relaxed")
    tl.atomic_add(at + 2 * table + prediction, one, mask=counted, sem="relaxed")
    last = counts + 3 * table + tl.zeros(rows.shape, tl.int32)
    tl.atomic_add(last, one, mask=invalid, sem="relaxed")
    tl.atomic_add(last + 1, one, mask=valid & (finite == 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "num_cells", "pair_rows", "replicas", "ignore_index"])
def _softmax_loss_fwd_kernel(
    x,
    out,
    num_rows,
    num_cells,
    pair_rows,
    replicas,
    ignore_index,
    label_smoothing: tl.float64,
    gamma: tl.float64,
    STATS: tl.constexpr,
    PERTURBED: tl.constexpr,
    SOFT: tl.constexpr,
    FOCAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns BLOCK_N rows: reads their logits once (again for soft targets), labels and
    perturbations; writes Outputs."""
    smoothing, power = tl.full((), label_smoothing, ACC), tl.full((), gamma, ACC)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < num_rows
    a, share_a, b, share_b, label, group, valid, invalid = resolve(x, rows, present, ignore_index, ACC)
    slot = pair_slot(x, rows, valid, a, pair_rows)
    margin = own_margin(x, a, share_a, ACC)
    start = row_start(x.logits, rows)
    top, total, raw_top, raw_sum, prediction = log_sums(
        x, start, present, slot, a, margin, STATS, PERTURBED, BLOCK_C, ACC
    )

    # log(sum) - (z - max): max + log(sum) would lose the digits that small losses need.
    high, log_sum = tl.where(top == float("-inf"), 0.0, top), tl.log(total)
    loss = tl.zeros((BLOCK_N,), ACC)
    weight = tl.full((BLOCK_N,), 1.0, ACC)
    share = weight
    if x.soft_target is None:
        nll = log_sum - (logit_at(x, start, valid, a, slot, ACC) - margin - high)
        loss = hard_loss(x, a, share_a, nll, 1.0 - smoothing, power, FOCAL, ACC)
        weight = share_a * class_weight(x, a, ACC)
        share = share_a + share_b
        if x.target_b is not None:
            nll = log_sum - (logit_at(x, start, valid, b, slot, ACC) - high)
            loss += hard_loss(x, b, share_b, nll, 1.0 - smoothing, power, FOCAL, ACC)
            weight += share_b * class_weight(x, b, ACC)
    if SOFT:
        soft = soft_loss(x, start, rows, present, slot, a, margin, high, log_sum, smoothing, BLOCK_C, ACC)
        loss += tl.where(share > 0.0, share * soft, 0.0)
    dead = (top == float("-inf")) & (total == 0.0)  # every logit is -inf
    loss = tl.where(valid, tl.where(dead, float("inf"), loss), 0.0)
    if x.sample_weight is not None:
        own = tl.load(x.sample_weight + rows, mask=present, other=0.0)
        weight *= own
        loss = tl.where(own == 0.0, 0.0, own * loss)  # 0 * inf
    loss = tl.where(invalid, float("nan"), loss)
    tl.store(out.loss + rows, loss, mask=present)
    tl.store(out.lse + rows, tl.where(valid, log_sum_exp(top, total), 0.0), mask=present)
    tl.store(out.weight_parts + tl.program_id(0), tl.sum(tl.where(valid, weight, 0.0), 0))
    tl.store(out.loss_parts + tl.program_id(0), tl.sum(tl.where(present, loss, 0.0), 0))
    if STATS:
        lse = log_sum_exp(raw_top, raw_sum)
        if PERTURBED:
            tl.store(out.lse_raw + rows, tl.where(valid, lse, 0.0), mask=present)
        write_statistics(x, out, rows, present, valid, invalid, label, group, prediction, lse, num_cells, replicas)


@triton.jit(do_not_specialize=["num_rows", "keys", "splits", "rows_per_split", "ignore_index"])
def _probability_sums_kernel(
    x,
    lse,
    mass,
    hit,
    pieces,
    keys,
    splits,
    rows_per_split,
    num_rows,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program owns BLOCK_C columns of one piece of rows: reads their raw logits and lse, writes the sum
    of p to mass (splits, keys, C) and that of p at the rows' own labels to hit, if any."""
    piece, key, begin, end = piece_span(pieces, keys, splits, rows_per_split, num_rows)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = columns < classes(x)
    mass_sum = tl.zeros((BLOCK_C,), ACC)
    hit_sum = tl.zeros((BLOCK_C,), ACC)
    for first in range(begin, end, BLOCK_N):
        rows, counted = piece_rows(pieces, key, first + tl.arange(0, BLOCK_N), end)
        inside = counted[:, None] & within[None, :]
        z = load_tile(x.logits, row_start(x.logits, rows), columns, inside, float("-inf"), ACC)
        high, low = two_parts(tl.load(lse + rows, mask=counted, other=0.0), ACC)
        p = tl.exp((z - high[:, None]) - low[:, None])
        mass_sum += tl.sum(p, 0)
        if hit is not None:
            a, share_a, b, share_b, _, _, _ = hard_labels(x, rows, counted, ignore_index, ACC)
            own = tl.where(columns[None, :] == a[:, None], share_a[:, None], 0.0)
            if x.target_b is not None:
                own += tl.where(columns[None, :] == b[:, None], share_b[:, None], 0.0)
            hit_sum += tl.sum(own * p, 0)
    at = piece * classes(x) + columns
    tl.store(mass + at, mass_sum, mask=within)
    if hit is not None:
        tl.store(hit + at, hit_sum, mask=within)
