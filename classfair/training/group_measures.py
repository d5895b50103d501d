"""Penalties for treating groups differently, and how differently a run does treat them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from classfair.fairness import demographic_parity_loss, equalized_odds_loss, intersection_over_union, iou_loss
from classfair.metrics._formulas import between_groups
from classfair.statistics import BatchStats, JointRows

PENALTIES: dict[str, Callable[[BatchStats], Tensor]] = {
    "dp-l2": partial(demographic_parity_loss, kind="l2"),
    "dp-mi": partial(demographic_parity_loss, kind="mi"),
    "eo-l2": partial(equalized_odds_loss, kind="l2"),
    "eo-mi": partial(equalized_odds_loss, kind="mi"),
    "iou": iou_loss,
}
NEED_JOINT = ("eo-l2", "eo-mi")
#: Of the table by label, named group and class that equalized odds of a whole set needs: C = 1000 with two groups fits.
MAX_TABLE_BYTES = 16 * 2**20
GROUP_COLUMNS = ("worst_group", "demographic_parity", "equalized_odds", "iou_sd")


def penalty(name: str, stats: BatchStats, num_groups: int) -> Tensor:
    """The penalty of the first ``num_groups`` groups; one more, if any, is of images without a group."""
    if stats.mass.shape[0] > num_groups:
        stats = _first_groups(stats, num_groups)
    return PENALTIES[name](stats)


def _first_groups(stats: BatchStats, num_groups: int) -> BatchStats:
    """The same shapes, as if the other groups had no sample: penalties skip those."""
    groups = stats.mass.shape[0]
    keep = torch.arange(groups, device=stats.mass.device) < num_groups
    joint = stats.joint
    if joint is not None:
        joint = joint._replace(rows=joint.rows * keep[joint.cell % groups, None])
    kept = {name: getattr(stats, name) * keep[:, None] for name in ("mass", "hit", "count")}
    return replace(stats, joint=joint, **kept)


class GroupTotals:
    """Sums by group over the images of an epoch, of all processes once they are summed. They stay on the device.

    The first ``named`` groups have names, all unless told otherwise; one more is of images without a group.
    """

    def __init__(
        self,
        num_groups: int,
        num_classes: int,
        device: torch.device | None = None,
        *,
        joint: bool,
        named: int | None = None,
    ) -> None:
        zeros = partial(torch.zeros, device=device)
        self.num_groups, self.named = num_groups, num_groups if named is None else named
        cells = num_classes * self.named
        self.counts = zeros(3, num_groups, num_classes, dtype=torch.int64)  # count, correct, predicted
        self.sums = zeros(2, num_groups, num_classes, dtype=torch.float64)  # mass, hit
        fits = joint and cells * num_classes * 8 <= MAX_TABLE_BYTES
        self.joint = zeros(cells, num_classes, dtype=torch.float64) if fits else None

    def add(self, stats: BatchStats) -> None:
        self.counts += torch.stack([stats.count, stats.correct, stats.predicted])
        self.sums += torch.stack([stats.mass, stats.hit])
        if self.joint is not None:
            assert stats.joint is not None
            rows, cell = stats.joint.rows.double(), stats.joint.cell  # unused rows are zero
            if self.named < self.num_groups:
                label, group = cell // self.num_groups, cell % self.num_groups
                rows = rows.masked_fill((group >= self.named)[:, None], 0.0)
                cell = label * self.named + group.clamp(max=self.named - 1)
            self.joint.index_add_(0, cell, rows)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"group_counts": self.counts, "group_sums": self.sums}
        return parts if self.joint is None else {**parts, "group_joint": self.joint}

    def statistics(self, groups: int) -> BatchStats:
        """Of the first groups, as one batch, in float64 on the CPU."""
        count, correct, predicted = self.counts[:, :groups].cpu()
        mass, hit = self.sums[:, :groups].cpu()
        joint = None
        if self.joint is not None:
            num_classes = self.joint.shape[1]
            rows = self.joint.view(num_classes, self.named, num_classes)[:, :groups].flatten(0, 1).cpu()
            joint = JointRows(rows, torch.arange(len(rows)), torch.tensor(len(rows)))
        none = torch.zeros((), dtype=torch.int64)
        return BatchStats(mass, hit, count, correct, predicted, none.new_empty(0), none, none, joint, synced=True)

    def rows(self) -> list[list[list[Any]]]:
        """For each group one row of CLASS_COLUMNS per class."""
        counts, sums = self.counts.permute(1, 2, 0).tolist(), self.sums.permute(1, 2, 0).tolist()
        return [[c + s for c, s in zip(*group, strict=True)] for group in zip(counts, sums, strict=True)]


def measures(totals: GroupTotals, groups: int) -> dict[str, Any]:
    """How differently the first groups fare: by group in their order, and between them.

    ``accuracy`` and ``iou`` (mean over classes) of the predicted classes, by group; ``worst_group`` the least accuracy;
    ``iou_sd`` the sample standard deviation of ``iou``. ``demographic_parity`` is the largest difference between two
    groups in how often a class is predicted, ``equalized_odds`` the largest one in the rate of true or of false
    positives of a class. ``penalties`` are those of the probabilities over all images; equalized odds among them need
    a table of (label, group, class), which training passes do not keep, nor validation above MAX_TABLE_BYTES.
    """
    stats = totals.statistics(groups)
    count, correct, predicted = stats.count.double(), stats.correct.double(), stats.predicted.double()
    images = count.sum(1, keepdim=True)
    accuracy = correct.sum(1) / images[:, 0]  # nan for a group without an image
    iou = intersection_over_union(stats, hard=True).by_group
    odds = torch.cat([correct / count, (predicted - correct) / (images - count)], 1)
    known = [name for name in PENALTIES if stats.joint is not None or name not in NEED_JOINT]
    return {
        "count": images[:, 0].long().tolist(),
        "accuracy": accuracy.tolist(),
        "iou": iou.tolist(),
        "worst_group": float(accuracy.nan_to_num(math.inf).amin()),
        "iou_sd": float(iou[iou.isfinite()].std()) if iou.isfinite().sum() > 1 else math.nan,
        "demographic_parity": float(between_groups(predicted / images, "difference")),
        "equalized_odds": float(between_groups(odds, "difference")),
        "penalties": {name: float(PENALTIES[name](stats)) for name in known},
    }
