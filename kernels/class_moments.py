"""``class_moments``: moments of the rows of each label slot, and their merge into running state."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import acc_dtype, acc_type, unit

_ROWS = 8  # of a tile: rows of a label are few
_MAX_COLUMNS = 128  # of a tile
_PIECE_ROWS = 64  # of a slot, on average, above which it is split over programs
_MAX_SPLITS = 1024
_MERGED = 1024  # columns of a program of the merge

# Features of larger size, by the type of the moments, make their row one that is not finite: squares of 10^7 such rows
# add up without an overflow, and leave room for what is multiplied with a variance.
_LARGEST_FEATURE = {torch.float32: 1e15, torch.float64: 1e150}


@triton.jit(do_not_specialize=["num_rows", "stride"])
def _finite_kernel(
    features,
    slot,
    finite,
    nonfinite,
    num_rows,
    num_columns,
    stride,
    LARGEST: tl.constexpr,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_N rows: reads their features, writes whether all are finite and at most LARGEST; an
    integer atomic counts the rows with a slot that are not."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < num_rows
    start = features + rows * (stride // UNIT * UNIT)
    odd = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, num_columns, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = present[:, None] & (columns < num_columns)[None, :]
        x = tl.load(start[:, None] + columns[None, :], mask=inside, other=0.0).to(ACC)
        odd += tl.sum((tl.abs(x) <= LARGEST).to(tl.int32) ^ 1, 1)  # a NaN is not below anything
    tl.store(finite + rows, (odd == 0).to(tl.int8), mask=present)
    has_slot = tl.load(slot + rows, mask=present, other=-1) >= 0
    tl.atomic_add(nonfinite, tl.sum((has_slot & (odd > 0)).to(tl.int64), 0), sem="relaxed")


@triton.jit
def _piece_tile(features, order, finite, positions, end, columns, num_columns, stride, ACC: tl.constexpr):
    """(N, C') features of the rows at these positions, and which of the rows enter (N,)."""
    inside = positions < end
    rows = tl.load(order + positions, mask=inside, other=0)
    enters = inside & (tl.load(finite + rows, mask=inside, other=0) != 0)
    pointers = features + rows[:, None] * stride + columns[None, :]
    x = tl.load(pointers, mask=enters[:, None] & (columns < num_columns)[None, :], other=0.0)
    return x.to(ACC), enters


@triton.jit
def _origin(features, order, finite, first, last, columns, num_columns, stride, ACC: tl.constexpr):
    """(C',) features of the row at position `first`, zeros where there is none or it does not enter."""
    positions = first + tl.arange(0, 1)
    x, _ = _piece_tile(features, order, finite, positions, last, columns, num_columns, stride, ACC)
    return tl.sum(x, 0)


@triton.jit(do_not_specialize=["slots", "splits", "stride"])
def _moments_kernel(
    features,
    order,
    start,
    finite,
    count,
    mean,
    variance,
    slots,
    splits,
    num_columns,
    stride,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_D columns of a piece: one of `splits` equal parts of the rows of a slot. Reads them twice,
    the second time from cache, and writes count, mean and variance of (splits, slots, ...)."""
    piece = tl.program_id(0).to(tl.int64)
    slot = piece % slots
    first = tl.load(start + slot)
    last = tl.load(start + slot + 1)
    size = (last - first + splits - 1) // splits
    begin = first + piece // slots * size
    end = tl.minimum(begin + size, last)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    step = stride // UNIT * UNIT

    n = tl.zeros((), tl.int64)
    total = tl.zeros((BLOCK_D,), ACC)
    # The first row of the slot is the origin: a large common offset then costs no digits.
    origin = _origin(features, order, finite, first, last, columns, num_columns, step, ACC)
    for position in range(begin, end, BLOCK_N):
        positions = position + tl.arange(0, BLOCK_N)
        x, enters = _piece_tile(features, order, finite, positions, end, columns, num_columns, step, ACC)
        total += tl.sum(tl.where(enters[:, None], x - origin[None, :], 0.0), 0)
        n += tl.sum(enters.to(tl.int64), 0)
    divisor = tl.maximum(n, 1).to(ACC)
    center = total / divisor

    off = tl.zeros((BLOCK_D,), ACC)
    squares = tl.zeros((BLOCK_D,), ACC)
    for position in range(begin, end, BLOCK_N):
        positions = position + tl.arange(0, BLOCK_N)
        x, enters = _piece_tile(features, order, finite, positions, end, columns, num_columns, step, ACC)
        d = tl.where(enters[:, None], x - origin[None, :] - center[None, :], 0.0)
        off += tl.sum(d, 0)
        squares += tl.sum(d * d, 0)
    # Corrected by what the mean is off (Chan, Golub and LeVeque 1983, eq. 1.7).
    center += off / divisor
    if splits == 1:
        center = tl.where(n > 0, origin + center, 0.0)  # otherwise it is added to what all pieces give
    out = piece * num_columns + columns
    inside = columns < num_columns
    tl.store(mean + out, center, mask=inside)
    if variance is not None:
        squares -= off * off / divisor
        tl.store(variance + out, tl.where(squares < 0, 0.0, squares) / divisor, mask=inside)  # NaN passes
    tl.store(count + piece, n, mask=tl.program_id(1) == 0)


@triton.jit
def _share(past, own, momentum, ACC: tl.constexpr):
    """Share of `own` samples in a mixture with `past` others: by numbers, or as given where there are others."""
    if momentum is None:
        return (own.to(tl.float64) / tl.maximum(past + own, 1).to(tl.float64)).to(ACC)
    else:
        return tl.where(past > 0, tl.load(momentum), 1.0).to(ACC)


@triton.jit
def _changes(share, mean, mean_error, variance, own_mean, own_variance):
    """Changes of mean and variance in a mixture (Chan, Golub and LeVeque 1979)."""
    delta = own_mean - mean - mean_error
    return share * delta, share * (own_variance - variance + (1.0 - share) * delta * delta)


@triton.jit
def _load(values, at, inside, ACC: tl.constexpr):
    """Zeros where there is no tensor."""
    if values is None:
        return tl.zeros(at.shape, ACC)
    else:
        return tl.load(values + at, mask=inside, other=0.0)


@triton.jit
def _store_sum(state, error, target, inside, share, old, was, change, own):
    """Adds a change, and what rounding left out of the state before, and keeps what it leaves out now (Knuth's TwoSum).
    A share of 1 takes what is given."""
    change += was
    new = old + change
    tl.store(state + target, tl.where(share == 1.0, own, new), mask=inside)
    if error is not None:
        added = new - old
        left = (old - (new - added)) + (change - added)
        tl.store(error + target, tl.where(share == 1.0, 0.0, left), mask=inside)


@triton.jit(do_not_specialize=["slots", "splits", "stride"])
def _combine_kernel(
    features,
    order,
    start,
    finite,
    piece_count,
    piece_mean,
    piece_variance,
    count,
    mean,
    variance,
    slots,
    splits,
    num_columns,
    stride,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_D columns of a slot: merges its (splits, slots, ...) pieces in order."""
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < num_columns
    n = tl.zeros((), tl.int64)
    center = tl.zeros((BLOCK_D,), ACC)
    spread = center
    for split in range(splits):
        piece = split * slots + slot
        own = tl.load(piece_count + piece)
        share = _share(n, own, None, ACC)
        at = piece * num_columns + columns
        own_mean, own_spread = _load(piece_mean, at, inside, ACC), _load(piece_variance, at, inside, ACC)
        step, change = _changes(share, center, 0.0, spread, own_mean, own_spread)
        center = tl.where(share == 1.0, own_mean, center + step)
        spread = tl.where(share == 1.0, own_spread, spread + change)
        n += own
    first = tl.load(start + slot)
    last = tl.load(start + slot + 1)
    origin = _origin(features, order, finite, first, last, columns, num_columns, stride // UNIT * UNIT, ACC)
    center = tl.where(n > 0, origin + center, 0.0)
    tl.store(mean + slot * num_columns + columns, center, mask=inside)
    if variance is not None:
        tl.store(variance + slot * num_columns + columns, spread, mask=inside)
    tl.store(count + slot, n, mask=tl.program_id(1) == 0)


def class_moments(
    features: Tensor,  # (N, D)
    slot: Tensor,  # (N,)
    order: Tensor,  # (N,)
    start: Tensor,  # (M + 1,)
    variance: bool,
) -> tuple[Tensor, ...]:
    """See ``classfair.ops.SlotMoments``."""
    rows, columns = features.shape
    slots, acc = start.shape[0] - 1, acc_dtype(features)
    if columns > 1 and features.stride(1) != 1:
        features = features.contiguous()
    splits = min(_MAX_SPLITS, max(1, rows // (_PIECE_ROWS * max(1, slots))))
    block = min(_MAX_COLUMNS, triton.next_power_of_2(max(1, columns)))
    finite, nonfinite = order.new_empty(rows, dtype=torch.int8), order.new_zeros(())

    def outputs(*pieces: int) -> tuple[Tensor, Tensor, Tensor | None]:
        new = features.new_empty
        own = new((*pieces, columns), dtype=acc) if variance else None
        return order.new_empty(pieces), new((*pieces, columns), dtype=acc), own

    out = outputs(slots)
    parts = out if splits == 1 else outputs(splits, slots)
    launch = {"UNIT": unit(features.stride(0)), "ACC": acc_type(features), "BLOCK_D": block}
    launch["enable_fp_fusion"] = True
    grid = (triton.cdiv(columns, block),)
    with torch.cuda.device_of(features):
        sizes = (rows, columns, features.stride(0))
        _finite_kernel[(triton.cdiv(rows, _ROWS),)](
            features, slot, finite, nonfinite, *sizes, LARGEST=_LARGEST_FEATURE[acc], BLOCK_N=_ROWS, **launch
        )
        if slots and columns:
            given, sizes = (features, order, start, finite), (slots, splits, columns, features.stride(0))
            _moments_kernel[(slots * splits, *grid)](*given, *parts, *sizes, BLOCK_N=_ROWS, **launch)
            if splits > 1:
                _combine_kernel[(slots, *grid)](*given, *parts, *out, *sizes, **launch)
    count, mean, own = out
    return count, mean, features.new_empty((0, 0), dtype=acc) if own is None else own, nonfinite


@triton.jit
def _merge_kernel(
    count,
    mean,
    variance,
    key,
    state_count,
    state_mean,
    state_variance,
    state_mean_error,
    state_variance_error,
    momentum,
    num_columns,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_D columns of a row of the batch: reads it and the state of its class, writes the latter.
    Counts are left as they are, because other programs read them."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(count + row)
    if own > 0:
        ACC: tl.constexpr = mean.dtype.element_ty
        label = tl.load(key + row)
        share = _share(tl.load(state_count + label), own, momentum, ACC)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < num_columns
        source = row * num_columns + columns
        target = label * num_columns + columns
        own_mean, own_variance = _load(mean, source, inside, ACC), _load(variance, source, inside, ACC)
        center, spread = _load(state_mean, target, inside, ACC), _load(state_variance, target, inside, ACC)
        mean_error = _load(state_mean_error, target, inside, ACC)
        variance_error = _load(state_variance_error, target, inside, ACC)
        step, change = _changes(share, center, mean_error, spread, own_mean, own_variance)
        _store_sum(state_mean, state_mean_error, target, inside, share, center, mean_error, step, own_mean)
        if variance is not None:
            error = state_variance_error
            _store_sum(state_variance, error, target, inside, share, spread, variance_error, change, own_variance)


def class_moments_merge(
    count: Tensor,  # (M,)
    mean: Tensor,  # (M, D)
    variance: Tensor | None,  # (M, D)
    key: Tensor,  # (M,)
    state_count: Tensor,  # (C,)
    state_mean: Tensor,  # (C, D)
    state_variance: Tensor | None,  # (C, D)
    state_mean_error: Tensor | None,  # (C, D)
    state_variance_error: Tensor | None,  # (C, D)
    momentum: float | None,
) -> None:
    """See ``classfair.ops.class_moments_merge``."""
    slots, columns = mean.shape
    block = min(_MERGED, triton.next_power_of_2(max(1, columns)))
    state = (state_count, state_mean, state_variance, state_mean_error, state_variance_error)
    rate = None if momentum is None else mean.new_full((), momentum)  # a number would arrive in float32
    with torch.cuda.device_of(mean):
        if slots and columns:
            _merge_kernel[(slots, triton.cdiv(columns, block))](
                count, mean, variance, key, *state, rate, columns, BLOCK_D=block, enable_fp_fusion=True
            )
        # Rows without a sample add 0 to some class: integers, so in any order.
        state_count.index_add_(0, torch.where(count > 0, key, 0), count)
