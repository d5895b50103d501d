"""Logit perturbation by class proportion, variance and distance: MetaLAD, with NISDA and the distance term in it."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.losses.base import FeatureLoss, Keywords
from classfair.ops import LabelIndex
from classfair.pair import PairTerms, distance_margin, mean_class_distance
from classfair.priors import logit_adjustment
from classfair.statistics import ClassStatistics

#: A (3, C, C) table of weights takes 12 C^2 bytes: 48 MB at this many classes.
MAX_PER_PAIR_CLASSES = 2000

TERMS = ("proportion", "variance", "distance")


class MetaLADLoss(FeatureLoss):
    r"""Logit perturbation by class proportion, class covariance and class distance.

    .. math:: z'_c = z_c + \omega_1 \log\frac{\pi_c}{\pi_y}
        + \omega_2 \frac{(w_c - w_y)^\top \Sigma_y (w_c - w_y)}{\lVert w_c - w_y \rVert^2}
        + \omega_3 \log\frac{\bar\Delta}{\Delta_{yc}}, \qquad c \ne y

    with :math:`\Delta_{yc}` the distance of class means and :math:`\bar\Delta` its mean over all pairs of classes seen.
    The second term alone is NISDA, the third alone the distance loss; the first alone is logit adjustment (tau = 1).
    Source: Wu et al. 2023, "Rethinking Class Imbalance in Machine Learning", eq. 28 to 33. Their first term is printed
    with the opposite sign, which punishes frequent classes' rivals and contradicts their eq. 24: ``paper_sign``.

    NISDA's term is not invariant to scale: features times k and weights over k leave logits alone and multiply it by
    k squared. Choose :math:`\omega_2` for the scale of your features.

    Args:
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence.
        feature_dim: D.
        omega: the three weights to begin with.
        per: ``"class"`` gives each true class its own weights ``(3, C)``, ``"scalar"`` all the same ``(3,)``,
            ``"pair"`` each pair ``(3, C, C)``, for up to 2000 classes.
        terms: which of "proportion", "variance" and "distance" there are; the others cost nothing.
        paper_sign: the first term as printed.
        distance_every: updates between two computations of the mean distance, which costs C^2 D operations.
        statistics: running moments of features by class, as in :class:`ISDALoss`.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape, gradients and evaluation as in :class:`ISDALoss`. ``omega`` is a buffer: trained on the training loss,
    the second weight would fall without end. A tensor that requires gradient may be put in its place.
    State: ``omega``, ``log_prior`` ``(C,)``, ``mean_distance`` ``()``, ``statistics``. No parameters.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape or range; ``per="pair"`` above 2000 classes, with the
            memory it would take.

    Example:
        >>> criterion = classfair.MetaLADLoss([90, 10], feature_dim=2)
        >>> features, head = torch.randn(8, 2, requires_grad=True), torch.nn.Linear(2, 2)
        >>> loss, stats = criterion.with_stats(features, head.weight, torch.arange(8) % 2, linear_bias=head.bias)
        >>> loss.backward()
        >>> criterion.omega.shape, stats.count.tolist()
        (torch.Size([3, 2]), [[4, 4]])
    """

    omega: Tensor
    log_prior: Tensor
    mean_distance: Tensor

    def __init__(
        self,
        class_counts: Any,
        feature_dim: int,
        *,
        omega: Sequence[float] = (1.0, 1.0, 1.0),
        per: str = "class",
        terms: Sequence[str] = TERMS,
        paper_sign: bool = False,
        distance_every: int = 100,
        statistics: ClassStatistics | None = None,
        **keywords: Unpack[Keywords],
    ) -> None:
        log_prior = logit_adjustment(class_counts)
        num_classes = log_prior.numel()
        super().__init__(num_classes, feature_dim, statistics, distance_every, keywords)
        check.check_choice("MetaLADLoss", "per", per, ("scalar", "class", "pair"))
        if not terms or not set(terms) <= set(TERMS):
            raise ValueError(f"MetaLADLoss: expected terms among {', '.join(TERMS)}, got {', '.join(terms) or 'none'}")
        if len(omega) != 3:
            raise ValueError(f"MetaLADLoss: expected omega as three numbers, got {len(omega)}")
        if per == "pair" and num_classes > MAX_PER_PAIR_CLASSES:
            megabytes = 12 * num_classes**2 / 1e6
            raise ValueError(
                f"MetaLADLoss: expected per='scalar' or 'class' above {MAX_PER_PAIR_CLASSES} classes, got 'pair', whose"
                f" weights would take {megabytes:.0f} MB"
            )
        self.terms, self.paper_sign = tuple(terms), paper_sign
        shape = {"scalar": (3,), "class": (3, num_classes), "pair": (3, num_classes, num_classes)}[per]
        start = torch.tensor([float(value) for value in omega]).view(3, *(1,) * (len(shape) - 1))
        self.register_buffer("omega", start.expand(shape).clone())
        self.register_buffer("log_prior", log_prior)
        self.register_buffer("mean_distance", torch.zeros(()))

    def pair(self, linear_weight: Tensor, labels: Tensor) -> PairTerms:
        """Eq. 33 for the labels present, (M, C); 0 at c = y because each of its terms is."""
        index = self._index(labels)
        label = index.key_of_slot  # (M,)
        terms: dict[str, Tensor] = {}
        if "proportion" in self.terms:
            relative = self.log_prior - self.log_prior[label, None]
            terms["proportion"] = -relative if self.paper_sign else relative
        if "variance" in self.terms:
            terms["variance"] = self._variance(linear_weight, index, normalize=True).rows
        if "distance" in self.terms:
            terms["distance"] = self._distance(index).rows
        rows = sum(self._omega(name, label) * term for name, term in terms.items())
        assert isinstance(rows, Tensor)
        return PairTerms(rows, index.slot, label, index.num_slots)

    def _distance(self, index: LabelIndex) -> PairTerms:
        mean, seen = self.statistics.mean, self.statistics.count > 0
        pair = distance_margin(mean, index, seen=seen, mean_distance=self.mean_distance, backend=self.backend)
        assert isinstance(pair, PairTerms)
        return pair

    def _omega(self, term: str, label: Tensor) -> Tensor:
        """The weight of a term for the labels: (), (M, 1) or (M, C)."""
        omega = self.omega[TERMS.index(term)]
        if omega.dim() == 0:
            return omega
        return omega[label, None] if omega.dim() == 1 else omega[label]

    def _refresh(self, linear_weight: Tensor, labels: Tensor) -> None:
        if "distance" in self.terms:
            mean, seen = self.statistics.mean, self.statistics.count > 0
            self.mean_distance.copy_(mean_class_distance(mean, seen=seen, backend=self.backend))
        super()._refresh(linear_weight, labels)
