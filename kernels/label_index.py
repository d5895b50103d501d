"""``label_index``: rows of a batch grouped by label, around one stable sort."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_labels, hard_label

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "num_keys", "ignore_index"])
def _key_kernel(
    target,
    group,
    key,
    placed,
    num_rows,
    num_classes,
    num_groups,
    num_keys,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK rows: reads label and group, writes label * G + group, or num_keys for rows without a
    slot; an integer atomic counts the others."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = rows < num_rows
    y, _, _ = hard_label(target, rows, present, num_classes, ignore_index)
    g = tl.zeros((BLOCK,), tl.int64)
    if group is not None:
        g = tl.load(group + rows, mask=present, other=0)
    has_slot = present & (y >= 0) & (g >= 0) & (g < num_groups)
    tl.store(key + rows, tl.where(has_slot, y * num_groups + g, num_keys), mask=present)
    tl.atomic_add(placed, tl.sum(has_slot.to(tl.int64), 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _first_kernel(key, first, num_rows, num_keys, BLOCK: tl.constexpr):
    """One program owns BLOCK positions of the sorted keys, writes 1 where a key is new, else 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = at < num_rows
    own = tl.load(key + at, mask=present, other=0)
    previous = tl.load(key + at - 1, mask=present & (at > 0), other=-1)
    new = (own != previous) & (own < num_keys)
    tl.store(first + at, new.to(tl.int64), mask=present)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "capacity"])
def _slot_kernel(
    key,
    order,
    used,
    placed,
    slot,
    key_of_slot,
    start,
    num_slots,
    num_rows,
    num_keys,
    capacity,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK positions: reads sorted keys, their rows and the slots used up to each; writes the slots
    of those rows, what opens a slot there, and what the unused slots of these numbers hold."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = at < num_rows
    own = tl.load(key + at, mask=present, other=0).to(tl.int64)
    row = tl.load(order + at, mask=present, other=0)
    rank = tl.load(used + at, mask=present, other=0)
    before = tl.load(used + at - 1, mask=present & (at > 0), other=0)
    tl.store(slot + row, tl.where(own < num_keys, rank - 1, -1), mask=present)
    tl.store(key_of_slot + before, own, mask=present & (rank > before))
    tl.store(start + before, at, mask=present & (rank > before))
    total = tl.load(used + num_rows - 1, mask=num_rows > 0, other=0)
    unused = (at >= total) & (at <= capacity)
    tl.store(key_of_slot + at, tl.zeros((BLOCK,), tl.int64), mask=unused & (at < capacity))
    tl.store(start + at, tl.load(placed) + tl.zeros((BLOCK,), tl.int64), mask=unused)
    tl.store(num_slots, total, mask=tl.program_id(0) == 0)


def label_index(
    target: Tensor,  # (N,)
    group: Tensor | None,  # (N,)
    num_classes: int,
    num_groups: int,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """See ``classfair.ops.LabelIndex``."""
    rows, keys = target.shape[0], num_classes * num_groups
    capacity, group = min(rows, keys), None if group is None else group.contiguous()
    check_labels("label_index", (target,), group, num_classes, num_groups, ignore_index)
    new, launch = target.new_empty, {"BLOCK": _BLOCK, "enable_fp_fusion": True}
    # A radix sort passes over 32 bits in half the time.
    key = new(rows, dtype=torch.int32 if keys < 2**31 else torch.int64)
    first, placed, num_slots = new(rows), target.new_zeros(()), new(())
    slot, key_of_slot, start = new(rows), new(capacity), new(capacity + 1)
    grid = (triton.cdiv(rows, _BLOCK),)
    with torch.cuda.device_of(target):
        sizes = (rows, num_classes, num_groups, keys, ignore_index)
        _key_kernel[grid](target, group, key, placed, *sizes, **launch)
        ordered, order = torch.sort(key, stable=True)
        _first_kernel[grid](ordered, first, rows, keys, **launch)
        outputs = (slot, key_of_slot, start, num_slots)
        _slot_kernel[(triton.cdiv(max(rows, capacity + 1), _BLOCK),)](
            ordered, order, torch.cumsum(first, 0), placed, *outputs, rows, keys, capacity, **launch
        )
    return slot, key_of_slot, order, start, num_slots
