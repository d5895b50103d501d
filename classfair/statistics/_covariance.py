"""A batch into the covariance matrices of its classes, in plain torch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair.ops import LabelIndex, SlotMoments
from classfair.reference import merge_weight, usable_rows

# A block with a single row would cost as much memory traffic as one with eight.
_MIN_BLOCK_ROWS = 8


class State(NamedTuple):
    """Moments of C classes; all are written."""

    count: Tensor  # type: ignore[assignment]  # (C,) int64
    mean: Tensor  # (C, D)
    cov: Tensor | None  # (C, D) variances, or (C, D, D)
    mean_error: Tensor | None  # (C, D), what rounding has left out of the means; None where that is not kept
    cov_error: Tensor | None  # (C, D), and of the (diagonal) variances


def zero_state(
    num_classes: int, dim: int, covariance: str, dtype: torch.dtype, device: Any, errors: tuple[bool, bool]
) -> State:
    """The state of no sample; whether there are rounding errors of means, and of variances."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(num_classes, *shape, dtype=dtype, device=device)

    shape = {"diag": (dim,), "full": (dim, dim)}.get(covariance)
    count = torch.zeros(num_classes, dtype=torch.int64, device=device)
    cov = None if shape is None else zeros(*shape)
    return State(count, zeros(dim), cov, *(zeros(dim) if kept else None for kept in errors))


class _Blocks(NamedTuple):
    """Rows of each slot in blocks of B, K blocks in all: a number that depends on sizes only."""

    slot: Tensor  # (K,)
    row: Tensor  # (K, B)
    present: Tensor  # (K, B) whether there is such a row
    first: Tensor  # (K,) whether the block is the first of its slot
    last: Tensor  # (K,)


def _cut(index: LabelIndex) -> _Blocks:
    rows, slots = index.order.shape[0], index.key_of_slot.shape[0]
    size = max(_MIN_BLOCK_ROWS, -(-rows // slots))
    number = torch.arange(rows // size + slots, device=index.order.device)
    blocks = (index.start.diff() + size - 1) // size  # (M,)
    end = blocks.cumsum(0)
    slot = torch.searchsorted(end, number, right=True).clamp_max(slots - 1)
    of_slot = number - (end - blocks)[slot]
    position = (index.start[slot] + of_slot * size)[:, None] + torch.arange(size, device=number.device)
    present = (position < index.start[slot + 1][:, None]) & (of_slot < blocks[slot])[:, None]
    row = index.order[torch.where(present, position, 0)]
    return _Blocks(slot, row, present, present[:, 0] & (of_slot == 0), present[:, 0] & (of_slot == blocks[slot] - 1))


def merge_covariance(
    features: Tensor,  # (N, D)
    index: LabelIndex,
    batch: SlotMoments,
    state: State,  # before the batch; cov (C, D, D) is written
    momentum: float | None,
) -> None:
    """S <- S + w (S_b - S + (1 - w) d d'), d = m_b - m: Chan, Golub and LeVeque 1979, in matrix form.

    A fixed number of steps, none of which looks at a value: no synchronisation. Apart from the state there are two
    (D, D) tensors at a time. Rows of absent classes are not touched.
    """
    cov = state.cov
    if features.shape[0] == 0 or cov is None:
        return
    blocks, key, mean = _cut(index), index.key_of_slot, batch.mean
    counted = blocks.present & usable_rows(features, mean.dtype)[blocks.row]  # (K, B)
    w = merge_weight(batch.count, state.count[key], momentum, mean.dtype)  # (M,)
    w = torch.where(batch.count > 0, w, 0.0)
    delta = mean - state.mean[key]  # (M, D)
    if state.mean_error is not None:
        delta = delta - state.mean_error[key]
    between = (1 - w).clamp_min(0).sqrt()[:, None] * delta
    scale = batch.count.clamp_min(1).to(mean.dtype).rsqrt()  # (M,)
    update = torch.zeros_like(cov[:1])
    for k in range(blocks.slot.shape[0]):
        slot, begins, ends = blocks.slot[k : k + 1], blocks.first[k], blocks.last[k]
        x = features[blocks.row[k]].to(mean.dtype) - mean[slot]  # (B, D)
        x = torch.where(counted[k, :, None], x, 0.0) * scale[slot]
        x = torch.cat([x, between[slot] * begins])[None]  # (1, B + 1, D)
        update.mul_(~begins).baddbmm_(x.mT, x)
        # A block that is not the last of its slot, or of none, writes back what it read.
        label, share = key[slot], (w[slot] * ends)[:, None]
        new = cov[label].lerp_(update, share[:, :, None])
        if state.cov_error is not None:
            _add_exactly(cov[label], update, share, state.cov_error, label, new)
        cov.index_copy_(0, label, new)


def _add_exactly(
    old: Tensor, update: Tensor, share: Tensor, error: Tensor, label: Tensor, new: Tensor
) -> None:  # (1, D, D), (1, D, D), (1, 1), (C, D), (1,), (1, D, D)
    """The diagonals of ``new`` with what rounding left out of earlier sums, and into ``error`` what it does now.

    Knuth's TwoSum. Only squares make skewed updates, whose rounding errors add up; those of products average out.
    """
    was, to = old.diagonal(dim1=1, dim2=2), update.diagonal(dim1=1, dim2=2)
    change = share * (to - was) + error[label]
    total = was + change
    added = total - was
    left = (was - (total - added)) + (change - added)
    first = share == 1  # takes the update as it is
    new.diagonal(dim1=1, dim2=2).copy_(torch.where(first, to, total))
    error.index_copy_(0, label, torch.where(first, 0.0, left))
