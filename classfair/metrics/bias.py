"""Which classes a model prefers: probability received and earned, false positives, confusions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.functional_stats import MAX_CONFUSION_CLASSES
from classfair.metrics import _charts
from classfair.metrics._inputs import as_class_counts
from classfair.metrics.base import ClassMetric
from classfair.statistics import NORMALIZE, BatchStats, prediction_bias, rates


def one_group(name: str, kwargs: dict[str, Any]) -> int:
    """1, and without ``num_groups`` in ``kwargs``: of metrics that do not tell groups apart."""
    groups = kwargs.pop("num_groups", 1)
    if groups != 1:
        raise ValueError(f"{name}: expected num_groups=1 (groups are not told apart), got {groups}")
    return 1


class PredictionBias(ClassMetric):
    """Probability that each class receives from samples of other classes, and from its own (Cui et al. 2024).

    ``negative[c] = sum of p(c|x) over samples of other classes`` = mass - hit (their G_n), ``positive[c] = sum of
    p(c|x) over its own`` = hit (G_p). On balanced data classes with much negative mass are the ones a model prefers, at
    the cost of the others. :func:`classfair.prediction_bias` is the same of statistics.

    Args:
        num_classes, num_groups, ignore_index, kwargs: see :class:`ClassMetric`.
        preds: ``"logits"`` or ``"probabilities"``.
        normalize: ``"none"``: sums; ``"sum"``: each of the two adds up to 1 over the classes; ``"samples"``: sums
            divided by the number of samples, so that both together add up to 1.

    Returns:
        dict of ``negative`` and ``positive``, float64 ``(C,)``, or ``(G, C)`` where G > 1, >= 0; NaN where the
        divisor is 0.

    Example:
        >>> metric = classfair.metrics.PredictionBias(num_classes=2, preds="probabilities", normalize="samples")
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> metric.compute()["negative"]
        tensor([0.2500, 0.1250], dtype=torch.float64)
    """

    _needs_probabilities = True

    def __init__(self, num_classes: int, num_groups: int = 1, *, normalize: str = "none", **kwargs: Any) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        check.check_choice(self._name, "normalize", normalize, NORMALIZE)
        self.normalize = normalize

    def compute(self) -> dict[str, Tensor]:
        bias = prediction_bias(self.statistics(), normalize=self.normalize, by_group=True)
        return {name: self._squeeze(value) for name, value in bias._asdict().items()}

    def _draw(self, value: Any, ax: Any) -> Any:
        negative = value["negative"]
        if negative.dim() == 1:
            return _charts.bars(range(negative.numel()), negative, ax, "probability from other classes", "class")
        return super()._draw(negative, ax)


class EffectiveFrequency(ClassMetric):
    """Mean probability that the samples of a class give to it, ``hit_c / count_c`` (Cui et al. 2024, eq. 11).

    To be measured on validation data; :func:`classfair.effective_counts` makes class counts of it.

    Args:
        num_classes, num_groups, ignore_index, kwargs: see :class:`ClassMetric`.
        preds: ``"logits"`` or ``"probabilities"``.

    Returns:
        float64 ``(C,)``, or ``(G, C)`` where G > 1, in [0, 1]; NaN for classes without a sample.

    Example:
        >>> metric = classfair.metrics.EffectiveFrequency(num_classes=2, preds="probabilities")
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor([0.6250,    nan], dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _needs_probabilities = True

    def compute(self) -> Tensor:
        return self._squeeze(self.hit / self.count)


class CumulativeFalsePositives(ClassMetric):
    """False positives summed over the classes from the most to the least frequent one, and how far that bends.

    With FP_k = predicted_k - correct_k and classes by training images from many to few (ties by class id), F(j) is the
    sum of FP_k over k <= j. A straight line confuses without regard to frequency; the area, mean over j of F(j) / F(C)
    - j / C, is above 0 where frequent classes take more than their share and below 0 where rare ones do (Kim et al.
    2021; the area is ours).

    Args:
        train_count: ``(C,)`` training images per class; tensor, array or sequence. It says what C is.
        preds, ignore_index, kwargs: see :class:`ClassMetric`; groups are not told apart.

    Returns:
        dict of ``curve``, int64 ``(C,)``, and ``area``, a float64 scalar in (-1, 1), NaN without a false positive.

    Example:
        >>> metric = classfair.metrics.CumulativeFalsePositives([500, 50, 5], preds="labels")
        >>> metric.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 2, 2]))
        >>> metric.compute()["curve"]
        tensor([2, 3, 3])
    """

    order: Tensor

    def __init__(self, train_count: Any, **kwargs: Any) -> None:
        name = "CumulativeFalsePositives"
        counts = as_class_counts(train_count, name, "train_count")
        super().__init__(counts.numel(), one_group(name, kwargs), **kwargs)
        self.register_buffer("order", rates.frequency_order(counts), persistent=False)

    def compute(self) -> dict[str, Tensor]:
        curve, area = rates.false_positive_curve(self.predicted[0], self.correct[0], self.order)
        return {"curve": curve, "area": area}

    def _draw(self, value: Any, ax: Any) -> Any:
        return _charts.against_line(value["curve"], value["area"], ax)


class ConfusionMatrix(ClassMetric):
    """Who is taken for whom: samples by true and predicted class, all groups together.

    The one metric here that needs O(C^2) memory, therefore refused above 4096 classes.

    Args:
        num_classes, preds, ignore_index, kwargs: see :class:`ClassMetric`. Statistics must have been made with
            ``confusion=True``.

    Returns:
        int64 ``(C, C)``, rows true, columns predicted.

    Raises:
        ValueError: also where C is above 4096.

    Example:
        >>> metric = classfair.metrics.ConfusionMatrix(num_classes=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor([[1, 0],
                [1, 0]])
    """

    confusion: Tensor

    def __init__(self, num_classes: int, *, preds: str = "logits", **kwargs: Any) -> None:
        check.check_size(type(self).__name__, "num_classes", num_classes)
        if num_classes > MAX_CONFUSION_CLASSES:
            raise ValueError(
                f"{type(self).__name__}: expected at most {MAX_CONFUSION_CLASSES} classes, got {num_classes}"
                f" ({8 * num_classes**2 / 1e9:.1f} GB); every other metric needs O(C)"
            )
        super().__init__(num_classes, one_group(type(self).__name__, kwargs), preds=preds, **kwargs)
        zero = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", zero, dist_reduce_fx="sum")

    def _statistics(self, preds: Tensor, target: Tensor, group: Tensor | None, **options: Any) -> BatchStats:
        return super()._statistics(preds, target, group, confusion=True, **options)

    def _add(self, stats: BatchStats) -> None:
        if stats.confusion is None:
            raise ValueError(f"{self._name}: expected statistics made with confusion=True, got none")
        super()._add(stats)
        self.confusion = self.confusion + stats.confusion

    def compute(self) -> Tensor:
        return self.confusion

    def _draw(self, value: Any, ax: Any) -> Any:
        share = value.double() / value.sum(1, keepdim=True)
        return _charts.heat_map(share, ax, "share of the true class", "predicted class", "true class")
