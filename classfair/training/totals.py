"""Per-class statistics summed over an epoch, and what a finished run leaves of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classfair import metrics
from classfair.statistics import BatchStats, JointRows, effective_frequency
from classfair.statistics.batch import SUMMED
from classfair.training.config import TrainConfig
from classfair.training.distributed import Processes
from classfair.training.group_measures import GROUP_COLUMNS, measures

COLUMNS = ("many", "medium", "few", "all", "geometric_mean", "worst_class")
COUNTS = ("count", "correct", "predicted")
SUMS = ("mass", "hit")
CLASS_COLUMNS = (*COUNTS, *SUMS)
#: Of the table by label, named group and class that equalized odds of a whole set needs: C = 1000 with two groups fits.
MAX_TABLE_BYTES = 16 * 2**20


class Totals:
    """Sums over the images of an epoch, of all processes after :meth:`merge`. They stay on the device.

    ``stats`` has a row for each group, and a single one where ``groups`` is 0. ``groups`` counts images without a group
    as one more, the last; ``named`` does not, and is all of them unless told otherwise. ``joint`` is the table by
    label, named group and class that equalized odds of a whole set needs; it is None where nobody asked for it or it
    would take more than MAX_TABLE_BYTES.
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
        self.groups, self.named = groups, groups if named is None else named
        self.stats = BatchStats.zeros(max(groups, 1), num_classes, device)
        self.loss = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of their weights
        cells = num_classes * self.named
        fits = joint and cells and cells * num_classes * 8 <= MAX_TABLE_BYTES
        self.joint = torch.zeros(cells, num_classes, dtype=torch.float64, device=device) if fits else None

    @torch.no_grad()
    def add(self, loss: Tensor, weight: Tensor, stats: BatchStats) -> None:
        """Add a batch by the sum of its losses, the sum of their weights, and its statistics."""
        self.stats = self.stats + stats
        self.loss = self.loss + torch.stack([loss, weight])
        if self.joint is not None:
            assert stats.joint is not None
            label, group = stats.joint.cell // self.groups, stats.joint.cell % self.groups
            # Rows of images without a group are added as zeros, which unused rows are already.
            rows = stats.joint.rows.double().masked_fill((group >= self.named)[:, None], 0.0)
            self.joint.index_add_(0, label * self.named + group.clamp(max=self.named - 1), rows)

    def merge(self, processes: Processes) -> Totals:
        """Add up the sums of all processes, in place."""
        for name in SUMMED:
            processes.sum_(getattr(self.stats, name))
        for part in (self.loss, self.joint):
            if part is not None:
                processes.sum_(part)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        counts = torch.stack([getattr(self.stats, name) for name in COUNTS])  # (3, G, C)
        sums = torch.stack([getattr(self.stats, name) for name in SUMS])  # (2, G, C)
        state = {"counts": counts.sum(1), "sums": sums.sum(1), "loss": self.loss}
        if self.groups:
            state |= {"group_counts": counts, "group_sums": sums}
        return state if self.joint is None else {**state, "group_joint": self.joint}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Totals:
        joint, grouped = state.get("group_joint"), "group_counts" in state
        counts = state["group_counts"] if grouped else state["counts"][:, None]
        sums = state["group_sums"] if grouped else state["sums"][:, None]
        groups, num_classes = counts.shape[1:]
        named = None if joint is None else len(joint) // num_classes
        totals = cls(num_classes, groups=groups if grouped else 0, named=named)
        tables = dict(zip((*COUNTS, *SUMS), (*counts, *sums), strict=True))
        totals.stats = replace(totals.stats, **tables)
        totals.loss, totals.joint = state["loss"], None if joint is None else joint.clone()
        return totals

    @property
    def mean_loss(self) -> float:
        return float(self.loss[0] / self.loss[1])

    @property
    def count(self) -> NDArray[np.int64]:
        return self.stats.count.sum(0).cpu().numpy()

    @property
    def correct(self) -> NDArray[np.int64]:
        return self.stats.correct.sum(0).cpu().numpy()

    @property
    def predicted(self) -> NDArray[np.int64]:
        return self.stats.predicted.sum(0).cpu().numpy()

    @property
    def accuracy(self) -> NDArray[np.float64]:
        return metrics.per_class_accuracy(self.correct, self.count)

    @property
    def effective_frequency(self) -> NDArray[np.float64]:
        """Mean probability of the true class, (C,) ("Classes Are Not Equal", eq. 11); nan for absent classes."""
        return effective_frequency(self.stats).cpu().numpy()

    def by_group(self, names: list[str]) -> dict[str, Any]:
        """:func:`measures` of the named groups."""
        return measures(self._first_groups(len(names)))

    def _first_groups(self, groups: int) -> BatchStats:
        """Statistics of the first groups, as one batch, on the CPU."""
        stats = replace(self.stats, **{name: getattr(self.stats, name)[:groups].cpu() for name in CLASS_COLUMNS})
        if self.joint is None:
            return stats
        num_classes = self.joint.shape[1]
        rows = self.joint.view(num_classes, self.named, num_classes)[:, :groups].flatten(0, 1).cpu()
        return replace(stats, joint=JointRows(rows, torch.arange(len(rows)), torch.tensor(len(rows))))

    def summary(self, prefix: str, groups: list[str]) -> dict[str, float]:
        """Scalars of the epoch for logs."""
        accuracy = self.accuracy
        scalars = {
            f"{prefix}_loss": self.mean_loss,
            f"{prefix}_accuracy": float(self.correct.sum() / self.count.sum()),
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
        return _rows([getattr(self.stats, name).sum(0) for name in CLASS_COLUMNS])

    def group_rows(self) -> list[list[list[Any]]]:
        """For each group one row of CLASS_COLUMNS per class."""
        tables = [getattr(self.stats, name) for name in CLASS_COLUMNS]
        return [_rows(list(group)) for group in zip(*tables, strict=True)]


def _rows(columns: list[Tensor]) -> list[list[Any]]:
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


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
