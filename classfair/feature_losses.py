"""Losses that look at features and classifier weights: ISDA, and MetaLAD with NISDA and the distance term in it."""

import warnings
from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from classfair import _validate as check
from classfair.functional import cross_entropy, cross_entropy_with_stats
from classfair.losses import CrossEntropyLoss, Keywords
from classfair.moments import ClassStatistics
from classfair.ops import LabelIndex, label_index
from classfair.pair import PairTerms, distance_margin, mean_class_distance, pair_variance
from classfair.priors import logit_adjustment
from classfair.statistics import BatchStats
from classfair.targets import MixedTarget

#: A perturbation beyond this many logits decides the loss by itself; it is reported where state is read anyway.
LARGE = 20.0

#: A (3, C, C) table of weights takes 12 C^2 bytes: 48 MB at this many classes.
MAX_PER_PAIR_CLASSES = 2000

TERMS = ("proportion", "variance", "distance")


class FeatureLoss(CrossEntropyLoss):
    """Base of the losses of ``(features, linear_weight, target)``: when they perturb, and when their state changes.

    Subclasses say what is added to the logits of a label: :meth:`pair`.
    """

    statistics: ClassStatistics
    largest: Tensor

    def __init__(
        self, num_classes: int, feature_dim: int, statistics: ClassStatistics | None, every: int, keywords: Keywords
    ) -> None:
        super().__init__(**keywords)
        name = type(self).__name__
        if statistics is None:
            statistics = ClassStatistics(num_classes, feature_dim)
        if not isinstance(statistics, ClassStatistics):
            raise TypeError(f"{name}: expected statistics as ClassStatistics, got {type(statistics).__name__}")
        if statistics.cov is None:
            raise ValueError(f"{name}: expected statistics with a covariance, got covariance='none'")
        if tuple(statistics.mean.shape) != (num_classes, feature_dim):
            raise ValueError(
                f"{name}: expected statistics of {num_classes} classes and {feature_dim} features,"
                f" got {tuple(statistics.mean.shape)}"
            )
        check.check_number(name, "every", every, 1)
        self.statistics = statistics
        self.every = every
        self.updates = 0
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def pair(self, linear_weight: Tensor, labels: Tensor) -> PairTerms:
        """What is added to the logits of each label."""
        raise NotImplementedError

    def absorbed(
        self, features: Tensor, linear_weight: Tensor, target: Tensor | MixedTarget, linear_bias: Tensor | None
    ) -> Tensor | None:
        """Perturbed logits without pair rows, where the raw ones are not wanted and there is a cheaper way."""
        return None

    def _index(self, labels: Tensor) -> LabelIndex:
        classes = self.statistics.mean.shape[0]
        return label_index(labels, classes, ignore_index=self.ignore_index, backend=self.backend)

    def _variance(self, linear_weight: Tensor, index: LabelIndex, *, normalize: bool = False) -> PairTerms:
        cov = self.statistics.cov
        assert cov is not None
        backend = self.backend if cov.dim() == 2 else None  # matrices are for plain torch
        pair = pair_variance(linear_weight, cov, index, normalize=normalize, backend=backend)
        assert isinstance(pair, PairTerms)
        return pair

    def forward(  # type: ignore[override]
        self,
        features: Tensor,
        linear_weight: Tensor,
        target: Tensor | MixedTarget,
        *,
        logits: Tensor | None = None,
        linear_bias: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """The loss; see the class for shapes. ``update=False`` leaves the state alone, as in virtual steps."""
        raw = logits is not None
        logits, arguments = self._prepare(features, linear_weight, target, logits, linear_bias, update, raw=raw)
        return cross_entropy(logits, target, **arguments)

    def with_stats(  # type: ignore[override]
        self,
        features: Tensor,
        linear_weight: Tensor,
        target: Tensor | MixedTarget,
        *,
        logits: Tensor | None = None,
        linear_bias: Tensor | None = None,
        update: bool = True,
        **options: Any,
    ) -> tuple[Tensor, BatchStats]:
        """The loss and the :class:`BatchStats` of the unperturbed logits, from one pass over them.

        ``options``: ``group``, ``num_groups``, ``joint``, ``label``, ``confusion``, ``differentiable``, ``penalty`` and
        ``penalty_weight`` of :func:`classfair.cross_entropy_with_stats`.
        """
        logits, arguments = self._prepare(features, linear_weight, target, logits, linear_bias, update, raw=True)
        return cross_entropy_with_stats(logits, target, **options, **arguments)

    def _prepare(
        self,
        features: Tensor,
        linear_weight: Tensor,
        target: Tensor | MixedTarget,
        logits: Tensor | None,
        linear_bias: Tensor | None,
        update: bool,
        *,
        raw: bool,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits and the arguments of the loss on them; ``raw`` where they have to be the unperturbed ones."""
        self._check(features, linear_weight, target)
        arguments = self._arguments()
        if self.active:
            if update:
                self._update(features, linear_weight, target)
            perturbed = None if raw else self.absorbed(features, linear_weight, target, linear_bias)
            if perturbed is not None:
                return perturbed, arguments
            arguments["pair"] = self.pair(linear_weight, _both(target))
        if logits is None:
            logits = F.linear(features, linear_weight, linear_bias)
        return logits, arguments

    def _check(self, features: Any, linear_weight: Any, target: Any) -> None:
        name, (num_classes, dim) = type(self).__name__, self.statistics.mean.shape
        rows = features.shape[0] if isinstance(features, Tensor) and features.dim() == 2 else -1
        check.check_floats(name, "features", features, (max(rows, 0), dim))
        check.check_floats(name, "linear_weight", linear_weight, (num_classes, dim))
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(f"{name}: expected hard labels or MixedTarget, got probabilities")

    @torch.no_grad()
    def _update(self, features: Tensor, linear_weight: Tensor, target: Tensor | MixedTarget) -> None:
        self.statistics.update(features, _major(target))
        if self.updates % self.every == 0:
            self._refresh(linear_weight, _both(target))
        self.updates += 1

    def _refresh(self, linear_weight: Tensor, labels: Tensor) -> None:
        """What needs doing only now and then."""
        largest = self.pair(linear_weight, labels).rows.abs().amax() if labels.numel() else self.largest.new_zeros(())
        torch.maximum(self.largest, largest.float(), out=self.largest)

    def get_extra_state(self) -> dict[str, int]:
        if self.largest > LARGE:  # whoever saves state waits for the device anyway
            warnings.warn(
                f"classfair: {type(self).__name__} perturbed logits by up to {float(self.largest):.3g}; beyond"
                f" {LARGE:g} the perturbation decides the loss alone: lower its strength",
                UserWarning,
                stacklevel=2,
            )
            self.largest.zero_()
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


def _both(target: Tensor | MixedTarget) -> Tensor:
    """Labels to make pair rows for: (N,), or (2N,) of a MixedTarget."""
    return torch.cat([target.y_a, target.y_b]) if isinstance(target, MixedTarget) else target


def _major(target: Tensor | MixedTarget) -> Tensor:
    """The label that the features of a mixture count for: that of the larger share, as in all statistics."""
    if not isinstance(target, MixedTarget):
        return target
    if not isinstance(target.lam, Tensor):
        return target.y_b if target.lam < 0.5 else target.y_a
    return torch.where(target.lam.to(target.y_a.device) < 0.5, target.y_b, target.y_a)


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
    State: ``strength`` ``()``, ``statistics``. No parameters. In evaluation, and without gradient, the loss is plain
    cross-entropy and no state changes. With an initialised process group the moments are those of all processes.

    Without ``logits`` and statistics, and with diagonal covariances, the term in :math:`w_y` moves into the features,
    :math:`z' = (h - \lambda v_y \circ w_y) W^\top + v_y (\tfrac{\lambda}{2} W \circ W)^\top` up to a constant per
    sample, which saves one matrix product of five.

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
        super().__init__(num_classes, feature_dim, statistics, 100, keywords)
        check.check_number("ISDALoss", "strength", strength, 0.0)
        self.register_buffer("strength", torch.tensor(float(strength)))

    def pair(self, linear_weight: Tensor, labels: Tensor) -> PairTerms:
        return (0.5 * self.strength) * self._variance(linear_weight, self._index(labels))

    def absorbed(
        self, features: Tensor, linear_weight: Tensor, target: Tensor | MixedTarget, linear_bias: Tensor | None
    ) -> Tensor | None:
        """Perturbed logits (N, C) up to a constant per sample, with one matrix product more than plain ones."""
        cov = self.statistics.cov
        if cov is None or cov.dim() != 2 or isinstance(target, MixedTarget):
            return None
        # Differences of rows are what counts: what all rows share would only cancel, with rounding errors.
        centred = linear_weight - linear_weight.mean(0, keepdim=True)  # (C, D)
        label = target.clamp(0, linear_weight.shape[0] - 1)  # rows that are ignored or invalid are so below, too
        scaled = (self.strength * cov[label]).to(features.dtype)  # (N, D)
        shifted = features - scaled * F.embedding(label, centred)
        logits = F.linear(shifted, centred, linear_bias)
        return torch.addmm(logits, scaled, (0.5 * centred.square()).T)


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
