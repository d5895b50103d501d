"""Targets other than plain labels, and the class counts of a data set."""

from collections.abc import Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


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
        return None if inner is None else np.asarray(inner)[np.asarray(dataset.indices)]
    if hasattr(dataset, "datasets"):  # torch.utils.data.ConcatDataset
        parts = [_stored_targets(d) for d in dataset.datasets]
        return None if any(p is None for p in parts) else np.concatenate([np.asarray(p) for p in parts])
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    if hasattr(dataset, "tensors"):  # TensorDataset: targets come last
        return dataset.tensors[-1]
    return dataset if isinstance(dataset, Tensor | np.ndarray | list | tuple) else None


def class_counts(dataset_or_targets: Any, num_classes: int) -> Tensor:
    """Number of samples of each class.

    Args:
        dataset_or_targets: integer labels (tensor, array or sequence), or a data set that keeps them: ``targets`` or
            ``labels`` (torchvision), ``TensorDataset``, and ``Subset`` or ``ConcatDataset`` of such. No sample is
            loaded. Give the whole training set, not the shard of one process.
        num_classes: C; classes without a sample get 0.

    Returns:
        ``(C,)`` int64 on the CPU.

    Raises:
        TypeError: if no labels are found, or they are no integers.
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
    labels = torch.as_tensor(np.asarray(targets.cpu() if isinstance(targets, Tensor) else targets))
    if labels.is_floating_point() and labels.numel() == 0:
        labels = labels.long()  # an empty list
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"class_counts: expected integer labels, got {labels.dtype}")
    labels = labels.reshape(-1).long()
    bad = (labels < 0) | (labels >= num_classes)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"class_counts: expected labels in [0, {num_classes}), got {int(labels[i])} at position {i}")
    return torch.bincount(labels, minlength=num_classes)
