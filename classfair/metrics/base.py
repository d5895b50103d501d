"""The base of the torchmetrics classes: statistics by group and class, exact over batches and processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.functional_stats import cross_entropy_with_stats
from classfair.metrics._labels import label_stats
from classfair.metrics._summed import SummedMetric
from classfair.statistics import BatchStats, rates
from classfair.statistics.batch import SUMMED


class ClassMetric(SummedMetric):
    """Base of every metric of counts and probability sums by group g and class c; subclasses say what to ``compute``.

    The states are those of a sum of :class:`classfair.BatchStats`: int64 ``count``, ``correct`` and ``predicted`` and
    float64 ``mass`` and ``hit``, of G * C numbers each, and int64 ``invalid`` and ``nonfinite``. They add up over
    batches and processes: batches of any size, empty ones and processes without a batch included, give what one batch
    of all samples gives. An update never waits for the device.

    Metrics with equal arguments have equal states, so that a ``torchmetrics.MetricCollection`` updates them once.

    Args:
        num_classes: C >= 1.
        num_groups: G >= 1; with 1, groups are not told apart: ``group`` is ignored and the groups of statistics are
            added up.
        preds: what ``update`` is given: ``"logits"``, ``"probabilities"`` (rows sum to 1) or ``"labels"`` (predicted
            classes; for metrics that need no probability).
        ignore_index: label of samples that count for nothing.
        kwargs: of ``torchmetrics.Metric``: ``sync_on_compute``, ``dist_sync_on_step``, ``process_group``, ....

    Raises:
        TypeError, ValueError: arguments of the wrong kind or range.

    Example:
        >>> class Errors(classfair.metrics.ClassMetric):
        ...     def compute(self):
        ...         return (self.count - self.correct).sum()
        >>> metric = Errors(num_classes=3)
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(1)
    """

    count: Tensor
    correct: Tensor
    predicted: Tensor
    mass: Tensor
    hit: Tensor
    invalid: Tensor
    nonfinite: Tensor

    _needs_probabilities = False

    def __init__(
        self,
        num_classes: int,
        num_groups: int = 1,
        *,
        preds: str = "logits",
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, preds=preds, ignore_index=ignore_index, **kwargs)
        check.check_size(self._name, "num_groups", num_groups)
        self.num_groups = num_groups
        self._check_probabilities(self._needs_probabilities)
        nothing = BatchStats.zeros(num_groups, num_classes)
        for name in SUMMED:
            self.add_state(name, getattr(nothing, name).clone(), dist_reduce_fx="sum")

    def _check_probabilities(self, needed: bool) -> None:
        if needed and self.preds == "labels":
            raise ValueError(f"{self._name}: expected preds 'logits' or 'probabilities', got 'labels'")

    def update(self, preds: Tensor | BatchStats, target: Tensor | None = None, group: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: ``(N, C)`` or ``(N, C, d1, ...)`` logits or probabilities, or int64 labels ``(N,)`` or
                ``(N, d1, ...)``, as the argument ``preds`` of the class says; or :class:`classfair.BatchStats`, alone.
            target: int64 labels ``(N,)`` or ``(N, d1, ...)`` in [0, C), or ``ignore_index``.
            group: int64 of the shape of ``target``, in [0, G), or -1: in no statistic. Needed where G > 1.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, shape, dtype or device.
            IndexError, ValueError: on the CPU, a label or group out of range, or a row said to be probabilities with a
                value outside [0, 1] or a sum that is off 1 by more than 0.001 (bfloat16: 0.008); on other devices the
                sample is left out and counted in ``invalid``.
        """
        if isinstance(preds, BatchStats):
            if target is not None or group is not None:
                raise ValueError(f"{self._name}: expected statistics alone, got target or group as well")
            self._check_statistics(preds)
            with torch.no_grad():
                self._add(preds)
            return
        if target is None:
            raise ValueError(f"{self._name}: expected target with preds, got None")
        if self.num_groups == 1:
            group = None
        elif group is None:
            raise ValueError(f"{self._name}: expected group with num_groups={self.num_groups}, got None")
        with torch.no_grad():
            self._add(self._statistics(preds, target, group))

    def update_from(self, stats: BatchStats) -> None:
        """Add a batch by the statistics of its loss, without a second pass over the logits.

        The same as ``update(stats)``, which is for a ``MetricCollection``. In several processes give each batch's own
        statistics, not those of ``all_reduce``: ``compute`` adds up those of all processes.

        Args:
            stats: of ``with_stats`` or ``cross_entropy_with_stats`` with this C, and G groups. With ``num_groups=1``
                any number of groups, which are added up; samples with group -1 are in none of them and do not count,
                unlike in ``update(preds, target)``, which ignores groups.

        Raises:
            TypeError, ValueError: no BatchStats, or of other C or G, or of all processes where ``compute`` adds up.
        """
        self._check_statistics(stats)
        self.update(stats)

    def _statistics(self, preds: Tensor, target: Tensor, group: Tensor | None, **options: Any) -> BatchStats:
        if self.preds == "labels":
            return label_stats(
                self._name,
                preds,
                target,
                group,
                num_classes=self.num_classes,
                num_groups=self.num_groups,
                ignore_index=self.ignore_index,
                **options,
            )
        self._check_scores(preds, target)
        logits = preds
        if group is not None:
            check.check_labels_tensor(self._name, "group", group, target.shape)
            check.check_device(self._name, "group", group, preds.device, self.preds)
        wrong = None
        if self.preds == "probabilities":
            counted = target != self.ignore_index
            wrong = self._wrong_probabilities(preds, counted if group is None else counted & (group != -1))
            target = torch.where(wrong, self.ignore_index, target)
            logits = preds.double().log()  # softmax(log p) = p; in float64 no two probabilities become one logit
        _, stats = cross_entropy_with_stats(
            logits,
            target,
            group=group,
            num_groups=self.num_groups,
            ignore_index=self.ignore_index,
            differentiable=False,
            **options,
        )
        return stats if wrong is None else replace(stats, invalid=stats.invalid + wrong.sum())

    def _check_scores(self, preds: Any, target: Any) -> None:
        """Logits or probabilities of this number of classes, with a label for each."""
        if not isinstance(preds, Tensor) or preds.dtype not in check.FLOATS:
            got = preds.dtype if isinstance(preds, Tensor) else type(preds).__name__
            raise TypeError(f"{self._name}: expected {self.preds} as a floating tensor, got {got}")
        if preds.dim() < 2 or preds.shape[1] != self.num_classes:
            raise ValueError(
                f"{self._name}: expected {self.preds} of shape (N, {self.num_classes}) or"
                f" (N, {self.num_classes}, d1, ...), got {tuple(preds.shape)}"
            )
        check.check_labels_tensor(self._name, "target", target, (preds.shape[0], *preds.shape[2:]))
        check.check_device(self._name, "target", target, preds.device, self.preds)

    def _wrong_probabilities(self, scores: Tensor, counted: Tensor) -> Tensor:
        """Which of the counted rows (N, ...) of scores (N, C, ...) are no probabilities; an error where one can look.

        A row with a NaN is not among them: it is not finite, whatever else it is.
        """
        total, least = scores.sum(1, dtype=torch.float64), scores.amin(1)
        tolerance = max(1e-3, torch.finfo(scores.dtype).eps)  # a softmax in bfloat16 is off by up to 0.002
        wrong = counted & ((least < 0) | ((total - 1).abs() > tolerance))  # a value above 1 shows in the sum
        if host_can_look(scores.device) and wrong.any():
            row = tuple(int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"{self._name}: expected probabilities in [0, 1] with sum 1 (logits are preds='logits'), got a row with"
                f" least value {least[row]:.4g} and sum {total[row]:.4g} at {row[0] if len(row) == 1 else row}"
            )
        return wrong

    def _add(self, stats: BatchStats) -> None:
        groups, classes = stats.count.shape
        if classes != self.num_classes or self.num_groups not in (1, groups):
            expected = (self.num_groups, self.num_classes)
            raise ValueError(f"{self._name}: expected statistics of shape {expected}, got {(groups, classes)}")
        check.check_device(self._name, "statistics", stats.count, self.count.device, "metric")
        if groups != self.num_groups:
            whole = {n: getattr(stats, n).sum(0, keepdim=True) for n in SUMMED if getattr(stats, n).dim()}
            stats = replace(stats, **whole)
        # Both are marked alike: whether statistics may be those of all processes has been checked.
        total = self.statistics() + replace(stats, synced=True)
        for name in SUMMED:
            setattr(self, name, getattr(total, name))  # a new tensor: members of a MetricCollection share the old one

    def accuracies(self) -> Tensor:
        """``(C,)``, or ``(G, C)`` where G > 1, float64 in [0, 1], NaN for classes without a sample."""
        return self._squeeze(rates.accuracies(self.correct, self.count))

    def statistics(self) -> BatchStats:
        """What has been added up so far, in this process; inside ``compute``, in all processes that it adds up.

        Marked as ``synced``, so that a penalty of them, in ``compute``, does not add up processes once more.
        """
        states = {name: getattr(self, name) for name in SUMMED}
        return BatchStats(**states, prediction=self.count.new_empty(0), synced=True)

    def _squeeze(self, value: Tensor) -> Tensor:  # (G, ...)
        return value.squeeze(0) if self.num_groups == 1 else value


def host_can_look(device: torch.device) -> bool:
    """Whether the values of a tensor can be read without waiting for its device."""
    return device.type == "cpu"
