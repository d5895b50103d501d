"""``class_moments`` in plain torch: moments of a batch by label, and their merge into running state.

Sources: batch moments are their definition, in two passes; the merge is Chan, Golub and LeVeque 1979, "Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances", for population moments. With weights instead of
counts the same formula holds for the moments of any mixture of two distributions, which gives the exponential form.
"""

import torch
from torch import Tensor

#: Sizes of features, by the dtype of the moments, above which a row counts as not finite: squares of up to 10^7 such
#: rows add up without an overflow, and leave room for what is multiplied with a variance.
LARGEST_FEATURE = {torch.float32: 1e15, torch.float64: 1e150}


def usable_rows(features: Tensor, acc: torch.dtype) -> Tensor:
    """Whether all features of a row are finite and small enough for moments in ``acc``, (N,) of (N, D)."""
    wide = torch.promote_types(features.dtype, acc)  # float16 would make an infinity of the limit
    return (features.to(wide).abs() <= LARGEST_FEATURE[acc]).all(1)


def class_moments(
    features: Tensor,  # (N, D)
    slot: Tensor,  # (N,) in [-1, M)
    order: Tensor,  # (N,), not needed here
    start: Tensor,  # (M + 1,)
    variance: bool,
) -> tuple[Tensor, ...]:
    """See :class:`classfair.ops.SlotMoments`; arguments and outputs in the order of the schema."""
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    slots, columns = start.shape[0] - 1, features.shape[1]
    usable = usable_rows(features, acc)
    counted = usable & (slot >= 0)
    # Rows that do not enter go to one spare row at the end, as zeros.
    row = torch.where(counted, slot, slots)
    x = torch.where(counted[:, None], features.to(acc), 0.0)
    count = torch.zeros_like(start).index_add(0, row, counted.long())  # (M + 1,)
    n = count.clamp_min(1)[:, None]
    mean = x.new_zeros(slots + 1, columns).index_add(0, row, x) / n
    nonfinite = ((slot >= 0) & ~usable).sum()
    if not variance:
        return count[:slots], mean[:slots], x.new_empty(0, 0), nonfinite
    deviation = x - mean[row]
    var = x.new_zeros(slots + 1, columns).index_add(0, row, deviation * deviation) / n
    return count[:slots], mean[:slots], var[:slots], nonfinite


def merge_weight(count: Tensor, state_count: Tensor, momentum: float | None, dtype: torch.dtype) -> Tensor:
    """Share of a batch in the merged moments, (M,): n_b / (n + n_b), or ``momentum`` where there is a past."""
    if momentum is None:
        return count.to(dtype) / (state_count + count).clamp_min(1).to(dtype)
    rate = torch.full_like(count, momentum, dtype=dtype)  # two numbers would meet in float32
    return torch.where(state_count > 0, rate, 1.0)


def class_moments_merge(
    count: Tensor,  # (M,)
    mean: Tensor,  # (M, D)
    variance: Tensor | None,  # (M, D)
    key: Tensor,  # (M,) class of each row; of the rows with a count, each at most once
    state_count: Tensor,  # (C,), written
    state_mean: Tensor,  # (C, D), written
    state_variance: Tensor | None,  # (C, D), written
    state_mean_error: Tensor | None,  # (C, D), written
    state_variance_error: Tensor | None,  # (C, D), written
    momentum: float | None,
) -> None:
    """m <- m + w (m_b - m);  v <- v + w (v_b - v + (1 - w) (m_b - m)^2);  n <- n + n_b;  w of ``merge_weight``.

    The errors are what rounding has left out of the state (Kahan 1965; the error of a sum by Knuth's TwoSum). Squares
    of single samples are skewed, so that their rounding errors are, and would add up. Where means are far larger than
    deviations, the steps of a mean become smaller than what its last digit stands for.
    """
    used = (count > 0)[:, None]
    at = torch.where(count > 0, key, 0)  # rows without a sample add zeros to class 0
    w = merge_weight(count, state_count[at], momentum, mean.dtype)[:, None]
    mean_error = torch.zeros_like(mean) if state_mean_error is None else state_mean_error[at]
    delta = (mean - state_mean[at]) - mean_error
    if variance is not None and state_variance is not None:
        between = torch.where(w == 1, 0.0, (1 - w) * delta * delta)  # no 0 * inf where the square overflows
        change = w * (variance - state_variance[at] + between)
        _add_exactly(state_variance, state_variance_error, at, change, used, w == 1)
    _add_exactly(state_mean, state_mean_error, at, w * delta, used, w == 1)
    state_count.index_add_(0, at, count)


def _add_exactly(
    state: Tensor, error: Tensor | None, at: Tensor, change: Tensor, used: Tensor, first: Tensor
) -> None:  # (C, D), (C, D), (M,), (M, D), (M, 1), (M, 1)
    """Add changes to rows of the state, and what rounding left out of it before; ``error`` is what it leaves out.

    A first batch replaces what was there.
    """
    if error is not None:
        old, was = state[at], error[at]
        change = torch.where(first, change, change + was)
        new = old + change
        added = new - old
        left = torch.where(first, 0.0, (old - (new - added)) + (change - added))
        error.index_add_(0, at, torch.where(used, left - was, 0.0))
    state.index_add_(0, at, torch.where(used, change, 0.0))
