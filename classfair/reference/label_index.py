"""``label_index`` in plain torch."""

import torch
from torch import Tensor


def classify(target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    ignored = target == ignore_index
    return ignored, ~ignored & ((target < 0) | (target >= num_classes))


def raise_if_bad(name: str, bad: Tensor, values: Tensor, expected: str) -> None:
    """IndexError on the CPU, where looking costs nothing; other devices flag the row instead."""
    if bad.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(bad) or not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    raise IndexError(f"{name}: expected {expected}, got {int(values[row])} at row {row}")


def label_index(
    target: Tensor, group: Tensor | None, num_classes: int, num_groups: int, ignore_index: int
) -> tuple[Tensor, ...]:
    """See :class:`classfair.ops.LabelIndex`."""
    rows, keys = target.shape[0], num_classes * num_groups
    capacity = min(rows, keys)
    ignored, bad = classify(target, num_classes, ignore_index)
    expected = f"label in [0, {num_classes}) or ignore_index {ignore_index}"
    raise_if_bad("label_index", bad, target, expected)
    g = torch.zeros_like(target) if group is None else group
    bad_group = ~ignored & ((g < -1) | (g >= num_groups))
    raise_if_bad("label_index", bad_group, g, f"group in [0, {num_groups}) or -1")
    placed = ~(ignored | bad | bad_group | (g < 0))
    key = torch.where(placed, target * num_groups + g, keys)
    sorted_key, order = torch.sort(key, stable=True)
    first = torch.ones_like(placed)
    first[1:] = sorted_key[1:] != sorted_key[:-1]
    first = first & (sorted_key < keys)
    rank = torch.cumsum(first, 0) - 1  # slot of each sorted row
    slot = torch.empty_like(target).scatter_(0, order, torch.where(sorted_key < keys, rank, -1))
    # Writes of rows that open no slot go to one spare place at the end.
    place = torch.where(first, rank, capacity)
    key_of_slot = target.new_zeros(capacity + 1).scatter_(0, place, sorted_key)[:capacity]
    start = placed.sum().expand(capacity + 1).clone()
    spare = torch.cat([start, start[:1]])
    place = torch.where(first, rank, capacity + 1)
    start = spare.scatter_(0, place, torch.arange(rows, device=target.device))[: capacity + 1]
    return slot, key_of_slot, order, start, first.sum()
