"""Drop-in losses that are vectors on top of :func:`classfair.cross_entropy`."""

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from classfair import _validate as check
from classfair._state import KeepsPrecision
from classfair.functional import cross_entropy, cross_entropy_with_stats
from classfair.priors import effective_number_weights, ldam_margins, logit_adjustment
from classfair.statistics import BatchStats
from classfair.targets import MixedTarget, total_weight

_PERTURBATIONS = ("reweight", "offset", "margin")


class Keywords(TypedDict, total=False):
    """What every loss takes, as :class:`CrossEntropyLoss` does."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    backend: str | None


class CrossEntropyLoss(KeepsPrecision):
    """:class:`torch.nn.CrossEntropyLoss` with per-class statistics from the same pass.

    In evaluation (``criterion.eval()``, or under ``no_grad`` or ``inference_mode``) the losses built on this class
    compute plain cross-entropy: ``offset``, ``margin``, ``gamma`` and ``reweight`` are for training only; ``weight``,
    the user's, keeps torch's meaning everywhere.

    Args:
        weight: ``(C,)`` class weights >= 0, a buffer.
        ignore_index, reduction, label_smoothing: as in :func:`classfair.cross_entropy`.
        backend: as in :func:`classfair.cross_entropy`.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; target as in :func:`classfair.cross_entropy`.
    State: ``weight`` and ``reweight``, each ``(C,)`` or None. ``reweight`` are class weights for training, multiplied
    with ``weight``; :class:`ClassBalancedLoss` and :class:`DeferredReweighting` set them. Both load as they were saved,
    None included. No parameters. ``half()`` and ``to(bfloat16)`` do not round the state.

    Raises:
        TypeError, ValueError: a weight that is no floating vector; a reduction or label_smoothing out of range.

    Example:
        >>> criterion = classfair.CrossEntropyLoss(label_smoothing=0.1)
        >>> loss, stats = criterion.with_stats(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]))
        >>> stats.count.tolist()
        [[2, 1, 1]]
    """

    _version = 2  # from 2 on a weight that the state does not have was None

    weight: Tensor | None
    reweight: Tensor | None
    offset: Tensor | None
    margin: Tensor | None
    _place: Tensor

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check.check_choice(name, "reduction", reduction, check.REDUCTIONS)
        check.check_number(name, "label_smoothing", label_smoothing, 0.0, 1.0)
        if weight is not None:
            check.check_floats(name, "weight", weight, (weight.numel() if isinstance(weight, Tensor) else 0,))
        self.register_buffer("weight", weight)
        for vector in _PERTURBATIONS:
            self.register_buffer(vector, None)
        # Knows the device of the module where nothing else is there to know it.
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self.gamma = 0.0
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.own: tuple[str, ...] = ()  # vectors that the loss makes itself, for `Warmup` to ramp
        self.ramped = False  # `Warmup` does

    def put(self, name: str, vector: Tensor | None) -> None:
        """Set ``reweight``, ``offset`` or ``margin`` to a copy; in place where there is one, so as not to recompile."""
        old = getattr(self, name)
        if vector is None:
            setattr(self, name, None)
        elif old is not None and old.shape == vector.shape:
            old.copy_(vector)
        else:
            for other in ("weight", *_PERTURBATIONS):
                present = getattr(self, other)
                if other != name and present is not None and present.shape != vector.shape:
                    wanted = f"{name} of the shape of {other}, {tuple(present.shape)}"
                    raise ValueError(f"{type(self).__name__}: expected {wanted}, got {tuple(vector.shape)}")
            setattr(self, name, vector.detach().to(self._place.device, copy=True))

    def _make_own(self, name: str, vector: Tensor) -> None:
        self.put(name, vector)
        self.own += (name,)

    def perturbation(self) -> dict[str, Any]:
        """Keyword arguments of :func:`classfair.cross_entropy` that apply in training only."""
        weight = self.weight
        if self.reweight is not None:
            weight = self.reweight if weight is None else weight * self.reweight
        return {"offset": self.offset, "margin": self.margin, "gamma": self.gamma, "weight": weight}

    @property
    def active(self) -> bool:
        """Whether the loss perturbs, as in training; else it is plain cross-entropy."""
        return self.training and torch.is_grad_enabled()

    def _arguments(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "backend": self.backend,
            **(self.perturbation() if self.active else {}),
        }

    def forward(self, logits: Tensor, target: Tensor | MixedTarget) -> Tensor:
        """The loss; shapes as in :func:`classfair.cross_entropy`."""
        return cross_entropy(logits, target, **self._arguments())

    def with_stats(
        self,
        logits: Tensor,
        target: Tensor | MixedTarget,
        *,
        group: Tensor | None = None,
        num_groups: int | None = None,
        joint: bool | str = False,
        **options: Any,
    ) -> tuple[Tensor, BatchStats]:
        """The loss and the :class:`BatchStats` of the same pass, as :func:`classfair.cross_entropy_with_stats`.

        ``options``: its ``label``, ``confusion``, ``differentiable``, ``penalty`` and ``penalty_weight``.
        """
        options |= {"group": group, "num_groups": num_groups, "joint": joint}
        return cross_entropy_with_stats(logits, target, **options, **self._arguments())

    def total_weight(self, target: Tensor | MixedTarget) -> Tensor:
        """What "mean" divides by, as :func:`classfair.total_weight` with the weights that :meth:`forward` would use."""
        return total_weight(target, weight=self._arguments()["weight"], ignore_index=self.ignore_index)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Weights come and go with the state: a schedule may have set them there, or here."""
        for name in ("weight", "reweight"):
            saved, here = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and here is None:
                setattr(self, name, torch.empty_like(saved, device=self._place.device))
            elif saved is None and local_metadata.get("version", 0) >= 2:  # this loss was saved, and without
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class LogitAdjustedLoss(CrossEntropyLoss):
    r"""Cross-entropy on :math:`z_c + \tau \log \pi_c`: every class costs the same, however rare it is.

    In evaluation it is plain cross-entropy; ``model(x).argmax(1)`` is the prediction, without any adjustment.
    Source: Menon et al. 2021, eq. 10 (tau = 1: also known as balanced softmax, Ren et al. 2020).

    Args:
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence, see
            :func:`classfair.class_counts`.
        tau: strength.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; target as in :func:`classfair.cross_entropy`.
    State: ``offset`` ``(C,)``, a buffer. No parameters.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension.

    Example:
        >>> criterion = classfair.LogitAdjustedLoss([90, 10])
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> round(criterion(logits, torch.tensor([1])).item(), 4)  # -log 0.1
        2.3026
    """

    def __init__(self, class_counts: Any, tau: float = 1.0, **keywords: Unpack[Keywords]) -> None:
        super().__init__(**keywords)
        self.tau = tau
        self._make_own("offset", logit_adjustment(class_counts, tau))

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"


