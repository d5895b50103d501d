"""What all losses share: cross-entropy with statistics, when a loss perturbs, and losses that also look at features."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from classfair import _validate as check
from classfair import backends
from classfair._dtensor import whole_weight
from classfair.functional import cross_entropy
from classfair.functional_stats import cross_entropy_with_stats
from classfair.losses._buffers import PERTURBATIONS, FeatureState, LossState
from classfair.ops import LabelIndex, label_index, pair_terms
from classfair.pair import PairTerms
from classfair.statistics import BatchStats
from classfair.targets import MixedTarget, major_label, total_weight


class CrossEntropyLoss(LossState):
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

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight)
        name = type(self).__name__
        check.check_choice(name, "reduction", reduction, check.REDUCTIONS)
        check.check_number(name, "label_smoothing", label_smoothing, 0.0, 1.0)
        self.gamma = 0.0
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend = backend
        self._began_plain = False  # the last forward pass outside of a backward pass: in training, without gradients
        self._warned = False

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
        return self.gamma > 0 or any(getattr(self, name) is not None for name in PERTURBATIONS)

    def _recomputes(self) -> bool:
        """Whether this forward pass is a recomputation inside a backward pass.

        The first pass of a reentrant checkpoint runs without gradients: it does not perturb, its recomputation does.
        """
        if torch.compiler.is_compiling():
            return False
        if not backends.recomputing():
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

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class FeatureLoss(FeatureState, CrossEntropyLoss):
    """Base of the losses of ``(features, linear_weight, target)``: when they perturb, and when their state changes.

    Subclasses say what is added to the logits of a label: :meth:`pair`.
    """

    def _perturbs(self) -> bool:
        return True

    def pair(self, linear_weight: Tensor, index: LabelIndex) -> PairTerms:
        """What is added to the logits of each label of the index."""
        raise NotImplementedError

    def absorbed(
        self, features: Tensor, linear_weight: Tensor, target: Tensor | MixedTarget, linear_bias: Tensor | None
    ) -> Tensor | None:
        """Perturbed logits without pair rows, where the raw ones are not wanted and there is a cheaper way."""
        return None

    def refresh(self) -> None:
        """What follows from the class statistics, after each of their updates."""

    def variance(self, linear_weight: Tensor, index: LabelIndex, *, normalize: bool = False) -> Tensor:
        """Rows (M, C) of :func:`classfair.pair_variance` for the labels of the index."""
        cov, acc = self.statistics.cov, check.acc_dtype(linear_weight)
        assert cov is not None
        matrices = cov.dim() == 3  # they are for plain torch
        backend = "reference" if matrices else backends.choose("pair_terms", linear_weight.device, self.backend)
        weight, cov = linear_weight.to(acc).contiguous(), cov.to(acc).contiguous()
        rows = pair_terms(weight, cov, index.key_of_slot, index.num_slots, normalize=normalize, backend=backend)
        assert rows.variance is not None
        return rows.variance

    @torch.no_grad()
    def watch(self, perturbation: Tensor) -> None:
        """Keep the largest of these perturbations, whatever their shape; a NaN counts as an infinite one."""
        if perturbation.numel():
            largest = perturbation.abs().amax().float().nan_to_num(nan=torch.inf, posinf=torch.inf)
            torch.maximum(self.largest, largest, out=self.largest)

    def forward(  # type: ignore[override]
        self,
        features: Tensor,
        linear_weight: Tensor,
        target: Tensor | MixedTarget,
        *,
        logits: Tensor | None = None,
        linear_bias: Tensor | None = None,
        sample_weight: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """The loss; see the class for shapes. ``update=False`` leaves the state alone, as in virtual steps."""
        raw = logits is not None
        logits, arguments = self._prepare(features, linear_weight, target, logits, linear_bias, update, raw=raw)
        return cross_entropy(logits, target, sample_weight=sample_weight, **arguments)

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

        ``options``: ``group``, ``num_groups``, ``joint``, ``label``, ``confusion``, ``differentiable``, ``penalty``,
        ``penalty_weight`` and ``sample_weight`` of :func:`classfair.cross_entropy_with_stats`.
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
        if check.is_dtensor(linear_weight):
            linear_weight, linear_bias = whole_weight(linear_weight), whole_weight(linear_bias)
        self._check(features, linear_weight, target)
        update = update and not self._recomputes()
        arguments = self._arguments()
        if self.active:
            index = self._index(target)
            if update:
                major = self._index(major_label(target)) if isinstance(target, MixedTarget) else index
                self.statistics.update(features, major)
                self.refresh()
            perturbed = None if raw else self.absorbed(features, linear_weight, target, linear_bias)
            if perturbed is None:
                arguments["pair"] = pair = self.pair(linear_weight, index)
                if update and len(pair.rows):  # of one label a step
                    self.watch(pair.rows.detach().index_select(0, (self.updates % len(pair.rows)).view(1)))
            if update:
                # An assignment, which the compiler refuses inside a checkpoint and leaves to eager torch: compiled, the
                # recomputation would merge the batch into the statistics that have it already.
                self.updates = self.updates + 1
            if perturbed is not None:
                return perturbed, arguments
        if logits is None:
            logits = F.linear(features, linear_weight, linear_bias)
        return logits, arguments

    def _index(self, target: Tensor | MixedTarget) -> LabelIndex:
        """Of the labels of the batch; of those of a mixture, (2N,), first all y_a and then all y_b."""
        labels = torch.cat([target.y_a, target.y_b]) if isinstance(target, MixedTarget) else target
        classes = self.statistics.mean.shape[0]
        return label_index(labels, classes, ignore_index=self.ignore_index, backend=self.backend)

    def _check(self, features: Any, linear_weight: Any, target: Any) -> None:
        name, (num_classes, dim) = type(self).__name__, self.statistics.mean.shape
        if check.is_dtensor(features):
            raise TypeError(f"{name}: expected features as a plain tensor of this process's samples, got a DTensor")
        rows = features.shape[0] if isinstance(features, Tensor) and features.dim() == 2 else -1
        check.check_floats(name, "features", features, (max(rows, 0), dim))
        check.check_floats(name, "linear_weight", linear_weight, (num_classes, dim))
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(f"{name}: expected hard labels or MixedTarget, got probabilities")
