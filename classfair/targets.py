"""Targets other than plain labels, and the class counts of a data set."""

import math
from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from classfair import _validate as check
from classfair import backends


class MixedTarget(NamedTuple):
    r"""Two hard labels with a mixing weight, as MixUp and CutMix make them.

    The loss is :math:`\lambda\,\ell(z, y_a) + (1 - \lambda)\,\ell(z, y_b)`: pair rows, margins and losses of both
    labels are mixed (Zhang et al. 2018, MixUp; Yun et al. 2019, CutMix, eq. 1). A share whose label is
    ``ignore_index`` drops out of the loss and of the denominator of ``"mean"``.

    Args:
        y_a: ``(N,)`` or ``(N, d1, ...)`` int64 or uint8.
        y_b: shape of ``y_a``.
        lam: share of ``y_a`` in [0, 1]: a number, or a tensor that broadcasts to ``(N,)`` or to the shape of
            ``y_a``; no gradient. On GPUs, where nobody waits for its value, a share outside gives a loss of NaN.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> target = MixedTarget(torch.tensor([0]), torch.tensor([2]), 0.75)
        >>> round(classfair.cross_entropy(logits, target).item(), 4)
        0.9198
    """

    y_a: Tensor
    y_b: Tensor
    lam: Any


def flat_mixture(
    function: str,
    target: MixedTarget,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> MixedTarget:
    """The checked target as vectors: labels (R,), and the share of ``y_a`` (R,) of the given dtype.

    ``shape`` is what the labels must have, R its product. ``device`` is that of the logits; None takes that of ``y_a``.
    """
    flat = []
    for name, label in (("target.y_a", target.y_a), ("target.y_b", target.y_b)):
        flat.append(check.flat_labels(function, name, label, shape))
        if device is not None:
            check.check_device(function, name, label, device)
    place = target.y_a.device if device is None else device
    y_a, y_b = flat
    return MixedTarget(y_a, y_b, _flat_share(function, target.lam, shape, dtype, place))


def _plain(lam: Any) -> Any:
    """Compiled, a NumPy scalar is an array without dimensions, as which it may change without a recompilation."""
    return torch.as_tensor(lam) if torch.compiler.is_compiling() and isinstance(lam, np.ndarray) else lam


def _flat_share(function: str, lam: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    lam = _plain(lam)
    if not isinstance(lam, Tensor):
        check.check_number(function, "target.lam", lam, 0.0, 1.0)
        return torch.full((math.prod(shape),), float(lam), dtype=dtype, device=device)
    if lam.is_complex():
        raise TypeError(f"{function}: expected target.lam as a number or a real tensor, got {lam.dtype}")
    check.check_dense(function, "target.lam", lam)
    if lam.requires_grad:
        raise ValueError(f"{function}: expected target.lam without gradient, got requires_grad=True")
    if lam.dim() == 1 and len(shape) > 1:
        lam = lam.view(-1, *(1,) * (len(shape) - 1))
    if lam.dim() > len(shape) or any(a not in (1, b) for a, b in zip(lam.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{function}: expected target.lam that broadcasts to {tuple(shape)}, got {tuple(lam.shape)}")
    return _checked_share(function, lam.to(device, dtype)).expand(shape).reshape(-1).contiguous()


def _checked_share(function: str, lam: Tensor) -> Tensor:
    """Shares in [0, 1]. Where nobody looks at values, NaN in the place of others, and so a loss of NaN."""
    good = (lam >= 0) & (lam <= 1)
    if lam.device.type != "cpu" or backends.transformed():
        return torch.where(good, lam, torch.nan)
    if not bool(good.all()):
        raise ValueError(f"{function}: expected target.lam in [0, 1], got {float(lam[~good][0])}")
    return lam


def major_label(target: Tensor | MixedTarget) -> Tensor:
    """The label that counts and moments take a sample for: of two mixed labels the one with the larger share.

    ``y_a`` counts where both shares are equal. The labels and a tensor ``lam`` have one shape, (N,).
    """
    if not isinstance(target, MixedTarget):
        return target
    lam = _plain(target.lam)
    if not isinstance(lam, Tensor):
        return target.y_b if lam < 0.5 else target.y_a
    return torch.where(lam.to(target.y_a.device) < 0.5, target.y_b, target.y_a)


def major_first(target: MixedTarget) -> tuple[MixedTarget, Tensor]:
    """A flat mixture with the major label as ``y_a``, and (R,) bool: whether the two labels had to change places."""
    y_a, y_b, lam = target
    swap = lam < 0.5
    ordered = MixedTarget(torch.where(swap, y_b, y_a), torch.where(swap, y_a, y_b), torch.where(swap, 1 - lam, lam))
    return ordered, swap


def _stored_targets(dataset: Any) -> Any:
    """Labels that a data set keeps, without loading a sample; None where it keeps none."""
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):  # torch.utils.data.Subset
        inner = _stored_targets(dataset.dataset)
        return None if inner is None else np.asarray(inner)[np.asarray(dataset.indices, dtype=np.int64)]
    if hasattr(dataset, "datasets"):  # torch.utils.data.ConcatDataset
        parts = [_stored_targets(d) for d in dataset.datasets]
        return None if any(p is None for p in parts) else np.concatenate([np.asarray(p) for p in parts])
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return _transformed(getattr(dataset, name), getattr(dataset, "target_transform", None))
    if hasattr(dataset, "tensors"):  # TensorDataset: targets come last
        return dataset.tensors[-1]
    return dataset if isinstance(dataset, Tensor | np.ndarray | list | tuple) else None


def _transformed(stored: Any, transform: Any) -> Any:
    """Labels as the samples have them: torchvision's data sets keep those from before ``target_transform``."""
    if transform is None:
        return stored
    return [transform(label) for label in (stored.tolist() if isinstance(stored, Tensor | np.ndarray) else stored)]


def _label_tensor(function: str, stored: Any, num_classes: int | None) -> Tensor:
    """Stored labels as (N,) int64 on the CPU, after checking them; None accepts any label >= 0."""
    labels = torch.as_tensor(np.asarray(stored.cpu() if isinstance(stored, Tensor) else stored))
    if labels.is_floating_point() and labels.numel() == 0:
        labels = labels.long()  # an empty list
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{function}: expected integer labels, got {labels.dtype}")
    if labels.dim() == 2 and labels.shape[1] == num_classes != 1 and _is_one_hot(labels):
        raise TypeError(
            f"{function}: expected labels, got one-hot rows of shape {tuple(labels.shape)}; argmax(1) has them"
        )
    labels = labels.reshape(-1).long()
    bad = ~_in_range(labels, num_classes)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        wanted = ">= 0" if num_classes is None else f"in [0, {num_classes})"
        raise ValueError(f"{function}: expected labels {wanted}, got {int(labels[i])} at position {i}")
    return labels


def _is_one_hot(rows: Tensor) -> bool:  # (N, C)
    return len(rows) > 0 and bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(1) == 1).all())


def class_counts(dataset_or_targets: Any, num_classes: int) -> Tensor:
    """Number of samples of each class.

    Args:
        dataset_or_targets: integer labels (tensor, array or sequence), or a data set that keeps them: ``targets`` or
            ``labels`` (torchvision; its ``target_transform`` is applied), ``TensorDataset``, and ``Subset`` or
            ``ConcatDataset`` of such. No sample is loaded. Give the whole training set, not the shard of one process.
        num_classes: C; classes without a sample get 0.

    Returns:
        ``(C,)`` int64 on the CPU.

    Raises:
        TypeError: if no labels are found, or they are no integers, or one-hot rows.
        ValueError: if a label is outside of [0, C); it names the first.

    Example:
        >>> class_counts([0, 2, 2, 1, 2], num_classes=4)
        tensor([1, 1, 3, 0])
    """
    targets = _stored_targets(dataset_or_targets)
    if targets is None:
        kind = type(dataset_or_targets).__name__
        size = f" of length {len(dataset_or_targets)}" if isinstance(dataset_or_targets, Sized) else ""
        raise TypeError(
            f"class_counts: expected integer labels or a data set with .targets, .labels or .tensors, got {kind}{size}"
        )
    return torch.bincount(_label_tensor("class_counts", targets, num_classes), minlength=num_classes)


def total_weight(
    target: Tensor | MixedTarget,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    num_classes: int | None = None,
) -> Tensor:
    r"""What ``reduction="mean"`` divides by: the denominator of one batch, to be added up over several.

    With gradient accumulation, or several processes, the mean of the whole is the sum of the parts over the sum of
    their totals; a mean of means is not, unless all totals are equal:
    ``cross_entropy(..., reduction="sum") / total``.

    Args:
        target: as for :func:`cross_entropy`: labels, :class:`MixedTarget`, or probabilities ``(N, C)`` or
            ``(N, C, d1, ...)``.
        weight: ``(C,)`` class weights; the method ``total_weight`` of a loss knows those that it applies.
        sample_weight: weights of the samples, of the shape of the labels.
        ignore_index: as in :func:`cross_entropy`.
        num_classes: C, where ``weight`` does not tell it: labels from C on are then known to be invalid.

    Returns:
        ``()`` float32, or float64 for a float64 weight, on the device of the target. Labels and ``MixedTarget``: the
        weights of the labels (shares) that are not ignored; probabilities: N, the class weights do not enter. Each
        term counts as often as its sample weight says. Nothing is read by the host. Invalid labels are outside, as in
        the loss on a GPU (on the CPU the loss raises).
        ``label_smoothing`` changes nothing but this: where it is on and the total is 0, "mean" is NaN, as in torch.
        No gradient.

    Raises:
        TypeError, ValueError: target or weight of the wrong kind or shape.

    Example:
        >>> logits, target = torch.randn(6, 3), torch.tensor([0, 2, 1, -100, 1, 0])
        >>> weight = torch.tensor([1.0, 2.0, 0.5])
        >>> total = total_weight(target, weight=weight)
        >>> total
        tensor(6.5000)
        >>> parts = zip(logits.split(4), target.split(4))
        >>> sums = [classfair.cross_entropy(z, y, weight=weight, reduction="sum") for z, y in parts]
        >>> torch.allclose(sum(sums) / total, classfair.cross_entropy(logits, target, weight=weight))
        True
    """
    function, dtype = "total_weight", torch.float32
    ignore_index = check.integer(function, "ignore_index", ignore_index)
    if weight is not None:
        check.check_floats(function, "weight", weight, (weight.numel() if isinstance(weight, Tensor) else 0,))
        dtype = check.acc_dtype(weight)
        weight, num_classes = weight.detach().to(dtype), weight.numel()
    soft = isinstance(target, Tensor) and target.is_floating_point()
    labels = target.y_a if isinstance(target, MixedTarget) else target
    shape = getattr(labels, "shape", ())
    if soft:
        shape = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    if sample_weight is not None:
        check.check_floats(function, "sample_weight", sample_weight, shape)
        check.check_device(function, "sample_weight", sample_weight, target_device(target), "target")
        dtype = torch.promote_types(dtype, check.acc_dtype(sample_weight))
    parts: list[tuple[Tensor | None, Tensor]]
    if isinstance(target, MixedTarget):
        y_a, y_b, share = flat_mixture(function, target, shape, dtype)
        parts = [(y_a, share), (y_b, 1 - share)]
    elif soft:
        parts = [(None, torch.ones(shape, dtype=dtype, device=target.device))]
    else:
        flat = check.flat_labels(function, "target", target, shape)
        parts = [(flat, torch.ones_like(flat, dtype=dtype))]
    if weight is not None and weight.device != parts[0][1].device:
        raise ValueError(f"{function}: expected weight on the device of the target, got {weight.device}")
    return _sum_of_weights(parts, weight, sample_weight, ignore_index, num_classes).to(dtype)


def target_device(target: Tensor | MixedTarget) -> torch.device:
    return target.y_a.device if isinstance(target, MixedTarget) else target.device


def _sum_of_weights(
    parts: list[tuple[Tensor | None, Tensor]],  # labels (R,), None for probabilities, and shares (R,)
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    num_classes: int | None,
) -> Tensor:
    good = torch.ones_like(parts[0][1], dtype=torch.bool)  # a bad label takes the other one's share with it
    for label, _ in parts:
        if label is not None:
            good = good & ((label == ignore_index) | _in_range(label, num_classes))
    total = torch.zeros((), dtype=torch.float64, device=good.device)
    for label, share in parts:
        counted, own = good, share
        if label is not None:
            counted = good & (label != ignore_index)
            own = share if weight is None else share * weight[torch.where(counted, label, 0)]
        if sample_weight is not None:
            own = own * sample_weight.detach().reshape(own.shape)
        total = total + torch.where(counted, own, 0.0).sum(dtype=torch.float64)
    return total


def _in_range(label: Tensor, num_classes: int | None) -> Tensor:
    return label >= 0 if num_classes is None else (label >= 0) & (label < num_classes)