class LDAMLoss(CrossEntropyLoss):
    r"""Label-distribution-aware margins: :math:`s\,m_y` off the true logit, :math:`m_c \propto n_c^{-1/4}`.

    Made for a cosine head, whose logits :math:`z_c = s \cos\theta_c` carry the scale already:
    :math:`s(\cos\theta_y - m_y) = z_y - s\,m_y`. ``scale`` must be that head's; for an ordinary linear head it is 1,
    and the margins are distances between logits. In evaluation it is plain cross-entropy.
    Source: Cao et al. 2019, section 3.2; with :class:`DeferredReweighting` it is LDAM-DRW.

    Args:
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence.
        max_margin: margin >= 0 of the rarest class, as a difference of cosines.
        scale: s > 0 of the head.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; labels or :class:`MixedTarget` (probabilities have no true class).
    State: ``margin`` ``(C,)``, a buffer: ``scale * ldam_margins(class_counts, max_margin)``. No parameters.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension; max_margin or scale out of
            range.

    Example:
        >>> criterion = classfair.LDAMLoss([10000, 1], scale=10.0)
        >>> criterion.margin.tolist()
        [0.5, 5.0]
        >>> cosine = torch.tensor([[0.2, 0.9]], requires_grad=True)
        >>> round(criterion(10 * cosine, torch.tensor([1])).item(), 4)  # log(1 + exp(2 - (9 - 5)))
        0.1269
    """

    def __init__(
        self, class_counts: Any, max_margin: float = 0.5, *, scale: float = 30.0, **keywords: Unpack[Keywords]
    ) -> None:
        super().__init__(**keywords)
        check.check_number("LDAMLoss", "scale", scale)
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"LDAMLoss: expected finite scale > 0, got {scale}")
        self.max_margin, self.scale = max_margin, scale
        self._make_own("margin", scale * ldam_margins(class_counts, max_margin))

    def extra_repr(self) -> str:
        return f"max_margin={self.max_margin}, scale={self.scale}, {super().extra_repr()}"


