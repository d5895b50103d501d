"""Per-class statistics summed over an epoch, and what a finished run leaves of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classfair import BatchStats, metrics
from classfair.training.config import TrainConfig
from classfair.training.distributed import Processes
from classfair.training.group_measures import GROUP_COLUMNS, GroupTotals, measures

COLUMNS = ("many", "medium", "few", "all", "geometric_mean", "worst_class")
CLASS_COLUMNS = ("count", "correct", "predicted", "mass", "hit")


class Totals:
    """Sums over the images of an epoch, of all processes after :meth:`merge`. They stay on the device.

    With groups also by group, where ``groups`` counts images without one as one more group, the last; ``named``, all
    of them unless told otherwise, does not.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device | None = None,
        groups: int = 0,
        *,
        joint: bool = False,
        named: int | None = None,
    ) -> None:
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # count, correct, predicted
        self.sums = torch.zeros(2, num_classes, dtype=torch.float64, device=device)  # mass, hit
        self.loss = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of their weights
        self.groups = GroupTotals(groups, num_classes, device, joint=joint, named=named) if groups else None

    def add(self, loss: Tensor, weight: Tensor, stats: BatchStats) -> None:
        """Add a batch: sum of its losses, sum of their weights, statistics (1, C) or by group."""
        stats = stats.detach()  # a sum would keep the graphs of the whole epoch
        self.counts += torch.stack([stats.count, stats.correct, stats.predicted]).sum(1)
        self.sums += torch.stack([stats.mass, stats.hit]).sum(1)
        self.loss += torch.stack([loss.detach(), weight])
        if self.groups is not None:
            self.groups.add(stats)

    def merge(self, processes: Processes) -> Totals:
        for part in self.state_dict().values():
            processes.sum_(part)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        groups = {} if self.groups is None else self.groups.state_dict()
        return {"counts": self.counts, "sums": self.sums, "loss": self.loss, **groups}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Totals:
        groups = state["group_counts"].shape[1] if "group_counts" in state else 0
        num_classes, joint = state["counts"].shape[1], state.get("group_joint")
        named = None if joint is None else len(joint) // num_classes
        totals = cls(num_classes, groups=groups, joint=joint is not None, named=named)
        for name, part in totals.state_dict().items():
            part.copy_(state[name])
        return totals

    @property
    def mean_loss(self) -> float:
        return float(self.loss[0] / self.loss[1])

    @property
    def count(self) -> NDArray[np.int64]:
        return self.counts[0].cpu().numpy()

    @property
    def correct(self) -> NDArray[np.int64]:
        return self.counts[1].cpu().numpy()

    @property
    def accuracy(self) -> NDArray[np.float64]:
        return metrics.per_class_accuracy(self.correct, self.count)

    @property
    def effective_frequency(self) -> NDArray[np.float64]:
        """Mean probability of the true class, (C,) ("Classes Are Not Equal", eq. 11); nan for absent classes."""
        count = self.counts[0]
        return torch.where(count > 0, self.sums[1] / count, math.nan).cpu().numpy()

    def by_group(self, names: list[str]) -> dict[str, Any]:
        """:func:`measures` of the named groups."""
        assert self.groups is not None
        return measures(self.groups, len(names))

    def summary(self, prefix: str, groups: list[str]) -> dict[str, float]:
        """Scalars of the epoch for logs."""
        accuracy = self.accuracy
        scalars = {
            f"{prefix}_loss": self.mean_loss,
            f"{prefix}_accuracy": float(self.counts[1].sum() / self.counts[0].sum()),
            f"{prefix}_balanced_accuracy": metrics.balanced_accuracy(accuracy),
            f"{prefix}_worst_class_accuracy": metrics.worst_class_accuracy(accuracy),
        }
        if groups:
            fares = self.by_group(groups)
            scalars |= {f"{prefix}_accuracy_of_{g}": a for g, a in zip(groups, fares["accuracy"], strict=True)}
            scalars |= {f"{prefix}_{name}": fares[name] for name in GROUP_COLUMNS}
            scalars |= {f"{prefix}_penalty_{name}": value for name, value in fares["penalties"].items()}
        return scalars

    def rows(self) -> list[list[Any]]:
        """One row of CLASS_COLUMNS per class."""
        columns = [*self.counts.tolist(), *self.sums.tolist()]
        return [list(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Epoch:
    """Where a run stands after an epoch."""

    loss: str
    seed: int
    epoch: int  # counted from 1
    train: Totals
    val: Totals
    lr: float
    groups: list[str] = field(default_factory=list)  # names

    def summary(self) -> dict[str, float]:
        parts = {**self.train.summary("train", self.groups), **self.val.summary("val", self.groups)}
        return {"epoch": self.epoch, "lr": self.lr, **parts}


@dataclass(frozen=True)
class RunResult:
    """One loss with one seed: statistics per class of the last epoch, and the course of the loss."""

    loss: str
    seed: int
    class_names: list[str]
    train_count: NDArray[np.int64]  # (C,) training images
    train: Totals  # of the last epoch's own training pass
    val: Totals
    train_loss: list[float]  # per epoch
    groups: list[str] = field(default_factory=list)  # names

    @property
    def test_count(self) -> NDArray[np.int64]:
        return self.val.count

    @property
    def correct(self) -> NDArray[np.int64]:
        return self.val.correct

    @property
    def accuracy(self) -> NDArray[np.float64]:
        return self.val.accuracy

    def columns(self, config: TrainConfig) -> dict[str, float]:
        """The columns of the closing tables, in the order of COLUMNS and with groups of :func:`group_columns`.

        ``penalty`` is the trained one on the validation set, nan where it was left out of :func:`measures`.
        """
        accuracy = self.accuracy
        shots = metrics.shot_accuracy(accuracy, self.train_count, many=config.many_shot, few=config.few_shot)
        columns = {
            **shots,
            "all": metrics.balanced_accuracy(accuracy),
            "geometric_mean": metrics.geometric_mean_accuracy(accuracy),
            "worst_class": metrics.worst_class_accuracy(accuracy),
        }
        if self.groups:
            fares = self.val.by_group(self.groups)
            columns |= {name: fares[name] for name in GROUP_COLUMNS}
            if config.fairness != "none":
                columns["penalty"] = fares["penalties"].get(config.fairness, math.nan)
        return columns


def group_columns(config: TrainConfig) -> tuple[str, ...]:
    """What the closing table of groups has a column of: the penalty, too, where one was trained."""
    return GROUP_COLUMNS if config.fairness == "none" else (*GROUP_COLUMNS, "penalty")


def summarise(results: list[RunResult], config: TrainConfig) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds: ``summary[loss][column]["mean" | "sd"]``."""
    summary: dict[str, Any] = {}
    for loss in config.loss:
        rows = [result.columns(config) for result in results if result.loss == loss]
        summary[loss] = {column: _mean_sd([row[column] for row in rows]) for column in rows[0]}
    return summary


def _mean_sd(values: list[float]) -> dict[str, float]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "sd": sd}
