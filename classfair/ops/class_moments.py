"""``class_moments``: one pass over the features for the moments of the labels present, and their merge into state."""

from typing import NamedTuple

import torch
from torch import Tensor

from classfair import _library, backends, reference
from classfair._validate import acc_dtype
from classfair.ops.label_index import LabelIndex


class SlotMoments(NamedTuple):
    """Moments of a batch by label slot (:class:`classfair.ops.LabelIndex`), zero where no row entered.

    Rows without a slot never enter; rows with a feature that is NaN, infinite or so large that its square may overflow
    (above 1e15 in size, 1e150 in float64) do not either and are counted.
    """

    count: Tensor  # type: ignore[assignment]  # (M,) int64, rows that entered
    mean: Tensor  # (M, D) float32, or float64 for float64 features, as below
    variance: Tensor | None  # (M, D) about the mean, divided by the count
    nonfinite: Tensor  # () int64, rows with a slot and such a feature


def _moments_fake(features: Tensor, slot: Tensor, order: Tensor, start: Tensor, variance: bool) -> tuple[Tensor, ...]:
    slots, columns, acc = start.shape[0] - 1, features.shape[1], acc_dtype(features)
    return (
        start.new_empty(slots),
        features.new_empty((slots, columns), dtype=acc),
        features.new_empty((slots, columns) if variance else (0, 0), dtype=acc),
        start.new_empty(()),
    )


def _merge_fake(
    count: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    key: Tensor,
    state_count: Tensor,
    state_mean: Tensor,
    state_variance: Tensor | None,
    state_mean_error: Tensor | None,
    state_variance_error: Tensor | None,
    momentum: float | None,
) -> None:
    return None


_library.define(
    "class_moments(Tensor features, Tensor slot, Tensor order, Tensor start, bool variance)"
    " -> (Tensor count, Tensor mean, Tensor variance, Tensor nonfinite)",
    _moments_fake,
)
# The one operator that writes its arguments: a functional merge would copy the state of every absent class.
_library.define(
    "class_moments_merge(Tensor count, Tensor mean, Tensor? variance, Tensor key, Tensor(a!) state_count,"
    " Tensor(b!) state_mean, Tensor(c!)? state_variance, Tensor(d!)? state_mean_error,"
    " Tensor(e!)? state_variance_error, float? momentum) -> ()",
    _merge_fake,
)


def class_moments(
    features: Tensor,  # (N, D)
    index: LabelIndex,
    *,
    variance: bool = True,
    backend: str | None = None,
) -> SlotMoments:
    """The primitive itself, unchecked; :func:`classfair.class_moments` is the safe way in.

    One pass: the rows of a label are read once from memory, in blocks that stay in cache for the second look that
    makes the variance exact. No gradient. Determinism: bitwise, any number of threads.
    """
    name = backends.choose("class_moments", features.device, backend)
    operator = reference.class_moments if name == "reference" else backends.namespace(name).class_moments
    count, mean, var, nonfinite = operator(features.detach(), index.slot, index.order, index.start, variance)
    return SlotMoments(count, mean, var if variance else None, nonfinite)


def class_moments_merge(
    batch: SlotMoments,
    key: Tensor,  # (M,) class of each row of the batch; of the rows with a count, each at most once
    state_count: Tensor,  # (C,) int64, written
    state_mean: Tensor,  # (C, D), written
    state_variance: Tensor | None = None,  # (C, D), written
    state_mean_error: Tensor | None = None,  # (C, D), written: what rounding has left out of the mean
    state_variance_error: Tensor | None = None,  # (C, D), written: and of the variance
    *,
    momentum: float | None = None,
    backend: str | None = None,
) -> None:
    """Merge the rows of a batch into running state, in place; rows of absent classes are not touched.

    With ``momentum`` a, the state becomes the moments of the mixture of (1 - a) of the past and a of the batch; a
    class seen for the first time takes the batch whole. Floats of batch and state are of one dtype, and the state is
    contiguous. Determinism: bitwise, any number of threads.
    """
    name = backends.choose("class_moments", state_mean.device, backend)
    namespace = reference if name == "reference" else backends.namespace(name)
    variance = None if state_variance is None else batch.variance
    state = (state_count, state_mean, state_variance, state_mean_error, state_variance_error)
    namespace.class_moments_merge(batch.count, batch.mean, variance, key, *state, momentum)
    if not torch.compiler.is_compiling():
        # So that a backward that saved the old state fails instead of using the new one.
        torch.autograd.graph.increment_version([t for t in state if t is not None and not t.is_inference()])
