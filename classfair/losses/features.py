"""What the losses share that also look at features and classifier weights."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from classfair import _validate as check
from classfair import backends
from classfair._dtensor import is_dtensor, whole_weight
from classfair.functional import cross_entropy
from classfair.functional_stats import cross_entropy_with_stats
from classfair.losses.base import CrossEntropyLoss, Keywords
from classfair.ops import LabelIndex, label_index, pair_terms
from classfair.pair import PairTerms
from classfair.statistics import BatchStats, ClassStatistics
from classfair.targets import MixedTarget, major_label

#: A perturbation beyond this many logits decides the loss by itself; it is reported where state is read anyway.
LARGE = 20.0


class FeatureLoss(CrossEntropyLoss):
    """Base of the losses of ``(features, linear_weight, target)``: when they perturb, and when their state changes.

    Subclasses say what is added to the logits of a label: :meth:`pair`.
    """

    statistics: ClassStatistics
    updates: Tensor
    largest: Tensor

    def __init__(
        self, num_classes: int, feature_dim: int, statistics: ClassStatistics | None, keywords: Keywords
    ) -> None:
        super().__init__(**keywords)
        name = type(self).__name__
        if statistics is None:
            statistics = ClassStatistics(num_classes, feature_dim, ignore_index=self.ignore_index, backend=self.backend)
        if not isinstance(statistics, ClassStatistics):
            raise TypeError(f"{name}: expected statistics as ClassStatistics, got {type(statistics).__name__}")
        if statistics.cov is None:
            raise ValueError(f"{name}: expected statistics with a covariance, got covariance='none'")
        if tuple(statistics.mean.shape) != (num_classes, feature_dim):
            raise ValueError(
                f"{name}: expected statistics of {num_classes} classes and {feature_dim} features,"
                f" got {tuple(statistics.mean.shape)}"
            )
        self.statistics = statistics
        self._register_constant("updates", torch.zeros((), dtype=torch.int64, device="cpu"))
        # Since the state was last read, and so 0 in it: loaders leave garbage in what a file does not have.
        self._register_constant("largest", 0.0)

    def reset_parameters(self) -> None:
        """As that of :class:`CrossEntropyLoss`; the statistics are forgotten."""
        super().reset_parameters()
        self.statistics.reset()

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
        if is_dtensor(features):
            raise TypeError(f"{name}: expected features as a plain tensor of this process's samples, got a DTensor")
        rows = features.shape[0] if isinstance(features, Tensor) and features.dim() == 2 else -1
        check.check_floats(name, "features", features, (max(rows, 0), dim))
        check.check_floats(name, "linear_weight", linear_weight, (num_classes, dim))
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(f"{name}: expected hard labels or MixedTarget, got probabilities")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.largest.is_meta and self.largest > LARGE:  # whoever saves state waits for the device anyway
            warnings.warn(
                f"classfair: {type(self).__name__} perturbed logits by up to {float(self.largest):.3g}; beyond"
                f" {LARGE:g} the perturbation decides the loss alone: lower its strength",
                UserWarning,
                stacklevel=4,
            )
        self.largest.zero_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Up to version 2 of the state the number of updates was a Python number beside the tensors."""
        old = state_dict.pop(prefix + "_extra_state", None)
        if old is not None:
            state_dict.setdefault(prefix + "updates", torch.tensor(old["updates"], dtype=torch.int64))
        if prefix + "updates" in state_dict:
            state_dict.setdefault(prefix + "largest", torch.zeros_like(self._constants["largest"]))
        super()._load_from_state_dict(state_dict, prefix, *rest)