class ClassBalancedLoss(CrossEntropyLoss):
    r"""Cross-entropy or focal loss with weights one over the effective number of samples of a class.

    "mean" divides by the weights of the labels present, as torch does. With gamma the weight stays outside of the
    focal term, whose :math:`p` is that of the unweighted loss: :math:`w_y (1 - p_y)^\gamma (-\log p_y)`. In
    evaluation it is plain cross-entropy.
    Source: Cui et al. 2019, section 4.

    Args:
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence.
        beta: in [0, 1), see :func:`effective_number_weights`.
        gamma: focusing exponent >= 0; 0 is plain cross-entropy.
        weight: further class weights, multiplied with these; unlike these, they apply in evaluation as well.
        ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; target as in :func:`classfair.cross_entropy`.
    State: ``reweight`` ``(C,)``, a buffer. No parameters.

    Raises:
        TypeError, ValueError: counts that are not finite numbers >= 0 in one dimension; beta or gamma out of range.

    Example:
        >>> criterion = classfair.ClassBalancedLoss([100, 1], beta=0.99)
        >>> [round(w, 4) for w in criterion.reweight.tolist()]
        [0.0311, 1.9689]
    """

    def __init__(
        self, class_counts: Any, beta: float = 0.9999, gamma: float = 0.0, **keywords: Unpack[Keywords]
    ) -> None:
        super().__init__(**keywords)
        check.check_number("ClassBalancedLoss", "gamma", gamma, 0.0)
        self.beta, self.gamma = beta, float(gamma)
        self._make_own("reweight", effective_number_weights(class_counts, beta))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, {super().extra_repr()}"


class FocalLoss(CrossEntropyLoss):
    r"""Focal loss :math:`(1 - p_y)^\gamma (-\log p_y)` over the softmax: what is learnt already counts less.

    In evaluation it is plain cross-entropy.
    Source: Lin et al. 2017, "Focal loss for dense object detection", eq. 4; their alpha is ``weight``.

    Args:
        gamma: focusing exponent >= 0; 0 is plain cross-entropy.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`. ``weight`` stays
            outside: :math:`p_y` is that of the unweighted loss. Smoothing adds its term unfocused.

    Shape: logits ``(N, C)`` or ``(N, C, d1, ...)``; labels or :class:`MixedTarget` (probabilities have no true class).
    State: none of its own. No parameters.

    Raises:
        TypeError, ValueError: gamma < 0 or no number.

    Example:
        >>> criterion = classfair.FocalLoss(gamma=2.0)
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> round(criterion(logits, torch.tensor([1])).item(), 4)  # 0.5 ** 2 * log 2
        0.1733
    """

    def __init__(self, gamma: float = 2.0, **keywords: Unpack[Keywords]) -> None:
        super().__init__(**keywords)
        check.check_number("FocalLoss", "gamma", gamma, 0.0)
        self.gamma = float(gamma)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"
