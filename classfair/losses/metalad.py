"""Logit perturbation by class proportion, variance and distance: MetaLAD, with NISDA and the distance term in it."""

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from classfair import _validate as check
from classfair import backends
from classfair.losses._buffers import Keywords
from classfair.losses.base import FeatureLoss
from classfair.ops import LabelIndex, log_distance_ratio, pair_terms
from classfair.pair import BLOCK_NUMBERS, PairTerms
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
        distance_every: updates in which the distances of all classes, of which the mean is taken, are computed once.
            That costs C^2 D operations: the first update does it, each later one for C / distance_every classes.
        statistics: running moments of features by class, as in :class:`ISDALoss`.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape, gradients and evaluation as in :class:`ISDALoss`. ``omega`` is a buffer: trained on the training loss,
    the second weight would fall without end. A tensor that requires gradient may be put in its place.
    State: ``omega``, ``log_prior`` ``(C,)``, ``mean_distance`` ``()``, ``distances`` ``(2, C)``, and what
    :class:`ISDALoss` has besides its strength. No parameters.

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
    distances: Tensor

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
        super().__init__(num_classes, feature_dim, statistics, keywords)
        check.check_count("MetaLADLoss", "distance_every", distance_every)
        check.check_choice("MetaLADLoss", "per", per, ("scalar", "class", "pair"))
        if not terms or not set(terms) <= set(TERMS):
            raise ValueError(f"MetaLADLoss: expected terms among {', '.join(TERMS)}, got {', '.join(terms) or 'none'}")
        if len(omega) != 3:
            raise ValueError(f"MetaLADLoss: expected omega as three numbers, got {len(omega)}")
        weights = [check.scalar("MetaLADLoss", "omega", value, -math.inf, math.inf) for value in omega]
        start = torch.tensor(weights, dtype=torch.float32, device="cpu")
        if per == "pair" and num_classes > MAX_PER_PAIR_CLASSES:
            megabytes = 12 * num_classes**2 / 1e6
            raise ValueError(
                f"MetaLADLoss: expected per='scalar' or 'class' above {MAX_PER_PAIR_CLASSES} classes, got 'pair', whose"
                f" weights would take {megabytes:.0f} MB"
            )
        self.terms, self.paper_sign, self.distance_every = tuple(terms), paper_sign, int(distance_every)
        shape = {"scalar": (3,), "class": (3, num_classes), "pair": (3, num_classes, num_classes)}[per]
        self._register_constant("omega", start.view(3, *(1,) * (len(shape) - 1)), shape)
        self._register_constant("log_prior", log_prior)
        self._register_constant("mean_distance", 0.0)
        # Of each class the sum of its distances to the other classes seen, and their number, when last computed.
        self._register_constant("distances", 0.0, (2, num_classes))
        self._unmeasured = True

    def reset_parameters(self) -> None:
        """As that of the other losses; the distances are measured anew."""
        super().reset_parameters()
        self._unmeasured = True

    def pair(self, linear_weight: Tensor, index: LabelIndex) -> PairTerms:
        """Eq. 33 for the labels present, (M, C); 0 at c = y because each of its terms is."""
        terms = self.terms_of(linear_weight, index)
        rows = sum(self._omega(name, index.key_of_slot) * term for name, term in terms.items())
        assert isinstance(rows, Tensor)
        return PairTerms(rows, index.slot, index.key_of_slot, index.num_slots)

    def terms_of(self, linear_weight: Tensor, index: LabelIndex) -> dict[str, Tensor]:
        """The unweighted terms of eq. 33 for the labels of the index, (M, C) each."""
        label, terms = index.key_of_slot, {}
        if "proportion" in self.terms:
            relative = self.log_prior - self.log_prior[label, None]
            terms["proportion"] = -relative if self.paper_sign else relative
        if "variance" in self.terms:
            terms["variance"] = self.variance(linear_weight, index, normalize=True)
        if "distance" in self.terms:
            seen = self.statistics.count > 0
            squares = self._squares(label, index.num_slots)
            terms["distance"] = log_distance_ratio(squares, self.mean_distance, seen[label, None] & seen)
        return terms

    def _squares(self, label: Tensor, number: Tensor) -> Tensor:
        """Squared distances of the means of some classes to all, (M, C)."""
        mean = self.statistics.mean
        backend = backends.choose("pair_terms", mean.device, self.backend)
        square = pair_terms(mean, None, label, number, want_square=True, backend=backend).square
        assert square is not None
        return square

    def _omega(self, term: str, label: Tensor) -> Tensor:
        """The weight of a term for the labels: (), (M, 1) or (M, C)."""
        omega = self.omega[TERMS.index(term)]
        if omega.dim() == 0:
            return omega
        return omega[label, None] if omega.dim() == 1 else omega[label]

    @torch.no_grad()
    def refresh(self) -> None:
        """Distances of all classes at the first update, then of the next ones in turn; and the mean of all.

        No branch depends on the number of updates, which a compiled step would be compiled anew for.
        """
        if "distance" not in self.terms:
            return
        classes, device = self.distances.shape[1], self.distances.device
        if self._unmeasured:
            size = max(1, BLOCK_NUMBERS // classes)
            for begin in range(0, classes, size):
                self._measure(torch.arange(begin, min(begin + size, classes), device=device))
            self._unmeasured = False
        else:
            share = -(-classes // self.distance_every)
            self._measure((self.updates * share + torch.arange(share, device=device)) % classes)
        total, number = self.distances.sum(1)
        self.mean_distance.copy_(total / number.clamp_min(1))

    def _measure(self, label: Tensor) -> None:  # (K,)
        """The sums over all classes of the distances of some."""
        seen, device = self.statistics.count > 0, label.device  # (C,)
        square = self._squares(label, torch.full((), len(label), device=device))
        both = seen[label, None] & seen & (label[:, None] != torch.arange(len(seen), device=device))
        total = torch.where(both, square.sqrt(), 0).sum(1)
        self.distances.index_copy_(1, label, torch.stack([total, both.sum(1).to(total.dtype)]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Up to version 2 of the state only the mean of the distances was kept."""
        mean = state_dict.get(prefix + "mean_distance")
        if mean is not None and prefix + "distances" not in state_dict:
            ones = torch.ones_like(self.distances[0])
            state_dict[prefix + "distances"] = torch.stack([ones * mean.to(ones), ones])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._unmeasured = self.distances.is_meta or not bool(self.distances.any())
