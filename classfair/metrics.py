"""Metrics of class fairness: small pure functions of per-class counts and accuracies.

Inputs are NumPy arrays, sequences or tensors of any device and number type; the arithmetic is
float64. Accuracies are fractions in [0, 1]. A class without test images has accuracy nan, and every
mean leaves it out; a mean over no class at all is nan. Wrong input raises ``ValueError``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _values(value: Any, function: str, name: str) -> Array:
    """The input as a float64 array on the host, or a ValueError that names it."""
    if isinstance(value, torch.Tensor):
        # Through double: NumPy has no bfloat16.
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{function}: expected numbers for {name}, got {value!r:.80}") from None


def _counts(value: Any, function: str, name: str) -> Array:
    counts = _values(value, function, name)
    bad = counts[~(np.isfinite(counts) & (counts >= 0))]
    if bad.size:
        raise ValueError(f"{function}: expected finite {name} of at least 0, got {bad[0]:g}")
    return counts


def _accuracies(value: Any, function: str) -> Array:
    acc = _values(value, function, "acc")
    if acc.ndim != 1 or acc.size == 0:
        raise ValueError(f"{function}: expected acc of shape (C,) with C >= 1, got {acc.shape}")
    bad = acc[(acc < 0) | (acc > 1)]
    if bad.size:
        raise ValueError(f"{function}: expected accuracies in [0, 1] or nan, got {bad[0]:g}")
    return acc


def _mean(acc: Array) -> float:
    present = acc[~np.isnan(acc)]
    return float(present.mean()) if present.size else float("nan")


def per_class_accuracy(correct: Any, count: Any) -> Array:
    """Accuracy of every class: ``correct / count``, nan where ``count`` is 0.

    Args:
        correct: correctly classified images per class, (C,) or (G, C), 0 <= correct <= count.
        count: images per class, same shape.

    Returns:
        float64 array of the same shape, in [0, 1] or nan.

    >>> per_class_accuracy([9, 1, 0], [10, 4, 0])
    array([0.9 , 0.25,  nan])
    """
    function = "per_class_accuracy"
    correct = _counts(correct, function, "correct")
    count = _counts(count, function, "count")
    if correct.shape != count.shape or correct.ndim not in (1, 2):
        raise ValueError(
            f"{function}: expected correct and count of one shape, (C,) or (G, C), "
            f"got {correct.shape} and {count.shape}"
        )
    if (correct > count).any():
        worst = np.unravel_index(np.argmax(correct - count), count.shape)
        raise ValueError(
            f"{function}: expected correct <= count, got {correct[worst]:g} > {count[worst]:g} for class {worst[-1]}"
        )
    result = np.full(count.shape, np.nan)
    np.divide(correct, count, out=result, where=count > 0)
    return result


def balanced_accuracy(acc: Any) -> float:
    """Unweighted mean of the class accuracies (Brodersen et al., 2010).

    Equals the ordinary (top-1) accuracy only if every class has as many test images.

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.

    Returns:
        float in [0, 1]; nan if every entry is nan.

    >>> balanced_accuracy([0.9, 0.3, float("nan")])
    0.6
    """
    return _mean(_accuracies(acc, "balanced_accuracy"))


def worst_class_accuracy(acc: Any) -> float:
    """Accuracy of the worst class ("Classes Are Not Equal", CVPR 2024).

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.

    Returns:
        float in [0, 1]; nan if every entry is nan.

    >>> worst_class_accuracy([0.9, 0.3, float("nan")])
    0.3
    """
    acc = _accuracies(acc, "worst_class_accuracy")
    return float("nan") if np.isnan(acc).all() else float(np.nanmin(acc))


def best_class_accuracy(acc: Any) -> float:
    """Accuracy of the best class ("Classes Are Not Equal", CVPR 2024).

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.

    Returns:
        float in [0, 1]; nan if every entry is nan.

    >>> best_class_accuracy([0.9, 0.3, float("nan")])
    0.9
    """
    acc = _accuracies(acc, "best_class_accuracy")
    return float("nan") if np.isnan(acc).all() else float(np.nanmax(acc))


def shot_accuracy(acc: Any, train_count: Any, *, many: float = 100, few: float = 20) -> dict[str, float]:
    """Mean class accuracy of the many-, medium- and few-shot classes.

    The groups are those of Liu et al. (CVPR 2019) with the boundaries of Kang et al. (ICLR 2020):
    many has more than ``many`` training images, few has fewer than ``few``, medium is the rest,
    so that a class with exactly ``many`` or ``few`` images is medium.

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.
        train_count: (C,) training images per class, at least 0.
        many: upper boundary of medium, in images.
        few: lower boundary of medium, in images; at most ``many``.

    Returns:
        dict with the keys many, medium, few; floats in [0, 1]; nan for an empty group.

    >>> shot_accuracy([0.9, 0.7, 0.5, 0.3], [500, 100, 20, 19])
    {'many': 0.9, 'medium': 0.6, 'few': 0.3}
    """
    function = "shot_accuracy"
    acc = _accuracies(acc, function)
    train_count = _counts(train_count, function, "train_count")
    if train_count.shape != acc.shape:
        raise ValueError(f"{function}: expected train_count of shape {acc.shape} like acc, got {train_count.shape}")
    if not 0 <= few <= many:
        raise ValueError(f"{function}: expected 0 <= few <= many, got few={few}, many={many}")
    is_many, is_few = train_count > many, train_count < few
    groups = {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}
    return {name: _mean(acc[members]) for name, members in groups.items()}


def geometric_mean_accuracy(acc: Any, eps: float = 1e-3) -> float:
    """Geometric mean of the class accuracies; low as soon as one class is low.

    Computed as exp(mean(log acc)). Exact zeros, and only those, are replaced by ``eps``, as in
    "De-biasing Neural Networks with Estimated Offset for Class Imbalanced Learning".

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.
        eps: what stands for an accuracy of 0, in (0, 1].

    Returns:
        float in (0, 1]; nan if every entry is nan.

    >>> round(geometric_mean_accuracy([0.9, 0.4]), 6)
    0.6
    >>> round(geometric_mean_accuracy([1.0, 0.0]), 6)  # sqrt(0.001)
    0.031623
    """
    function = "geometric_mean_accuracy"
    acc = _accuracies(acc, function)
    if not 0 < eps <= 1:
        raise ValueError(f"{function}: expected eps in (0, 1], got {eps}")
    present = acc[~np.isnan(acc)]
    if not present.size:
        return float("nan")
    return float(np.exp(np.log(np.where(present == 0, eps, present)).mean()))
