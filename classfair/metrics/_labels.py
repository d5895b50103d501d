"""Counts from predicted labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.statistics import BatchStats


def label_stats(
    name: str, preds: Any, target: Any, group: Any, *, num_classes: int, num_groups: int, ignore_index: int
) -> BatchStats:
    """Statistics of labels predicted for the samples; ``mass`` and ``hit`` are 0."""
    _check(name, preds, target, group)
    prediction, target = preds, target.reshape(-1)
    preds = preds.reshape(-1)
    counted = target != ignore_index
    valid = (target >= 0) & (target < num_classes) & (preds >= 0) & (preds < num_classes)
    offset = torch.zeros_like(target)
    if group is not None:
        group = group.reshape(-1)
        counted &= group != -1
        valid &= (group >= 0) & (group < num_groups)
        offset = group * num_classes
    invalid = (counted & ~valid).sum()
    if preds.device.type == "cpu" and invalid:  # on the CPU looking costs nothing
        row = int((counted & ~valid).nonzero()[0])
        raise IndexError(
            f"{name}: expected labels in [0, {num_classes}) and groups in [-1, {num_groups}), got others in row {row}"
        )
    counted &= valid
    spare = num_groups * num_classes  # rows that do not count land behind the table

    def tally(label: Tensor, rows: Tensor) -> Tensor:
        # Integers scattered: exact, in any order, and without the N x C table of a deterministic bincount.
        cell = torch.where(rows, offset + label, spare)
        table = torch.zeros(spare + 1, dtype=torch.int64, device=label.device)
        return table.scatter_add_(0, cell, torch.ones_like(cell))[:spare].view(num_groups, num_classes)

    zero = torch.zeros(num_groups, num_classes, device=preds.device)
    return BatchStats(
        mass=zero,
        hit=zero,
        count=tally(target, counted),
        correct=tally(target, counted & (preds == target)),
        predicted=tally(preds, counted),
        prediction=prediction,
        invalid=invalid,
        nonfinite=torch.zeros_like(invalid),
    )


def _check(name: str, preds: Any, target: Any, group: Any) -> None:
    if not isinstance(preds, Tensor):
        raise TypeError(f"{name}: expected preds as a tensor, got {type(preds).__name__}")
    others = {"preds": preds, "target": target} | ({} if group is None else {"group": group})
    for argument, value in others.items():
        check.check_labels_tensor(name, argument, value, preds.shape)
        check.check_device(name, argument, value, preds.device, "preds")
