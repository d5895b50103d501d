"""What all losses share: cross-entropy with statistics, and when a loss perturbs."""

import warnings
from typing import Any, TypedDict

import torch
from torch import Tensor

from classfair import _validate as check
from classfair._state import Restorable
from classfair.functional import cross_entropy
from classfair.functional_stats import cross_entropy_with_stats
from classfair.losses._recomputation import recomputing
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


class CrossEntropyLoss(Restorable):
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
    None included. No parameters. ``half()`` and ``to(bfloat16)`` do not round the state. A loss can be made on the meta
    device; after ``to_empty``, :meth:`reset_parameters` restores what the constructor made.

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
            # A weight made on the meta device has no values: they are NaN until a state is loaded.
            self._keep("weight", torch.full(weight.shape, torch.nan, device="cpu") if weight.is_meta else weight)
        self.register_buffer("weight", weight)
        for vector in _PERTURBATIONS:
            self.register_buffer(vector, None)
        self.gamma = 0.0
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.own: tuple[str, ...] = ()  # vectors that the loss makes itself, for `Warmup` to ramp
        self.ramped = False  # `Warmup` does
        self._began_plain = False  # the last forward pass outside of a backward pass: in training, without gradients
        self._warned = False

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
        self.put(name, self._keep(name, vector))
        self.own += (name,)

    def reset_parameters(self) -> None:
        """Give the buffers the values that the constructor gave them, as after ``to_empty``.

        Weights that a schedule has set are gone, and vectors that it ramps are whole, until its next step.
        """
        for name in ("weight", *_PERTURBATIONS):
            if name not in self._constants:
                setattr(self, name, None)
        super().reset_parameters()

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

    def _perturbs(self) -> bool:
        """Whether training and evaluation differ."""
        return self.gamma > 0 or any(getattr(self, name) is not None for name in _PERTURBATIONS)

    def _recomputes(self) -> bool:
        """Whether this forward pass is a recomputation inside a backward pass.

        The first pass of a reentrant checkpoint runs without gradients: it does not perturb, its recomputation does.
        """
        if torch.compiler.is_compiling():
            return False
        if not recomputing():
            began_plain = self.training and not torch.is_grad_enabled()
            if began_plain != self._began_plain:
                self._began_plain = began_plain
            return False
        if self._began_plain and not self._warned and self.active and self._perturbs():
            self._warned = True
            warnings.warn(
                f"classfair: {type(self).__name__} ran without gradients, as plain cross-entropy, and again with them"
                " inside the backward pass, perturbed: the gradient is not that of the value; give"
                " torch.utils.checkpoint use_reentrant=False",
                UserWarning,
                stacklevel=4,
            )
        return True

    def _arguments(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "backend": self.backend,
            **(self.perturbation() if self.active else {}),
        }

    def forward(self, logits: Tensor, target: Tensor | MixedTarget, *, sample_weight: Tensor | None = None) -> Tensor:
        """The loss; shapes as in :func:`classfair.cross_entropy`."""
        self._recomputes()
        return cross_entropy(logits, target, sample_weight=sample_weight, **self._arguments())

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

        ``options``: its ``label``, ``confusion``, ``differentiable``, ``penalty``, ``penalty_weight`` and
        ``sample_weight``.
        """
        self._recomputes()
        options |= {"group": group, "num_groups": num_groups, "joint": joint}
        return cross_entropy_with_stats(logits, target, **options, **self._arguments())

    def total_weight(self, target: Tensor | MixedTarget, *, sample_weight: Tensor | None = None) -> Tensor:
        """What "mean" divides by, as :func:`classfair.total_weight` with the weights that :meth:`forward` would use."""
        return total_weight(
            target,
            weight=self._arguments()["weight"],
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
        )

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
