"""Targets other than plain labels, and the class counts of a data set."""

from collections.abc import Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from classfair import _validate as check


class MixedTarget(NamedTuple):
    r"""Two hard labels with a mixing weight, as MixUp and CutMix make them.

    The loss is :math:`\lambda\,\ell(z, y_a) + (1 - \lambda)\,\ell(z, y_b)`: pair rows, margins and losses of both
    labels are mixed (Zhang et al. 2018, MixUp; Yun et al. 2019, CutMix, eq. 1). A share whose label is
    ``ignore_index`` drops out of the loss and of the denominator of ``"mean"``.

    Args:
        y_a: ``(N,)`` or ``(N, d1, ...)`` int64.
        y_b: shape of ``y_a``.
        lam: share of ``y_a`` in [0, 1]: a number, or a tensor that broadcasts to ``(N,)`` or to the shape of
            ``y_a``; no gradient.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> target = MixedTarget(torch.tensor([0]), torch.tensor([2]), 0.75)
        >>> round(classfair.cross_entropy(logits, target).item(), 4)
        0.9198
    """

    y_a: Tensor
    y_b: Tensor
    lam: Any


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
        ignore_index: as in :func:`cross_entropy`.
        num_classes: C, where ``weight`` does not tell it: labels from C on are then known to be invalid.

    Returns:
        ``()`` float32, or float64 for a float64 ``weight``, on the device of the target. Labels and ``MixedTarget``:
        the weights of the labels (shares) that are not ignored; probabilities: N, the weights do not enter. Nothing is
        read by the host. Invalid labels are outside, as in the loss on a GPU (on the CPU the loss raises).
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
    if weight is not None:
        check.check_floats(function, "weight", weight, (weight.numel() if isinstance(weight, Tensor) else 0,))
        dtype = torch.float64 if weight.dtype == torch.float64 else dtype
        weight, num_classes = weight.detach().to(dtype), weight.numel()
    if isinstance(target, MixedTarget):
        for name in ("y_a", "y_b"):
            shape = getattr(target.y_a, "shape", ())
            check.check_labels_tensor(function, f"target.{name}", getattr(target, name), shape)
        share = _share(target.lam, target.y_a, dtype)
        parts = [(target.y_a, share), (target.y_b, 1 - share)]
    elif isinstance(target, Tensor) and target.is_floating_point():
        rows = target.numel() // target.shape[1] if target.dim() > 1 else 1
        return torch.full((), rows, dtype=dtype, device=target.device)
    else:
        check.check_labels_tensor(function, "target", target, getattr(target, "shape", ()))
        parts = [(target, torch.ones_like(target, dtype=dtype))]
    if weight is not None and weight.device != parts[0][0].device:
        raise ValueError(f"{function}: expected weight on the device of the target, got {weight.device}")
    good = torch.ones_like(parts[0][0], dtype=torch.bool)  # a bad label takes the other one's share with it
    total = torch.zeros((), dtype=torch.float64, device=good.device)
    for label, _ in parts:
        good = good & ((label == ignore_index) | _in_range(label, num_classes))
    for label, share in parts:
        counted = good & (label != ignore_index)
        own = share if weight is None else share * weight[torch.where(counted, label, 0)]
        total = total + torch.where(counted, own, 0.0).sum(dtype=torch.float64)
    return total.to(dtype)


def _in_range(label: Tensor, num_classes: int | None) -> Tensor:
    return label >= 0 if num_classes is None else (label >= 0) & (label < num_classes)


def _share(lam: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """lam of a MixedTarget in the shape of its labels."""
    if not isinstance(lam, Tensor):
        check.check_range("total_weight", "target.lam", lam, 0.0, 1.0)
        return torch.full_like(like, lam, dtype=dtype)
    if lam.dim() == 1 and like.dim() > 1:
        lam = lam.view(-1, *(1,) * (like.dim() - 1))
    try:
        return lam.detach().to(like.device, dtype).expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"total_weight: expected target.lam that broadcasts to {tuple(like.shape)}, got {tuple(lam.shape)}"
        ) from None
