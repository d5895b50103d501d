"""Accuracy of the classes, its mean, extremes and intervals."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from classfair.metrics import _charts
from classfair.metrics._inputs import check_eps, normal_quantile
from classfair.metrics.base import ClassMetric
from classfair.statistics import rates


class _Accuracy(ClassMetric):
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0


class PerClassAccuracy(_Accuracy):
    """Accuracy of every class, with confidence intervals if asked for.

    ``correct_c / count_c``. With ``confidence`` also Wilson's interval (Wilson 1927): 50 images per class leave about
    14 points on either side of 50 %, so that many a "worst class" is chance.

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.
        confidence: level in (0, 1) of the intervals, e.g. 0.95; None: no intervals.

    Returns:
        float64 ``(C,)``, or ``(G, C)`` where G > 1, in [0, 1], NaN for classes without a sample; with ``confidence`` a
        dict of these, ``accuracy``, ``lower``, ``upper``. ``plot`` draws the intervals, where G > 1 none.

    Example:
        >>> metric = classfair.metrics.PerClassAccuracy(num_classes=3)
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor([1.0000, 0.5000,    nan], dtype=torch.float64)
    """

    def __init__(
        self, num_classes: int, num_groups: int = 1, *, confidence: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        self.confidence = confidence
        self._z = None if confidence is None else normal_quantile(self._name, confidence)

    def compute(self) -> Tensor | dict[str, Tensor]:
        accuracy = self.accuracies()
        if self._z is None:
            return accuracy
        lower, upper = rates.wilson_bounds(accuracy, self._squeeze(self.count), self._z)
        return {"accuracy": accuracy, "lower": lower, "upper": upper}

    def _draw(self, value: Any, ax: Any) -> Any:
        if isinstance(value, dict):
            if value["accuracy"].dim() == 1:
                return _charts.intervals(value, ax, self._name)
            value = value["accuracy"]
        return super()._draw(value, ax)


class BalancedAccuracy(_Accuracy):
    """Mean of the class accuracies, classes without a sample left out (Brodersen et al. 2010).

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.

    Returns:
        float64 scalar, or ``(G,)`` where G > 1, in [0, 1]; NaN without a sample.

    Example:
        >>> metric = classfair.metrics.BalancedAccuracy(num_classes=3)
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        return rates.mean(self.accuracies())


class WorstClassAccuracy(_Accuracy):
    """Accuracy of the worst class (Cui et al. 2024, Table 1).

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.

    Returns:
        float64 scalar, or ``(G,)`` where G > 1, in [0, 1]; NaN without a sample.

    Example:
        >>> metric = classfair.metrics.WorstClassAccuracy(num_classes=3)
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        return rates.worst(self.accuracies())


class BestClassAccuracy(_Accuracy):
    """Accuracy of the best class (Cui et al. 2024, Table 1).

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.

    Returns:
        float64 scalar, or ``(G,)`` where G > 1, in [0, 1]; NaN without a sample.

    Example:
        >>> metric = classfair.metrics.BestClassAccuracy(num_classes=3)
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        return rates.best(self.accuracies())


class GeometricMeanAccuracy(_Accuracy):
    """Geometric mean of the class accuracies, exact zeros as ``eps`` (Kim et al. 2021).

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.
        eps: what stands for an accuracy of exactly 0, in (0, 1].

    Returns:
        float64 scalar, or ``(G,)`` where G > 1, in (0, 1]; NaN without a sample.

    Example:
        >>> metric = classfair.metrics.GeometricMeanAccuracy(num_classes=3)
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()  # sqrt(1 * 0.5)
        tensor(0.7071, dtype=torch.float64)
    """

    def __init__(self, num_classes: int, num_groups: int = 1, *, eps: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        check_eps(self._name, eps)
        self.eps = eps

    def compute(self) -> Tensor:
        return rates.geometric_mean(self.accuracies(), self.eps)
