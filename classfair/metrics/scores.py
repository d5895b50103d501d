"""Metrics of the scores themselves: ranking and calibration. They need the scores, not sums of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.metrics import _charts
from classfair.metrics.base import DIAGNOSTICS, SummedMetric, check_scores, wrong_probabilities
from classfair.statistics import BatchStats


class _ScoreMetric(SummedMetric):
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    invalid: Tensor
    nonfinite: Tensor

    def __init__(self, num_classes: int, *, preds: str = "logits", ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(num_classes, preds=preds, ignore_index=ignore_index, **kwargs)
        check.check_choice(self._name, "preds", preds, ("logits", "probabilities"))
        for name in DIAGNOSTICS:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor | None = None, group: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: ``(N, C)`` or ``(N, C, d1, ...)`` logits or probabilities, as ``preds`` of the class says.
            target: int64 ``(N,)`` or ``(N, d1, ...)``; always needed.
            group: ignored, for a ``MetricCollection`` with metrics of groups.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, shape, dtype or device; on the CPU, rows that are no
                probabilities, as :meth:`ClassMetric.update`.
        """
        self._add_rows(*self._rows(preds, target))

    def update_from(self, stats: BatchStats) -> None:
        """Not possible: statistics hold no scores.

        Raises:
            TypeError: always.
        """
        self._rows(stats, None)

    def _add_rows(self, scores: Tensor, target: Tensor) -> None:
        """Add scores (N, C) and labels (N,)."""
        raise NotImplementedError

    def _rows(self, preds: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Scores (N, C), classes last, and labels (N,)."""
        if isinstance(preds, BatchStats):
            raise TypeError(
                f"{self._name}: expected {self.preds}, got BatchStats, which hold sums of probabilities only"
            )
        if target is None:
            raise ValueError(f"{self._name}: expected target with preds, got None")
        scores = check_scores(self, preds, target)
        return scores.detach().movedim(1, -1).reshape(-1, self.num_classes), target.reshape(-1)

    def _counted(self, scores: Tensor, target: Tensor) -> Tensor:
        """Rows that count: neither ignored nor out of range, and finite. The others are counted."""
        wanted = target != self.ignore_index
        valid = wanted & (target >= 0) & (target < self.num_classes)
        if self.preds == "logits":  # -inf is a logit like any other, as long as not all are
            finite = scores.to(check.acc_dtype(scores)).logsumexp(1).isfinite()
        else:
            valid = valid & ~wrong_probabilities(self, scores, valid)
            finite = scores.isfinite().all(1)
        self.invalid = self.invalid + (wanted & ~valid).sum()
        self.nonfinite = self.nonfinite + (valid & ~finite).sum()
        return valid & finite


class AUROC(_ScoreMetric):
    """Area under the ROC curve: of p(1|x) for two classes, averaged over classes or pairs of classes for more.

    Values, averages and names are those of ``sklearn.metrics.roc_auc_score``. Exact, and therefore it keeps all scores:
    O(N C) memory. Logits are ranked by the log-odds of a class, in which a confident model has no ties where its
    probabilities round to 1. Rows that are ignored, not finite or labelled out of range are left out.

    Args:
        num_classes: C >= 2.
        multi_class: ``"ovr"``: each class against the rest; ``"ovo"``: each pair of classes on their own samples,
            O(C^2) curves, insensitive to class imbalance (Hand and Till 2001).
        average: ``"macro"`` or ``"weighted"`` by samples, over classes or pairs; ``"none"``: per class, ``"ovr"`` only.
        preds, ignore_index, kwargs: see :class:`ClassMetric`; no labels.

    Returns:
        float32 (float64 for float64 scores) in [0, 1]: a scalar, or ``(C,)`` for ``"none"``. A curve without positive
        or without negative samples is undefined: NaN, left out of averages.

    Example:
        >>> metric = classfair.metrics.AUROC(num_classes=2)
        >>> metric.update(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = True
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, *, multi_class: str = "ovr", average: str = "macro", **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        if num_classes < 2:
            raise ValueError(f"{self._name}: expected num_classes >= 2, got {num_classes}")
        check.check_choice(self._name, "multi_class", multi_class, ("ovr", "ovo"))
        averages = ("macro", "weighted", "none") if multi_class == "ovr" else ("macro", "weighted")
        check.check_choice(self._name, "average", average, averages)
        self.multi_class, self.average = multi_class, average
        self.add_state("scores", [], dist_reduce_fx="cat")  # (N * C,), flat: see _sync_dist
        self.add_state("labels", [], dist_reduce_fx="cat")

    def _add_rows(self, scores: Tensor, target: Tensor) -> None:
        counted = self._counted(scores, target)
        acc = check.acc_dtype(scores)
        if self.preds == "logits":  # of different samples; they do not compare as they are
            scores = _log_odds(scores.double())  # rounded only below: the order of the classes makes no difference
        self.scores.append(scores.to(acc).flatten())
        self.labels.append(torch.where(counted, target, -1))  # rows leave in compute: no wait for their number here

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A process without a batch would send a list that torchmetrics fills with a float tensor of one dimension,
        # and its peers would wait for ever: it sends what an empty batch leaves.
        if not self.labels:
            self.scores = [torch.zeros(0, device=self.device)]
            self.labels = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> Tensor:
        scores, target = self._gathered()
        if self.num_classes == 2 and self.average != "none":
            return _binary(scores[:, 1], target == 1)
        if self.multi_class == "ovo":
            return self._one_versus_one(scores, target)
        curves = torch.stack([_binary(scores[:, c], target == c) for c in range(self.num_classes)])
        if self.average == "none":
            return curves
        if self.average == "macro":
            return curves.nanmean()
        ones = torch.ones_like(target)
        return _weighted(curves, target.new_zeros(self.num_classes).scatter_add_(0, target, ones).to(curves))

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Scores (N, C) and labels (N,) of the rows that count; after a synchronisation the states are tensors."""
        scores: Any = self.scores
        labels: Any = self.labels
        if isinstance(labels, list):
            none = torch.zeros(0, device=self.device)
            scores, labels = torch.cat([*scores] or [none]), torch.cat([*labels] or [none.long()])
        counted = labels >= 0
        return scores.view(-1, self.num_classes)[counted], labels[counted]

    def _one_versus_one(self, scores: Tensor, target: Tensor) -> Tensor:
        curves, samples = [], []
        for a in range(self.num_classes):
            for b in range(a + 1, self.num_classes):
                pair = (target == a) | (target == b)
                own, other = target[pair] == a, target[pair] == b
                both = _binary(scores[pair, a], own), _binary(scores[pair, b], other)
                curves.append(torch.stack(both).mean())
                samples.append(pair.sum())
        weights = torch.stack(samples).to(scores.dtype)
        return torch.stack(curves).nanmean() if self.average == "macro" else _weighted(torch.stack(curves), weights)


def _log_odds(logits: Tensor) -> Tensor:
    """log p / (1 - p) of logits (N, C): in the order of p, but without end where p rounds to 1."""
    largest, top = logits.max(1, keepdim=True)
    others = logits.scatter(1, top, -torch.inf)
    ratio = (others - largest).exp()  # to the largest, which is left out: 0
    rest = (ratio.sum(1, keepdim=True) - ratio).clamp_min(0)  # of two classes exactly 0
    odds = logits - largest - rest.log1p()
    return odds.scatter(1, top, largest - others.logsumexp(1, keepdim=True))


def _binary(score: Tensor, positive: Tensor) -> Tensor:
    """Share of the pairs of a positive and a negative sample that are in order, ties by half; NaN without a pair."""
    levels, level = score.unique(return_inverse=True)
    positives, negatives = (level[rows].bincount(minlength=len(levels)) for rows in (positive, ~positive))
    twice = (positives * (2 * negatives.cumsum(0) - negatives)).sum()  # in integers
    return (twice.double() / (2 * positives.sum() * negatives.sum())).to(score.dtype)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    weights = weights * ~values.isnan()
    return (values.nan_to_num() * weights).sum() / weights.sum()


class CalibrationError(_ScoreMetric):
    r"""Difference between confidence and accuracy, over bins of confidence (Naeini et al. 2015, Guo et al. 2017).

    With samples sorted by the probability of their predicted class into ``n_bins`` bins of equal width, and
    :math:`\mathrm{acc}_b`, :math:`\mathrm{conf}_b`, :math:`w_b` accuracy, mean confidence and share of samples of a
    bin: ``"l1"`` :math:`\sum_b w_b |\mathrm{acc}_b - \mathrm{conf}_b|` (ECE), ``"l2"`` the root of the mean square,
    ``"max"`` the largest difference. Bins and norms are those of torchmetrics (a confidence of exactly 1 has its own
    bin), but the state is the bins instead of all confidences, in integers: exact over batches and processes.

    Args:
        num_classes: C >= 1.
        n_bins: B >= 1.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        per_class: a value for each predicted class, which needs O(C B) memory.
        preds, ignore_index, kwargs: see :class:`ClassMetric`; no labels.

    Returns:
        float64 in [0, 1]: a scalar, or ``(C,)`` per class; NaN without a sample (predicted as that class).

    Example:
        >>> metric = classfair.metrics.CalibrationError(num_classes=2, n_bins=2, preds="probabilities")
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> metric.compute()  # confidence 3/4, accuracy 1/2
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    count: Tensor
    correct: Tensor
    confidence: Tensor

    _UNIT = 2**32  # confidences are added up as multiples of 1 / 2^32: exact in any order, for up to 2^31 samples

    def __init__(
        self, num_classes: int, *, n_bins: int = 15, norm: str = "l1", per_class: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, **kwargs)
        check.check_size(self._name, "n_bins", n_bins)
        check.check_choice(self._name, "norm", norm, ("l1", "l2", "max"))
        self.n_bins, self.norm, self.per_class = n_bins, norm, per_class
        rows = num_classes if per_class else 1
        for name in ("count", "correct", "confidence"):
            self.add_state(name, torch.zeros(rows, n_bins + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def _add_rows(self, scores: Tensor, target: Tensor) -> None:
        counted = self._counted(scores, target).long()
        scores = scores.to(check.acc_dtype(scores))
        largest, prediction = scores.max(1)
        confidence = (largest - scores.logsumexp(1)).exp() if self.preds == "logits" else largest
        confidence = torch.where(counted > 0, confidence.clamp(0, 1), 0.0)
        edges = torch.linspace(0, 1, self.n_bins + 1, dtype=confidence.dtype, device=confidence.device)
        cell = torch.bucketize(confidence, edges, right=True) - 1
        if self.per_class:
            cell = cell + prediction * (self.n_bins + 1)
        amount = (confidence.double() * self._UNIT).round().long()
        for name, value in (
            ("count", counted),
            ("correct", counted * (prediction == target)),
            ("confidence", counted * amount),
        ):
            state = getattr(self, name)
            setattr(self, name, state + torch.zeros_like(state).view(-1).scatter_add_(0, cell, value).view_as(state))

    def compute(self) -> Tensor:
        # 0 / 0 of an empty bin is NaN and has weight 0.
        gap = ((self.correct - self.confidence.double() / self._UNIT) / self.count).nan_to_num().abs()
        weight = self.count / self.count.sum(1, keepdim=True).double()  # NaN without a sample
        if self.norm == "max":
            error = torch.where(weight.isnan(), weight, gap).amax(1)
        else:
            error = (weight * gap).sum(1) if self.norm == "l1" else (weight * gap.square()).sum(1).sqrt()
        return error if self.per_class else error.squeeze(0)

    def _draw(self, value: Any, ax: Any) -> Any:
        if value.dim() == 0:
            return super()._draw(value, ax)
        return _charts.bars(range(value.numel()), value, ax, "calibration error", "predicted class")
