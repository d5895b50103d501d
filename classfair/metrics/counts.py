"""Metrics of class fairness as functions of counts and accuracies by class.

They take NumPy arrays, sequences or tensors of any device and number type, compute in float64 and return NumPy arrays
and floats. Accuracies are fractions in [0, 1]. A class without test images has accuracy nan, which every mean leaves
out; a mean over no class at all is nan. Wrong input raises ``ValueError``, a parameter that is no number ``TypeError``.
The formulas are those of :mod:`classfair.statistics.rates`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from classfair.metrics._inputs import (
    as_accuracies,
    as_counts,
    check_eps,
    check_shots,
    normal_quantile,
)
from classfair.statistics import rates

Array = NDArray[np.float64]
SHOTS = ("many", "medium", "few")
THIRDS = ("easy", "medium", "hard")


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
    return rates.accuracies(*_pair("per_class_accuracy", correct, count)).numpy()


def _pair(function: str, correct: Any, count: Any) -> tuple[Tensor, Tensor]:
    """Both as float64 tensors."""
    correct, count = as_counts(correct, function, "correct"), as_counts(count, function, "count")
    if correct.shape != count.shape or correct.dim() not in (1, 2):
        raise ValueError(
            f"{function}: expected correct and count of one shape, (C,) or (G, C), "
            f"got {tuple(correct.shape)} and {tuple(count.shape)}"
        )
    _check_at_most(function, correct, count, "count")
    return correct, count


def _check_at_most(function: str, correct: Tensor, whole: Tensor, name: str) -> None:
    if (correct > whole).any():
        worst = int((correct - whole).argmax())
        got = f"{float(correct.flatten()[worst]):g} > {float(whole.flatten()[worst]):g}"
        raise ValueError(f"{function}: expected correct <= {name}, got {got} for class {worst % whole.shape[-1]}")


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
    return float(rates.mean(as_accuracies(acc, "balanced_accuracy")))


def worst_class_accuracy(acc: Any) -> float:
    """Accuracy of the worst class ("Classes Are Not Equal", CVPR 2024).

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.

    Returns:
        float in [0, 1]; nan if every entry is nan.

    >>> worst_class_accuracy([0.9, 0.3, float("nan")])
    0.3
    """
    return float(rates.worst(as_accuracies(acc, "worst_class_accuracy")))


def best_class_accuracy(acc: Any) -> float:
    """Accuracy of the best class ("Classes Are Not Equal", CVPR 2024).

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.

    Returns:
        float in [0, 1]; nan if every entry is nan.

    >>> best_class_accuracy([0.9, 0.3, float("nan")])
    0.9
    """
    return float(rates.best(as_accuracies(acc, "best_class_accuracy")))


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
    acc = as_accuracies(acc, function)
    train_count = as_counts(train_count, function, "train_count")
    _check_like(function, "train_count", train_count, acc)
    check_shots(function, many, few)
    return _named(SHOTS, rates.mean_of_members(acc, rates.shot_members(train_count, many, few)))


def _check_like(function: str, name: str, value: Tensor, acc: Tensor) -> None:
    if value.shape != acc.shape:
        wanted, got = tuple(acc.shape), tuple(value.shape)
        raise ValueError(f"{function}: expected {name} of shape {wanted} like acc, got {got}")


def _named(names: tuple[str, ...], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def difficulty_accuracy(acc: Any, reference_acc: Any) -> dict[str, float]:
    """Mean class accuracy of the easy, medium and hard classes, as a reference model finds them.

    The classes, sorted by the reference's accuracy from high to low (ties by class id), are cut into thirds; the
    first ones are larger where C is no multiple of three ("Classes Are Not Equal", CVPR 2024, Table 1).

    Args:
        acc: (C,) fractions in [0, 1]; nan (a class without test images) is left out.
        reference_acc: (C,) accuracies of the reference model; a class with nan is in no third.

    Returns:
        dict with the keys easy, medium, hard; floats in [0, 1]; nan for an empty group.

    >>> difficulty_accuracy([0.75, 0.2, 0.6, 1.0], [0.95, 0.3, 0.5, 0.9])
    {'easy': 0.875, 'medium': 0.6, 'hard': 0.2}
    """
    function = "difficulty_accuracy"
    acc, reference = as_accuracies(acc, function), as_accuracies(reference_acc, function, "reference_acc")
    _check_like(function, "reference_acc", reference, acc)
    return _named(THIRDS, rates.mean_of_members(acc, rates.difficulty_members(reference)))


def cumulative_false_positives(predicted: Any, correct: Any, train_count: Any) -> tuple[Array, float]:
    """False positives of the classes summed from the most to the least frequent one, and how far that bends.

    With FP_k = predicted_k - correct_k and classes by training images from many to few (ties by class id),
    F(j) = sum of FP_k over k <= j. A straight line is a classifier that confuses without regard to frequency. The
    area, mean over j of F(j) / F(C) - j / C, is above 0 where the frequent classes take more than their share, below
    0 where the rare ones do (after Kim et al., WACV 2021).

    Args:
        predicted: (C,) images predicted as each class.
        correct: (C,) of these the correct ones.
        train_count: (C,) training images per class.

    Returns:
        F as a float64 array (C,), and the area in (-1, 1), nan without a false positive.

    >>> cumulative_false_positives([8, 3, 1], [4, 2, 1], [500, 50, 5])
    (array([4., 5., 5.]), 0.26666666666666666)
    """
    function = "cumulative_false_positives"
    predicted, correct = as_counts(predicted, function, "predicted"), as_counts(correct, function, "correct")
    train_count = as_counts(train_count, function, "train_count")
    shapes = [tuple(value.shape) for value in (predicted, correct, train_count)]
    if len(set(shapes)) > 1 or predicted.dim() != 1 or not predicted.numel():
        raise ValueError(
            f"{function}: expected predicted, correct and train_count of one shape (C,) with C >= 1, "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    _check_at_most(function, correct, predicted, "predicted")
    curve, area = rates.false_positive_curve(predicted, correct, rates.frequency_order(train_count))
    return curve.numpy(), float(area)


def wilson_interval(correct: Any, count: Any, confidence: float = 0.95) -> tuple[Array, Array]:
    """Interval for an accuracy measured on few images (Wilson, 1927): inside [0, 1], sensible at 0 and 1.

    50 images per class leave about 14 points on either side of an accuracy of 50 %.

    Args:
        correct: correctly classified images per class, (C,) or (G, C), 0 <= correct <= count.
        count: images per class, same shape.
        confidence: level in (0, 1).

    Returns:
        Lower and upper bounds, float64 arrays of that shape in [0, 1], nan where ``count`` is 0.

    >>> lower, upper = wilson_interval([25, 0], [50, 10])
    >>> lower.round(3), upper.round(3)
    (array([0.366, 0.   ]), array([0.634, 0.278]))
    """
    function = "wilson_interval"
    correct, count = _pair(function, correct, count)
    z = normal_quantile(function, confidence)
    lower, upper = rates.wilson_bounds(rates.accuracies(correct, count), count, z)
    return lower.numpy(), upper.numpy()


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
    acc = as_accuracies(acc, function)
    check_eps(function, eps)
    return float(rates.geometric_mean(acc, eps))
