"""Counts from predicted labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.statistics import BatchStats


def label_stats(
    name: str,
    preds: Any,
    target: Any,
    group: Any,
    *,
    num_classes: int,
    num_groups: int,
    ignore_index: int,
    confusion: bool = False,
) -> BatchStats:
    """Statistics of labels predicted for the samples; ``mass`` and ``hit`` are 0."""
    _check(name, preds, target, group)
    prediction, preds, target = preds, preds.reshape(-1), target.reshape(-1)
    counted, invalid = _counted(name, preds, target, group, num_classes, num_groups, ignore_index)
    offset = 0 if group is None else group.reshape(-1) * num_classes
    shape = (num_groups, num_classes)
    zero = torch.zeros(shape, dtype=torch.float32, device=preds.device)
    return BatchStats(
        mass=zero,
        hit=zero,
        count=_tally(offset + target, counted, shape),
        correct=_tally(offset + target, counted & (preds == target), shape),
        predicted=_tally(offset + preds, counted, shape),
        prediction=prediction,
        invalid=invalid,
        nonfinite=torch.zeros_like(invalid),
        confusion=_tally(target * num_classes + preds, counted, (num_classes, num_classes)) if confusion else None,
    )


def _counted(
    name: str, preds: Tensor, target: Tensor, group: Any, num_classes: int, num_groups: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Rows that count, and how many are out of range."""
    counted = target != ignore_index
    valid = (target >= 0) & (target < num_classes) & (preds >= 0) & (preds < num_classes)
    if group is not None:
        group = group.reshape(-1)
        counted &= group != -1
        valid &= (group >= 0) & (group < num_groups)
    bad = counted & ~valid
    invalid = bad.sum()
    if preds.device.type == "cpu" and invalid:  # on the CPU looking costs nothing
        raise IndexError(
            f"{name}: expected labels in [0, {num_classes}) and groups in [-1, {num_groups}), "
            f"got others in row {int(bad.nonzero()[0])}"
        )
    return counted & valid, invalid


def _tally(cell: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """How many rows each cell has: integers scattered, exact, without the N x C table of a deterministic bincount."""
    spare = shape[0] * shape[1]  # rows that do not count land behind the table
    cell = torch.where(rows, cell, spare)
    table = torch.zeros(spare + 1, dtype=torch.int64, device=cell.device)
    return table.scatter_add_(0, cell, torch.ones_like(cell))[:spare].view(shape)


def _check(name: str, preds: Any, target: Any, group: Any) -> None:
    if not isinstance(preds, Tensor):
        raise TypeError(f"{name}: expected preds as a tensor, got {type(preds).__name__}")
    others = {"preds": preds, "target": target} | ({} if group is None else {"group": group})
    for argument, value in others.items():
        check.check_labels_tensor(name, argument, value, preds.shape)
        check.check_device(name, argument, value, preds.device, "preds")
