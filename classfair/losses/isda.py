"""Implicit semantic data augmentation: features shifted within their class, in expectation."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from classfair import _validate as check
from classfair.losses._buffers import Keywords
from classfair.losses.base import FeatureLoss
from classfair.ops import LabelIndex
from classfair.pair import PairTerms
from classfair.statistics import ClassStatistics
from classfair.targets import MixedTarget


class ISDALoss(FeatureLoss):
    r"""Implicit semantic data augmentation: the expected loss (its upper bound) over features shifted within classes.

    With features shifted along :math:`\mathcal N(0, \lambda\Sigma_y)`, the logit of class c against that of the true
    class y grows by half of the variance that the classifier sees between them:

    .. math:: z'_c = z_c + \tfrac{\lambda}{2}\,(w_c - w_y)^\top \Sigma_y\, (w_c - w_y)

    Source: Wang et al. 2019, "Implicit Semantic Data Augmentation for Deep Networks", eq. 7; the factor 1/2 is theirs,
    in Wu et al. 2023 it is part of :math:`\lambda`.

    Args:
        num_classes: C.
        feature_dim: D.
        strength: :math:`\lambda \ge 0`. The authors ramp it from 0 to its full value over training
            (:class:`classfair.ISDARamp`): 0.5 with full covariances, 7.5 with diagonal ones, which leave out
            whatever features share.
        statistics: running moments of features by class; None makes diagonal ones. The loss updates them with every
            batch and then uses them. Two losses may share them if all but one are called with ``update=False``.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape: features ``(N, D)``, linear_weight ``(C, D)``, target ``(N,)`` int64 or :class:`MixedTarget`; optional logits
    ``(N, C)``, the model's own (else they are computed from ``linear_bias`` ``(C,)``).
    Gradients: features, linear_weight (through logits and perturbation), linear_bias, logits; every order. None
    through the covariances.
    State, tensors only: ``strength`` ``()``, ``statistics``, the number of ``updates`` and ``largest``, the largest
    perturbation since the state was last read, and so 0 in it. No parameters. In evaluation, and without gradient, the
    loss is plain cross-entropy and no state changes. With an initialised process group the moments are those of all
    processes.

    Without ``logits`` and statistics, with diagonal covariances and without half precision, the term in :math:`w_y`
    moves into the features, :math:`z' = (h - \lambda v_y \circ w_y) W^\top + v_y (\tfrac{\lambda}{2} W \circ W)^\top`
    up to a constant per sample, which saves one matrix product of five. Half precision, of the features or by
    autocast, does not have the range for it: perturbations are then float32 rows, as with ``logits``.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape or range.

    Example:
        >>> criterion = classfair.ISDALoss(num_classes=3, feature_dim=2, strength=1.0)
        >>> features, head = torch.randn(8, 2, requires_grad=True), torch.nn.Linear(2, 3)
        >>> target = torch.arange(8) % 3
        >>> loss = criterion(features, head.weight, target, linear_bias=head.bias)
        >>> bool(loss > torch.nn.functional.cross_entropy(head(features), target))
        True
    """

    strength: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        strength: float = 0.5,
        statistics: ClassStatistics | None = None,
        **keywords: Unpack[Keywords],
    ) -> None:
        super().__init__(num_classes, feature_dim, statistics, keywords)
        check.check_number("ISDALoss", "strength", strength, 0.0)
        self._register_constant("strength", float(strength))

    def pair(self, linear_weight: Tensor, index: LabelIndex) -> PairTerms:
        rows = self.variance(linear_weight, index) * (0.5 * self.strength)
        return PairTerms(rows, index.slot, index.key_of_slot, index.num_slots)

    def absorbed(
        self, features: Tensor, linear_weight: Tensor, target: Tensor | MixedTarget, linear_bias: Tensor | None
    ) -> Tensor | None:
        """Perturbed logits (N, C) up to a constant per sample, with one matrix product more than plain ones."""
        cov = self.statistics.cov
        if cov is None or cov.dim() != 2 or isinstance(target, MixedTarget) or _half(features):
            return None
        # Differences of rows are what counts: what all rows share would only cancel, with rounding errors.
        centred = linear_weight - linear_weight.mean(0, keepdim=True)  # (C, D)
        label = target.clamp(0, linear_weight.shape[0] - 1)  # rows that are ignored or invalid are so below, too
        scaled = (self.strength * cov[label]).to(features.dtype)  # (N, D), never in half precision
        own = F.embedding(label, centred)
        self._watch_some(scaled, own, centred)
        logits = F.linear(features - scaled * own, centred, linear_bias)
        return torch.addmm(logits, scaled, (0.5 * centred.square()).T)

    @torch.no_grad()
    def _watch_some(self, scaled: Tensor, own: Tensor, centred: Tensor) -> None:  # (N, D), (N, D), (C, D)
        """The perturbations of one sample by a few classes, others in every step; all of them are never formed."""
        if len(scaled) == 0:
            return
        row, few = (self.updates % len(scaled)).view(1), torch.arange(16, device=centred.device)
        gap = centred.index_select(0, (self.updates + few) % len(centred)) - own.index_select(0, row)
        self.watch(0.5 * (scaled.index_select(0, row) * gap.square()).sum(1))


def _half(features: Tensor) -> bool:
    """Whether products with the features are in half precision, whose range variances may leave."""
    return features.dtype.itemsize < 4 or torch.is_autocast_enabled(features.device.type)
