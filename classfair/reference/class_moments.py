"""``class_moments`` in plain torch: moments of a batch by label, and their merge into running state.

Sources: batch moments are their definition, in two passes; the merge is Chan, Golub and LeVeque 1979, "Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances", for population moments. With weights instead of
counts the same formula holds for the moments of any mixture of two distributions, which gives the exponential form.
"""

import torch
from torch import Tensor


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
    finite = features.isfinite().all(1)
    counted = finite & (slot >= 0)
    # Rows that do not enter go to one spare row at the end, as zeros.
    row = torch.where(counted, slot, slots)
    x = torch.where(counted[:, None], features.to(acc), 0.0)
    count = torch.zeros_like(start).index_add(0, row, counted.long())  # (M + 1,)
    n = count.clamp_min(1)[:, None]
    mean = x.new_zeros(slots + 1, columns).index_add(0, row, x) / n
    nonfinite = ((slot >= 0) & ~finite).sum()
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
    state_error: Tensor | None,  # (C, D), written
    momentum: float | None,
) -> None:
    """m <- m + w (m_b - m);  v <- v + w (v_b - v + (1 - w) (m_b - m)^2);  n <- n + n_b;  w of ``merge_weight``.

    ``state_error`` is what rounding has left out of ``state_variance`` (Kahan 1965; the error of a sum by Knuth's
    TwoSum): squares of single samples are skewed, so that their rounding errors are, and would add up.
    """
    used = (count > 0)[:, None]
    at = torch.where(count > 0, key, 0)  # rows without a sample add zeros to class 0
    w = merge_weight(count, state_count[at], momentum, mean.dtype)[:, None]
    delta = mean - state_mean[at]
    if variance is not None and state_variance is not None:
        between = torch.where(w == 1, 0.0, (1 - w) * delta * delta)  # no 0 * inf where the square overflows
        old = state_variance[at]
        change = w * (variance - old + between)
        if state_error is not None:
            error = state_error[at]
            change = change + error
            new = old + change
            added = new - old
            left = torch.where(w == 1, 0.0, (old - (new - added)) + (change - added))
            state_error.index_add_(0, at, torch.where(used, left - error, 0.0))
        state_variance.index_add_(0, at, torch.where(used, change, 0.0))
    state_mean.index_add_(0, at, torch.where(used, w * delta, 0.0))
    state_count.index_add_(0, at, count)
