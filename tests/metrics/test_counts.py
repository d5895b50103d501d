"""classfair.metrics against hand-computed tables and scikit-learn."""

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

import classfair
import classfair.metrics as metrics

NAN = float("nan")


@pytest.mark.parametrize("name", ["counts", "base", "accuracy", "splits", "bias", "groups", "wrappers"])
def test_doctests(name):
    module = importlib.import_module(f"classfair.metrics.{name}")
    names = {"torch": torch, "classfair": classfair}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 2
    assert result.failed == 0


def test_against_sklearn():
    rng = np.random.default_rng(0)
    target, prediction = rng.integers(0, 7, 500), rng.integers(0, 7, 500)
    count = np.bincount(target, minlength=7)
    correct = np.bincount(target[target == prediction], minlength=7)
    acc = metrics.per_class_accuracy(correct, count)
    np.testing.assert_allclose(acc, recall_score(target, prediction, average=None))
    expected = balanced_accuracy_score(target, prediction)
    assert metrics.balanced_accuracy(acc) == pytest.approx(expected, abs=1e-15)


def test_classes_without_test_images_are_left_out():
    acc = metrics.per_class_accuracy([3, 0, 1], [4, 0, 2])
    np.testing.assert_array_equal(acc, [0.75, NAN, 0.5])
    assert metrics.balanced_accuracy(acc) == 0.625
    assert metrics.worst_class_accuracy(acc) == 0.5
    assert metrics.best_class_accuracy(acc) == 0.75
    assert metrics.geometric_mean_accuracy(acc) == pytest.approx(math.sqrt(0.375))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "mean",
    [
        metrics.balanced_accuracy,
        metrics.worst_class_accuracy,
        metrics.best_class_accuracy,
        metrics.geometric_mean_accuracy,
    ],
)
def test_mean_over_no_class_is_nan_without_a_warning(mean):
    assert math.isnan(mean([NAN, NAN]))


def test_groups_keep_their_shape():
    acc = metrics.per_class_accuracy([[1, 2], [0, 3]], [[2, 2], [4, 3]])
    np.testing.assert_array_equal(acc, [[0.5, 1.0], [0.0, 1.0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16])
def test_tensors_of_any_type(dtype):
    correct, count = torch.tensor([1, 2], dtype=dtype), torch.tensor([4, 2], dtype=dtype)
    acc = metrics.per_class_accuracy(correct, count)
    assert acc.dtype == np.float64
    assert acc.tolist() == [0.25, 1.0]
    assert metrics.balanced_accuracy(torch.tensor(acc, requires_grad=True)) == 0.625


def test_shot_boundaries():
    # 101 | 100, 50, 20 | 19, 0: exactly 100 and exactly 20 are medium.
    acc, train_count = [0.9, 0.8, 0.7, 0.3, 0.2, 0.4], [101, 100, 50, 20, 19, 0]
    shots = metrics.shot_accuracy(acc, train_count)
    assert shots == pytest.approx({"many": 0.9, "medium": 0.6, "few": 0.3})
    moved = metrics.shot_accuracy(acc, train_count, many=50, few=1)
    assert moved == pytest.approx({"many": 0.85, "medium": 0.4, "few": 0.4})
    empty = metrics.shot_accuracy([0.5, NAN], [500, 3])
    assert empty["many"] == 0.5
    assert math.isnan(empty["medium"])
    assert math.isnan(empty["few"])


def test_geometric_mean_replaces_exact_zeros_only():
    assert metrics.geometric_mean_accuracy([0.0, 1.0]) == pytest.approx(math.sqrt(1e-3))
    assert metrics.geometric_mean_accuracy([5e-4, 1.0]) == pytest.approx(math.sqrt(5e-4))
    assert metrics.geometric_mean_accuracy([0.0, 1.0], eps=0.25) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.per_class_accuracy([3], [2]), r"correct <= count, got 3 > 2 for class 0"),
        (lambda: metrics.per_class_accuracy([-1], [2]), r"finite correct of at least 0, got -1"),
        (lambda: metrics.per_class_accuracy([1], [NAN]), r"finite count of at least 0, got nan"),
        (lambda: metrics.per_class_accuracy([1, 2], [3]), r"got \(2,\) and \(1,\)"),
        (lambda: metrics.per_class_accuracy(["a"], [3]), r"expected numbers for correct"),
        (lambda: metrics.per_class_accuracy(1, 2), r"expected correct and count of one shape"),
        (lambda: metrics.balanced_accuracy([95.0, 20.0]), r"in \[0, 1\] or nan, got 95"),
        (lambda: metrics.worst_class_accuracy([]), r"shape \(C,\) with C >= 1, got \(0,\)"),
        (lambda: metrics.best_class_accuracy([[0.5]]), r"got \(1, 1\)"),
        (lambda: metrics.geometric_mean_accuracy([0.5], eps=0), r"eps in \(0, 1\], got 0"),
        (lambda: metrics.shot_accuracy([0.5], [1, 2]), r"train_count of shape \(1,\)"),
        (lambda: metrics.shot_accuracy([0.5], [-1]), r"train_count of at least 0"),
        (lambda: metrics.shot_accuracy([0.5], [1], many=5, few=6), r"0 <= few <= many"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=rf"^\w+_accuracy: .*{message}"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.geometric_mean_accuracy([0.5], eps="1"), "geometric_mean_accuracy: expected eps"),
        (lambda: metrics.shot_accuracy([0.5], [1], many="5"), "shot_accuracy: expected many"),
        (lambda: metrics.wilson_interval([1], [2], "95"), "wilson_interval: expected confidence"),
    ],
)
def test_parameters_that_are_no_numbers(call, message):
    with pytest.raises(TypeError, match=f"^{message} as a number, got str$"):
        call()
