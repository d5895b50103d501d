"""Penalties for treating groups differently, and how differently a run does treat them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from classfair.fairness import demographic_parity_loss, equalized_odds_loss, intersection_over_union, iou_loss
from classfair.statistics import BatchStats, rates

PENALTIES: dict[str, Callable[..., Tensor]] = {
    "dp-l2": partial(demographic_parity_loss, kind="l2"),
    "dp-mi": partial(demographic_parity_loss, kind="mi"),
    "eo-l2": partial(equalized_odds_loss, kind="l2"),
    "eo-mi": partial(equalized_odds_loss, kind="mi"),
    "iou": iou_loss,
}
NEED_JOINT = ("eo-l2", "eo-mi")
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


def measures(stats: BatchStats) -> dict[str, Any]:
    """How differently the groups fare: by group in their order, and between them.

    ``accuracy`` and ``iou`` (mean over classes) of the predicted classes, by group; ``worst_group`` the least accuracy;
    ``iou_sd`` the sample standard deviation of ``iou``. ``demographic_parity`` is the largest difference between two
    groups in how often a class is predicted, ``equalized_odds`` the largest one in the rate of true or of false
    positives of a class. ``penalties`` are those of the probabilities over all images; equalized odds among them need
    ``stats.joint``, a table that training passes do not keep, nor validation where it is too large.
    """
    images = stats.count.sum(1)
    accuracy = rates.accuracies(stats.correct.sum(1), images)  # nan for a group without an image
    iou = intersection_over_union(stats, hard=True).by_group
    selected = rates.selection_rates(stats.count, stats.predicted)
    odds = rates.odds_rates(stats.count, stats.predicted, stats.correct)
    known = [name for name in PENALTIES if stats.joint is not None or name not in NEED_JOINT]
    return {
        "count": images.tolist(),
        "accuracy": accuracy.tolist(),
        "iou": iou.tolist(),
        "worst_group": float(rates.worst(accuracy)),
        "iou_sd": float(rates.spread(iou)),
        "demographic_parity": float(rates.between_groups(selected, "difference")),
        "equalized_odds": float(rates.between_groups(odds, "difference")),
        "penalties": {name: float(PENALTIES[name](stats, sync=False)) for name in known},
    }
