"""Per-class mean and covariance of features: of one batch, and running over training."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from classfair import _validate as check
from classfair import backends
from classfair._state import KeepsPrecision
from classfair.ops import LabelIndex, SlotMoments, class_moments_merge, label_index
from classfair.ops import class_moments as moments_by_slot
from classfair.ops.label_index import check_index
from classfair.reference import usable_rows
from classfair.statistics._covariance import State, merge_covariance, zero_state
from classfair.statistics._processes import agree_on_rows, gather_moments, gather_rows, merge_batches

COVARIANCES = ("diag", "full", "none")

#: Full covariances are (C, D, D) floats; wider features are refused with the memory they would take.
MAX_FULL_DIM = 640


class ClassMoments(NamedTuple):
    """Population moments of a batch by class, zero for classes without a sample; from :func:`class_moments`.

    Example:
        >>> moments = class_moments(torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]), num_classes=2)
        >>> moments.mean.tolist(), moments.cov.tolist()
        ([[0.0], [2.0]], [[0.0], [1.0]])
    """

    count: Tensor  # type: ignore[assignment]  # (C,) int64
    mean: Tensor  # (C, D)
    cov: Tensor | None  # (C, D) variances, or (C, D, D)
    nonfinite: Tensor  # () int64, samples left out because of a NaN, an infinity or a feature above 1e15 in size


def _moments(features: Tensor, index: LabelIndex, state: State, *, variance: bool, backend: str | None) -> SlotMoments:
    """Moments of a batch in the dtype of the state."""
    dtype = state.mean.dtype
    if features.dtype.itemsize > dtype.itemsize:  # what the state could not hold
        features = features.where(usable_rows(features, dtype)[:, None], torch.nan)
    batch = moments_by_slot(features, index, variance=variance, backend=backend)
    own = None if batch.variance is None else batch.variance.to(dtype)
    return SlotMoments(batch.count, batch.mean.to(dtype), own, batch.nonfinite)


def _merge(features: Tensor, index: LabelIndex, state: State, *, momentum: float | None, backend: str | None) -> Tensor:
    """Merge a batch into the state; the number of its non-finite rows, () int64."""
    full = state.cov is not None and state.cov.dim() == 3
    batch = _moments(features, index, state, variance=state.cov is not None and not full, backend=backend)
    if full:
        merge_covariance(features.detach(), index, batch, state, momentum)
        state = state._replace(cov=None, cov_error=None)
    class_moments_merge(batch, index.key_of_slot, *state, momentum=momentum, backend=backend)
    return batch.nonfinite


def _check_covariance(function: str, covariance: str, num_classes: int, feature_dim: int) -> None:
    check.check_choice(function, "covariance", covariance, COVARIANCES)
    if covariance == "full" and feature_dim > MAX_FULL_DIM:
        gigabytes = 4 * num_classes * feature_dim**2 / 1e9
        raise ValueError(
            f"{function}: expected covariance 'diag' or 'none' above {MAX_FULL_DIM} features, got 'full', which would"
            f" take {gigabytes:.1f} GB for {num_classes} classes and {feature_dim} features"
        )


def _of_index(features: Tensor, backend: str | None) -> str | None:
    """The same back-end for the index where it can; where not, class_moments says what is wrong with the name."""
    return backend if backend in backends.usable("label_index", features.device) else None


def _check_features(function: str, features: Any, target: Any) -> None:
    rows = tuple(features.shape) if isinstance(features, Tensor) and not features.is_nested else None
    if rows is not None and (len(rows) != 2 or rows[1] == 0):
        raise ValueError(f"{function}: expected features of shape (N, D) with D >= 1, got {rows}")
    check.check_floats(function, "features", features, rows or ())
    check.check_labels_tensor(function, "target", target, features.shape[:1], check.LABELS)
    if target.device != features.device:
        raise ValueError(
            f"{function}: expected target on the device of the features, {features.device}, got {target.device}"
        )


@torch.no_grad()
def class_moments(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    covariance: str = "diag",
    ignore_index: int = -100,
    backend: str | None = None,
) -> ClassMoments:
    r"""Count, mean and population covariance of each class in a batch.

    .. math:: m_c = \frac{1}{n_c} \sum_{i: y_i = c} x_i, \qquad
        S_c = \frac{1}{n_c} \sum_{i: y_i = c} (x_i - m_c)(x_i - m_c)^\top

    Args:
        features: ``(N, D)`` float16, bfloat16, float32 or float64, in any layout.
        target: ``(N,)`` int64 in ``[0, num_classes)`` or ``ignore_index``.
        num_classes: C.
        covariance: ``"diag"`` for variances, ``"full"`` for matrices (D up to 640), ``"none"``.
        ignore_index: label of samples that are left out.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the default (see :mod:`classfair.backends`).

    Returns:
        A :class:`ClassMoments`: ``count`` ``(C,)`` int64, ``mean`` ``(C, D)``, ``cov`` ``(C, D)``, ``(C, D, D)`` or
        None, and ``nonfinite`` ``()`` int64, the number of samples left out because of a feature that is NaN, infinite
        or so large that its square may overflow: above 1e15 in size, 1e150 for float64 features.
        Floats are float32 (float64 for float64 features) and 0 for classes without a sample. No gradient.

    Raises:
        TypeError, ValueError: for arguments of another dtype or shape, and for ``"full"`` with D above 640.
        IndexError: on the CPU, for a label out of range. On other devices such samples are left out.

    Determinism: bitwise on kernels, any number of threads.
    Source: the estimator of Wang et al. 2019, "Implicit Semantic Data Augmentation for Deep Networks", for one batch.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 5.0]])
        >>> moments = class_moments(features, torch.tensor([0, 0, 2]), num_classes=3)
        >>> moments.count.tolist(), moments.mean.tolist()
        ([2, 0, 1], [[2.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
        >>> moments.cov[0].tolist()
        [1.0, 0.0]
    """
    _check_features("class_moments", features, target)
    check.check_count("class_moments", "num_classes", num_classes)
    _check_covariance("class_moments", covariance, num_classes, features.shape[1])
    dtype, device = check.acc_dtype(features), features.device
    state = zero_state(num_classes, features.shape[1], covariance, dtype, device, (False, False))
    index = label_index(target, num_classes, ignore_index=ignore_index, backend=_of_index(features, backend))
    nonfinite = _merge(features, index, state, momentum=None, backend=backend)
    return ClassMoments(state.count, state.mean, state.cov, nonfinite)


class ClassStatistics(KeepsPrecision):
    r"""Running count, mean and population covariance of the features of each class.

    A batch with :math:`n_b` samples of a class, mean :math:`m_b` and covariance :math:`S_b` changes its state by

    .. math:: m \leftarrow m + w\,(m_b - m), \qquad
        S \leftarrow S + w\,\bigl(S_b - S + (1 - w)(m_b - m)(m_b - m)^\top\bigr), \qquad w = \frac{n_b}{n + n_b},

    which is exact: any split of the samples into batches gives the moments of all of them together. Classes that are
    absent from a batch keep their state and cost nothing. A million updates with single samples leave float32 means
    and covariances within 1e-4 of float64 (means of 10, deviations of 1). Of single samples, variances are within 1e-6
    even at means of a million deviations; that of a larger batch is about its own mean, which float32 then rounds to
    a sixteenth of a deviation.

    Args:
        num_classes: C.
        feature_dim: D.
        covariance: ``"diag"`` for variances, ``"full"`` for matrices (D up to 640), ``"none"``.
        momentum: None counts all samples alike. A number in (0, 1] is used in place of w, so that the past of a class
            fades by 1 - momentum with every batch that contains it; its first batch counts whole.
        ignore_index, backend: as in :func:`class_moments`.

    State (in ``state_dict``; ``.half()`` and ``.to(bfloat16)`` leave its precision alone): ``count`` ``(C,)`` int64,
    ``mean`` ``(C, D)`` float32, ``cov`` ``(C, D)`` or ``(C, D, D)`` float32 or None, ``mean_error`` ``(C, D)`` what
    rounding has left out of means, ``cov_error`` ``(C, D)`` or None: of cumulative variances (matrices: the diagonal),
    ``nonfinite`` ``()`` int64, the number of samples left out because of a feature that is NaN, infinite or above 1e15
    in size, whose square may overflow. No parameters, no gradient.

    Source: Wang et al. 2019, "Implicit Semantic Data Augmentation for Deep Networks", eq. 8 to 10, and Chan, Golub
    and LeVeque 1979 for the exact merge.

    Raises:
        ValueError: for ``"full"`` with D above 640, naming the memory that it would take.

    Example:
        >>> statistics = ClassStatistics(num_classes=3, feature_dim=2)
        >>> statistics.update(torch.tensor([[1.0, 0.0], [5.0, 5.0]]), torch.tensor([0, 2]))
        >>> statistics.update(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
        >>> statistics.count.tolist(), statistics.mean[0].tolist(), statistics.cov[0].tolist()
        ([2, 0, 1], [2.0, 0.0], [1.0, 0.0])
    """

    count: Tensor
    mean: Tensor
    cov: Tensor | None
    mean_error: Tensor
    cov_error: Tensor | None
    nonfinite: Tensor
    _version = 1  # of the state, kept by torch in the metadata of a state_dict

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        covariance: str = "diag",
        momentum: float | None = None,
        *,
        ignore_index: int = -100,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.check_count("ClassStatistics", "num_classes", num_classes)
        check.check_count("ClassStatistics", "feature_dim", feature_dim)
        _check_covariance("ClassStatistics", covariance, num_classes, feature_dim)
        if momentum is not None:
            check.check_real("ClassStatistics", "momentum", momentum)
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"ClassStatistics: expected momentum None or in (0, 1], got {momentum}")
        # Variances that fade do not let rounding errors add up. Means do: small steps would leave them where they are.
        errors = (True, covariance != "none" and momentum is None)
        state = zero_state(num_classes, feature_dim, covariance, torch.float32, None, errors)
        self.register_buffer("count", state.count)
        self.register_buffer("mean", state.mean)
        self.register_buffer("cov", state.cov)
        self.register_buffer("mean_error", state.mean_error)
        self.register_buffer("cov_error", state.cov_error)
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))
        self.covariance = covariance
        self.momentum = momentum
        self.ignore_index = ignore_index
        self.backend = backend

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        target: Tensor | LabelIndex,
        *,
        process_group: Any = None,
        sync: bool = True,
        max_batch: int | None = None,
    ) -> None:
        """Merge a batch into the state, in place.

        Args:
            features: ``(N, D)`` floating, detached; N may be 0.
            target: ``(N,)`` int64; or a ``LabelIndex`` of it that is there already.
            process_group: the processes that share this state; None: the default group, if one is initialised. Each
                of them must call this, with a batch of any size, and ends with the same state, which is that of one
                process with all batches together.
            sync: False leaves other processes out.
            max_batch: the largest N of any process and call. Where it is not given, processes agree on the largest
                N of the call, which waits for the device once.

        Raises:
            TypeError, ValueError: for arguments of another dtype, shape or device.
            IndexError: on the CPU, for a label out of range. On other devices such samples are left out.
        """
        _check_features("ClassStatistics.update", features, target.slot if isinstance(target, LabelIndex) else target)
        if features.shape[1] != self.mean.shape[1]:
            raise ValueError(
                f"ClassStatistics.update: expected features of shape (N, {self.mean.shape[1]}),"
                f" got {tuple(features.shape)}"
            )
        if features.device != self.mean.device:
            raise ValueError(
                f"ClassStatistics.update: expected features on the device of the statistics, {self.mean.device},"
                f" got {features.device}"
            )
        if isinstance(target, LabelIndex):
            check_index("ClassStatistics.update", target, self.count.shape[0], features.device)
        index = target if isinstance(target, LabelIndex) else self._index(target)
        if not (sync and dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1):
            self._merge(features, index)
        elif self.covariance == "full":
            # N rows of D are fewer numbers than M matrices of D x D.
            labels = torch.where(index.slot >= 0, index.key_of_slot[index.slot.clamp_min(0)], self.ignore_index)
            features, labels = gather_rows(features, labels, self.ignore_index, process_group, max_batch)
            self._merge(features, self._index(labels))
        else:
            self._merge_processes(features, index, process_group, max_batch)

    def _index(self, target: Tensor) -> LabelIndex:
        backend = _of_index(self.mean, self.backend)
        return label_index(target, self.count.shape[0], ignore_index=self.ignore_index, backend=backend)

    def _state(self) -> State:
        return State(self.count, self.mean, self.cov, self.mean_error, self.cov_error)

    def _merge(self, features: Tensor, index: LabelIndex) -> None:
        self.nonfinite += _merge(features, index, self._state(), momentum=self.momentum, backend=self.backend)

    def _merge_processes(self, features: Tensor, index: LabelIndex, group: Any, max_batch: int | None) -> None:
        state, backend = self._state(), self.backend
        batch = _moments(features, index, state, variance=self.cov is not None, backend=backend)
        slots = min(agree_on_rows(features, group, max_batch), self.count.shape[0])
        batches, keys = gather_moments(batch, index.key_of_slot, slots, group)
        if self.momentum is None:  # one after the other: nothing is lost of their means
            for batch, key in zip(batches, keys, strict=True):
                class_moments_merge(batch, key, *state, backend=backend)
        else:
            merged, key = merge_batches(batches, keys, self.count.shape[0], backend)
            class_moments_merge(merged, key, *state, momentum=self.momentum, backend=backend)
        self.nonfinite += torch.stack([batch.nonfinite for batch in batches]).sum()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()

    reset_parameters = reset  # torch's name, for what was on the meta device

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        version = local_metadata.get("version", self._version)
        if version > self._version:
            raise RuntimeError(
                f"ClassStatistics: expected state of version {self._version} or older, got version {version};"
                " it was saved by a newer classfair"
            )
        if prefix + "mean" in state_dict:  # at first what rounding left out was not kept
            for name in ("mean_error", "cov_error"):
                if (error := getattr(self, name)) is not None:
                    state_dict.setdefault(prefix + name, torch.zeros_like(error))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        num_classes, feature_dim = self.mean.shape
        return f"{num_classes}, {feature_dim}, covariance={self.covariance!r}, momentum={self.momentum}"
