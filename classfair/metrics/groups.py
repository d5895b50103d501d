"""Fairness between the groups of a sensitive attribute, for any number of classes and groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from classfair import _validate as check
from classfair.fairness import intersection_over_union
from classfair.metrics import _charts
from classfair.metrics.base import ClassMetric
from classfair.statistics import rates

REDUCTIONS = ("difference", "ratio", "by_group", "overall")


class _GroupMetric(ClassMetric):
    """Rates by group, reduced as fairlearn's MetricFrame does; a rate is NaN where it has no sample."""

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _choices: tuple[str, ...] = REDUCTIONS

    def __init__(
        self, num_classes: int, num_groups: int, *, reduction: str = "difference", soft: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, num_groups, **kwargs)
        check.check_choice(self._name, "reduction", reduction, self._choices)
        self.reduction, self.soft = reduction, soft
        self._check_probabilities(soft)

    def _rates(self, count: Tensor, chosen: Tensor, hit: Tensor) -> Tensor:
        """Rates ``(..., G, C)`` from (G, C) samples, samples predicted as c, and the correct ones of these."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        tables = self.count, *((self.mass, self.hit) if self.soft else (self.predicted, self.correct))
        if self.reduction == "overall":
            return self._rates(*(table.sum(0, keepdim=True) for table in tables)).squeeze(-2)
        by_group = self._rates(*tables)
        if self.reduction == "by_group":
            return by_group
        if self.num_classes == 2:
            by_group = by_group[..., 1:]  # the positive class, as fairlearn: the ratios of the other one differ
        return rates.between_groups(by_group, self.reduction)

    def _axis(self) -> str:
        return "class"


class DemographicParity(_GroupMetric):
    r"""Whether each class is predicted equally often in every group.

    The selection rate :math:`P(\hat y = c \mid g)` of a group is the share of its samples predicted as c, or with
    ``soft`` their mean probability of c. Two classes: equal to fairlearn's ``demographic_parity_difference`` and
    ``demographic_parity_ratio`` with class 1 as the positive one. More: the largest difference, or the smallest ratio,
    over the classes.

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.
        reduction: ``"difference"`` between the largest and the smallest rate, ``"ratio"`` of the smallest to the
            largest, ``"by_group"`` rates, or the ``"overall"`` ones.
        soft: probabilities instead of predictions.

    Returns:
        float64 in [0, 1]: a scalar, ``(G, C)`` for ``"by_group"``, ``(C,)`` for ``"overall"``. Groups without a sample
        are NaN and left out; so are from the ratio classes that nobody is predicted as. NaN if nothing is left, or
        fewer than two groups: no comparison is not a fair one.

    Example:
        >>> metric = classfair.metrics.DemographicParity(num_classes=2, num_groups=2, preds="labels")
        >>> preds, target, group = torch.tensor([1, 1, 0, 1]), torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
        >>> metric.update(preds, target, group)
        >>> metric.compute()  # of group 0 all, of group 1 one half
        tensor(0.5000, dtype=torch.float64)
    """

    def _rates(self, count: Tensor, chosen: Tensor, hit: Tensor) -> Tensor:
        return rates.selection_rates(count, chosen)


class EqualizedOdds(_GroupMetric):
    r"""Whether every group has the same true and false positive rates of each class (Hardt et al. 2016).

    Each class against the rest: :math:`\mathrm{TPR} = P(\hat y = c \mid y = c, g)` and
    :math:`\mathrm{FPR} = P(\hat y = c \mid y \ne c, g)`; with ``soft``, mean probabilities of c. Two classes: equal to
    fairlearn's ``equalized_odds_difference`` and ``equalized_odds_ratio`` with class 1 as the positive one, where
    every group has samples of both classes (elsewhere fairlearn counts an undefined rate as 0; here it is left out, and
    a rate that fewer than two groups have is not compared). More: the largest
    difference, or the smallest ratio, of both rates over the classes. This is what counts of O(G C) can tell;
    confusions of a class with particular others are averaged in its FPR.

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.
        reduction: ``"difference"``, ``"ratio"``, ``"by_group"`` or ``"overall"``, see :class:`DemographicParity`.
        soft: probabilities instead of predictions.

    Returns:
        float64 in [0, 1]: a scalar, ``(2, G, C)`` for ``"by_group"``, ``(2, C)`` for ``"overall"``, the TPR and then
        the FPR. Rates without a sample are NaN and left out, as are rates that fewer than two groups have; rates that
        are 0 in all groups are left out of the ratio. NaN if nothing is left.

    Example:
        >>> metric = classfair.metrics.EqualizedOdds(num_classes=2, num_groups=2, preds="labels")
        >>> preds, target, group = torch.tensor([1, 1, 0, 1]), torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
        >>> metric.update(preds, target, group)
        >>> metric.compute()  # FPR 1 and 0
        tensor(1., dtype=torch.float64)
    """

    def _rates(self, count: Tensor, chosen: Tensor, hit: Tensor) -> Tensor:
        return rates.odds_rates(count, chosen, hit)

    def _draw(self, value: Any, ax: Any) -> Any:
        if value.dim() == 0:
            return super()._draw(value, ax)
        if value.dim() == 2:
            return _charts.heat_map(value, ax, self._name, "class", "rate of all groups", ["TPR", "FPR"])
        rows = [f"{rate} {g}" for rate in ("TPR", "FPR") for g in range(self.num_groups)]
        return _charts.heat_map(value.flatten(0, 1), ax, self._name, "class", "rate of group", rows)


class GroupIoU(_GroupMetric):
    r"""Intersection over union of labels and predictions in each group, and its spread between groups.

    .. math:: \mathrm{IoU}_g = \frac{1}{|C_g|} \sum_{c \in C_g} \frac{I_{g,c}}{n_{g,c} + m_{g,c} - I_{g,c}}

    with n samples of class c, m predicted as c, I both, and C_g the classes with samples in group g; with ``soft`` m
    and I are sums of p(c|x) (Hänel et al. 2022, eq. 8-11). ``"std"`` is their σ_IOU, on predictions: the standard
    deviation over groups with Bessel's correction.

    Args:
        num_classes, num_groups, preds, ignore_index, kwargs: see :class:`ClassMetric`.
        reduction: ``"std"``, ``"difference"``, ``"ratio"``, ``"by_group"`` or ``"overall"`` (of all samples).
        soft: probabilities instead of predictions.

    Returns:
        float64: ``"by_group"`` ``(G,)``, else a scalar, in [0, 1]. Groups without a sample are NaN and left out;
        what compares fewer than two groups is NaN.

    Example:
        >>> metric = classfair.metrics.GroupIoU(num_classes=2, num_groups=2, preds="labels", reduction="by_group")
        >>> preds, target, group = torch.tensor([1, 1, 0, 1]), torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
        >>> metric.update(preds, target, group)
        >>> metric.compute()  # group 0: class 0 has 0, class 1 has 1/2
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """

    _choices = ("std", *REDUCTIONS)

    def __init__(self, num_classes: int, num_groups: int, *, reduction: str = "std", **kwargs: Any) -> None:
        super().__init__(num_classes, num_groups, reduction=reduction, **kwargs)

    def compute(self) -> Tensor:
        iou = intersection_over_union(self.statistics(), hard=not self.soft)
        if self.reduction == "overall":
            return iou.overall
        if self.reduction == "by_group":
            return iou.by_group
        if self.reduction == "std":
            return rates.spread(iou.by_group)
        return rates.between_groups(iou.by_group[:, None], self.reduction)

    def _axis(self) -> str:
        return "group"
