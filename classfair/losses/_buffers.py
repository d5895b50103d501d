"""What losses keep: vectors by class, and the running moments of those that look at features."""

import warnings
from typing import Any, TypedDict

import torch
from torch import Tensor

from classfair import _validate as check
from classfair._state import Restorable
from classfair.statistics import ClassStatistics

PERTURBATIONS = ("reweight", "offset", "margin")

#: A perturbation beyond this many logits decides the loss by itself; it is reported where state is read anyway.
LARGE = 20.0


class Keywords(TypedDict, total=False):
    """What every loss takes, as :class:`classfair.CrossEntropyLoss` does."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    backend: str | None


class LossState(Restorable):
    """Vectors by class: class weights of the user, and what the loss or a schedule adds in training."""

    _version = 2  # from 2 on a weight that the state does not have was None

    weight: Tensor | None
    reweight: Tensor | None
    offset: Tensor | None
    margin: Tensor | None

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        name = type(self).__name__
        if weight is not None:
            check.check_floats(name, "weight", weight, (weight.numel() if isinstance(weight, Tensor) else 0,))
            # A weight made on the meta device has no values: they are NaN until a state is loaded.
            self._keep("weight", torch.full(weight.shape, torch.nan, device="cpu") if weight.is_meta else weight)
        self.register_buffer("weight", weight)
        for vector in PERTURBATIONS:
            self.register_buffer(vector, None)
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
            for other in ("weight", *PERTURBATIONS):
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
        for name in ("weight", *PERTURBATIONS):
            if name not in self._constants:
                setattr(self, name, None)
        super().reset_parameters()

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


class FeatureState(LossState):
    """And running moments of the features of each class, with what is counted beside them."""

    ignore_index: int
    backend: str | None
    statistics: ClassStatistics
    updates: Tensor
    largest: Tensor

    def __init__(
        self, num_classes: int, feature_dim: int, statistics: ClassStatistics | None, keywords: Keywords
    ) -> None:
        super().__init__(**keywords)  # type: ignore[misc]  # of the loss that this is mixed into
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
