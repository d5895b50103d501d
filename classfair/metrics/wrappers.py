"""Metrics made of other things: a function of statistics, the mean of a metric over batches."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from classfair.metrics._summed import SummedMetric
from classfair.metrics.base import ClassMetric
from classfair.statistics import BatchStats


class StatsMetric(ClassMetric):
    """Any function of :class:`classfair.BatchStats`, of all batches and processes together.

    For penalties, which a training loop knows of a batch only, and for metrics of your own.

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`; with ``preds="labels"`` ``mass``
            and ``hit`` are 0.
        function: from BatchStats (``prediction`` empty, ``joint`` and ``confusion`` None; ``mass`` and ``hit`` float64)
            to a tensor or a dict of tensors. To be pickled it must be a function of a module, no lambda.

    Returns:
        What the function returns: without a sample a penalty is 0 unless given ``empty="nan"``.

    Raises:
        TypeError: a function that cannot be called.
        ValueError: a function that fails on such statistics: it is called once, on those of no sample. Equalized odds
            of a whole set is :class:`EqualizedOdds`, ``soft=True`` for that of the probabilities;
            :func:`classfair.equalized_odds_loss` averaged over batches is torchmetrics' ``MeanMetric``, see
            ``docs/metrics.md``.

    Example:
        >>> metric = classfair.metrics.StatsMetric(3, classfair.effective_frequency)
        >>> metric.update(torch.zeros(2, 3), torch.tensor([0, 2]))
        >>> metric.compute()
        tensor([0.3333,    nan, 0.3333], dtype=torch.float64)
    """

    def __init__(
        self, num_classes: int, function: Callable[[BatchStats], Any], num_groups: int = 1, **kwargs: Any
    ) -> None:
        if not callable(function):
            raise TypeError(f"StatsMetric: expected function to be callable, got {type(function).__name__}")
        super().__init__(num_classes, num_groups, **kwargs)
        self.function = function
        try:
            function(self.statistics())
        except Exception as error:
            raise ValueError(
                "StatsMetric: expected a function of sums over batches, which keep no joint rows, predictions or"
                f" confusion matrix (for equalized odds: EqualizedOdds(soft=...)), got {type(error).__name__}: {error}"
            ) from error

    def compute(self) -> Any:
        return self.function(self.statistics())


class BatchAverage(SummedMetric):
    """Mean of a metric's value over batches, weighted by their samples, as some papers' tables have it.

    Hänel et al. 2022 report group metrics so. It depends on the size of the batches, and is biased upwards for
    anything that is a distance (of 256 samples of a fair model some groups differ by chance): for comparison with such
    tables only. A batch whose value is NaN, e.g. for lack of a group, is left out; their code counts it as 0.

    Args:
        metric: one of this package's metrics of statistics whose ``compute`` gives one tensor; it is copied.
        kwargs: of ``torchmetrics.Metric``.

    Returns:
        float64, of the shape of the metric's value.

    Raises:
        TypeError: a metric of another kind, or with a dict of values.

    Example:
        >>> metric = classfair.metrics.BatchAverage(classfair.metrics.BalancedAccuracy(num_classes=2))
        >>> metric.update(torch.eye(2), torch.tensor([0, 0]))
        >>> metric.update(torch.eye(2)[:1], torch.tensor([0]))
        >>> metric.compute()  # (2 * 0.5 + 1 * 1) / 3
        tensor(0.6667, dtype=torch.float64)
    """

    metric: ClassMetric
    total: Tensor
    weight: Tensor

    def __init__(self, metric: ClassMetric, **kwargs: Any) -> None:
        if not isinstance(metric, ClassMetric):
            raise TypeError(f"BatchAverage: expected a ClassMetric, got {type(metric).__name__}")
        super().__init__(metric.num_classes, preds=metric.preds, ignore_index=metric.ignore_index, **kwargs)
        self.metric = deepcopy(metric)
        self.metric.reset()
        self.metric.sync_on_compute = self.metric._to_sync = False  # each process on its own batch
        value = type(metric).compute(self.metric)  # of no sample, for its shape
        if not isinstance(value, Tensor):
            raise TypeError(f"BatchAverage: expected a metric with one tensor, got {type(value).__name__}")
        zero = torch.zeros_like(value, dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("weight", zero.clone(), dist_reduce_fx="sum")
        # Equal after one batch says nothing about the next: NaN equals nothing, so that no MetricCollection shares it.
        self.add_state("unlike_any_other", torch.tensor(torch.nan), dist_reduce_fx="max")

    def update(self, preds: Tensor | BatchStats, target: Tensor | None = None, group: Tensor | None = None) -> None:
        """Add a batch, as :meth:`ClassMetric.update`."""
        if isinstance(preds, BatchStats):
            self._check_statistics(preds)
        self.metric.reset()
        self.metric.update(preds, target, group)
        value = self.metric.compute().double()
        samples, defined = self.metric.count.sum(), ~value.isnan()
        self.total = self.total + torch.where(defined, value, 0.0) * samples
        self.weight = self.weight + defined * samples

    def update_from(self, stats: BatchStats) -> None:
        """Add a batch by its statistics, as :meth:`ClassMetric.update_from`."""
        self._check_statistics(stats)
        self.update(stats)

    def compute(self) -> Tensor:
        return self.total / self.weight
