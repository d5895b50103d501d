"""Full covariance by class, in plain torch: matrix products of a few rows at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from classfair.ops import LabelIndex, SlotMoments
from classfair.reference import merge_weight

# A block with a single row would cost as much memory traffic as one with eight.
_MIN_BLOCK_ROWS = 8


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
    state_count: Tensor,  # (C,), before the batch
    state_mean: Tensor,  # (C, D), before the batch
    state_cov: Tensor,  # (C, D, D), written
    momentum: float | None,
) -> None:
    """S <- S + w (S_b - S + (1 - w) d d'), d = m_b - m: Chan, Golub and LeVeque 1979, in matrix form.

    A fixed number of steps, none of which looks at a value: no synchronisation. Apart from the state there are two
    (D, D) tensors at a time. Rows of absent classes are not touched.
    """
    if features.shape[0] == 0:
        return
    blocks, key, columns = _cut(index), index.key_of_slot, state_mean.shape[1]
    counted = blocks.present & features.isfinite().all(1)[blocks.row]  # (K, B)
    mean = batch.mean.to(state_mean.dtype)
    w = merge_weight(batch.count, state_count[key], momentum, mean.dtype)  # (M,)
    w = torch.where(batch.count > 0, w, 0.0)
    between = (1 - w).clamp_min(0).sqrt()[:, None] * (mean - state_mean[key])  # (M, D)
    scale = batch.count.clamp_min(1).to(mean.dtype).rsqrt()  # (M,)
    update = state_cov.new_zeros(1, columns, columns)
    for k in range(blocks.slot.shape[0]):
        slot, begins, ends = blocks.slot[k : k + 1], blocks.first[k], blocks.last[k]
        x = features[blocks.row[k]].to(mean.dtype) - mean[slot]  # (B, D)
        x = torch.where(counted[k, :, None], x, 0.0) * scale[slot]
        x = torch.cat([x, between[slot] * begins])[None]  # (1, B + 1, D)
        update.mul_(~begins).baddbmm_(x.mT, x)
        # A block that is not the last of its slot, or of none, writes back what it read.
        label = key[slot]
        state_cov.index_copy_(0, label, state_cov[label].lerp_(update, (w[slot] * ends)[:, None, None]))
