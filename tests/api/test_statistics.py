"""``BatchStats``: values against scikit-learn, sums, gradients, several processes."""

import copy
import math
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch.utils import _pytree as pytree

from classfair import BatchStats, MixedTarget, backends, cross_entropy, cross_entropy_with_stats
from classfair.ops import label_index
from tests.support.processes import run_processes


def batch(rows=60, classes=5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=g, dtype=dtype)
    return logits, torch.randint(0, classes, (rows,), generator=g), torch.randint(-1, 3, (rows,), generator=g)


def test_counts_against_scikit_learn():
    logits, target, group = batch()
    _, stats = cross_entropy_with_stats(logits, target, group=group, num_groups=3, confusion=True)
    prediction = logits.argmax(1)
    placed = group >= 0
    expected = confusion_matrix(target[placed], prediction[placed], labels=range(5))
    np.testing.assert_array_equal(stats.confusion, expected)
    for g in range(3):
        matrix = confusion_matrix(target[group == g], prediction[group == g], labels=range(5))
        np.testing.assert_array_equal(stats.count[g], matrix.sum(1))
        np.testing.assert_array_equal(stats.predicted[g], matrix.sum(0))
        np.testing.assert_array_equal(stats.correct[g], matrix.diagonal())


def test_mass_and_hit_from_their_definition():
    logits, target, group = batch(dtype=torch.float64)
    _, stats = cross_entropy_with_stats(logits, target, group=group, num_groups=3)
    p = logits.softmax(1).numpy()
    for g in range(3):
        rows = (group == g).numpy()
        np.testing.assert_allclose(stats.mass[g], p[rows].sum(0), rtol=1e-12)
        for c in range(5):
            own = rows & (target == c).numpy()
            np.testing.assert_allclose(stats.hit[g, c], p[own, c].sum(), rtol=1e-12)


def test_summary():
    logits, target, _ = batch()
    _, stats = cross_entropy_with_stats(logits, target)
    summary = stats.summary()
    prediction = logits.argmax(1)
    assert summary["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(target, prediction))
    assert summary["accuracy"] == pytest.approx((target == prediction).float().mean().item())
    by_class = [(prediction[target == c] == c).float().mean().item() for c in range(5)]
    assert summary["best_class_accuracy"] == pytest.approx(max(by_class))
    assert summary["worst_class_accuracy"] == pytest.approx(min(by_class))
    assert summary["samples"] == 60


def test_absent_classes_are_left_out_and_no_sample_is_nan():
    _, stats = cross_entropy_with_stats(torch.eye(3), torch.tensor([0, 0, 2]))
    assert stats.summary()["worst_class_accuracy"] == pytest.approx(0.5)
    _, stats = cross_entropy_with_stats(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    summary = stats.summary()
    assert math.isnan(summary["balanced_accuracy"])
    assert math.isnan(summary["worst_class_accuracy"])
    assert summary["samples"] == 0


def test_nonfinite_rows_are_counted_and_left_out():
    logits, target, _ = batch()
    logits[3, 1], logits[5] = math.nan, -math.inf
    _, stats = cross_entropy_with_stats(logits, target, confusion=True)
    assert stats.nonfinite.item() == 2
    assert stats.count.sum().item() == 58
    assert stats.confusion.sum().item() == 58
    assert bool(stats.mass.isfinite().all())


def test_sum_of_batches_is_the_statistics_of_all():
    logits, target, group = batch(dtype=torch.float64)
    keywords = {"num_groups": 3, "confusion": True}
    _, whole = cross_entropy_with_stats(logits, target, group=group, **keywords)
    parts = [
        cross_entropy_with_stats(logits[s], target[s], group=group[s], **keywords)[1]
        for s in (slice(0, 13), slice(13, 13), slice(13, 60))
    ]
    total = parts[0] + parts[1] + parts[2]
    for name in ("count", "correct", "predicted", "confusion", "invalid", "nonfinite"):
        assert torch.equal(getattr(total, name), getattr(whole, name)), name
    torch.testing.assert_close(total.mass, whole.mass)
    torch.testing.assert_close(total.hit, whole.hit)
    with pytest.raises(ValueError, match="expected statistics of shape"):
        whole + cross_entropy_with_stats(logits, target)[1]


def test_a_sum_is_exact_and_keeps_gradients():
    logits, target, group = batch()
    logits.requires_grad_()
    _, stats = cross_entropy_with_stats(logits, target, group=group, num_groups=3)
    total = BatchStats.zeros(3, 5) + stats + stats
    for name in ("mass", "hit"):
        assert torch.equal(getattr(total, name), 2 * getattr(stats, name).double())
    for name in ("count", "correct", "predicted", "invalid", "nonfinite"):
        assert getattr(total, name).dtype == torch.int64
        assert torch.equal(getattr(total, name), 2 * getattr(stats, name))
    (gradient,) = torch.autograd.grad(total.mass.square().sum(), logits)
    _, again = cross_entropy_with_stats(logits, target, group=group, num_groups=3)
    (expected,) = torch.autograd.grad(4 * again.mass.square().sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_is_a_pytree_and_detaches():
    logits, target, group = batch()
    _, stats = cross_entropy_with_stats(logits.requires_grad_(), target, group=group, num_groups=3, joint=True)
    assert stats.mass.requires_grad
    assert stats.joint.rows.requires_grad
    detached = stats.detach()
    assert isinstance(detached, BatchStats)
    assert not any(t.requires_grad for t in pytree.tree_leaves(detached))


def test_counts_that_nobody_asked_for_yet_are_there():
    logits, target, group = batch()
    make = partial(cross_entropy_with_stats, logits, target, group=group, num_groups=3)
    expected = make()[1]
    counts = {n: getattr(expected, n) for n in ("count", "correct", "predicted", "invalid", "nonfinite")}
    assert counts["count"].sum() == (group >= 0).sum()
    assert torch.equal(counts["predicted"][1], torch.bincount(logits[group == 1].argmax(1), minlength=5))
    for way in (copy.deepcopy, copy.copy, replace, BatchStats.detach, lambda s: pickle.loads(pickle.dumps(s))):
        stats = way(make()[1])
        assert all(torch.equal(getattr(stats, n), value) for n, value in counts.items())
    assert "nonfinite=tensor(0)" in repr(make()[1])
    with pytest.raises(AttributeError, match="'BatchStats' object has no attribute 'counts'"):
        _ = expected.counts


def test_counts_asked_for_inside_a_transform_do_not_stay_there():
    logits, target, group = batch()
    stats = cross_entropy_with_stats(logits, target, group=group, num_groups=3, differentiable=False)[1]
    torch.func.grad(lambda w: (w * stats.count).sum())(torch.randn(3, 5))
    assert torch.equal(pickle.loads(pickle.dumps(stats)).count, stats.count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", backends.available("softmax_loss", "cpu"))
def test_prediction_is_the_first_maximum(backend, dtype):
    g = torch.Generator().manual_seed(0)
    for classes in (1, 2, 7, 8, 9, 31, 32, 33, 64, 100, 257):
        logits = torch.randint(0, 3, (40, classes), generator=g).to(dtype)  # ties in every row
        logits[:2] = -torch.inf
        logits[2:4, ::2] = -torch.inf
        stats = cross_entropy_with_stats(logits, torch.zeros(40, dtype=torch.int64), backend=backend)[1]
        first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)  # torch's own takes any in some versions
        assert torch.equal(stats.prediction, first), classes


def test_monitoring_costs_no_gradient_but_gives_the_same_values():
    logits, target, _ = batch()
    logits.requires_grad_()
    loss, values = cross_entropy_with_stats(logits, target, differentiable=False)
    _, differentiable = cross_entropy_with_stats(logits, target)
    assert loss.requires_grad
    assert not values.mass.requires_grad
    for a, b in zip(pytree.tree_leaves(values), pytree.tree_leaves(differentiable), strict=True):
        assert torch.equal(a, b)


def test_statistics_of_dense_targets_use_the_given_label():
    logits, target, _ = batch()
    dense = torch.nn.functional.one_hot(target, 5).float()
    _, stats = cross_entropy_with_stats(logits, dense, label=target)
    _, hard = cross_entropy_with_stats(logits, target)
    assert torch.equal(stats.count, hard.count)
    torch.testing.assert_close(stats.hit, hard.hit)


def test_labels_of_any_stride():
    """Every second element of a longer vector, wherever labels and groups go in."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 4, generator=g)
    labels, groups = torch.randint(0, 4, (80,), generator=g), torch.randint(0, 3, (80,), generator=g)
    probabilities = logits.softmax(1)

    def results(own):
        a, b, group = (own(t) for t in (labels[::2], labels[1::2], groups[::2]))
        mixed = cross_entropy(logits, MixedTarget(a, b, 0.3))
        dense = cross_entropy_with_stats(logits, probabilities, label=a, group=group, num_groups=3)[1]
        hard = cross_entropy_with_stats(logits, a, group=group, num_groups=3, joint=True)[1]
        index = label_index(a, 4, group, 3)
        return mixed, dense.hit, dense.count, hard.mass, hard.joint.rows, hard.joint.cell, *index[:-1]

    for found, expected in zip(results(lambda t: t), results(torch.clone), strict=True):
        assert torch.equal(found, expected)


def test_images_of_labels():
    """(N, C, d1, d2): every pixel is a sample."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 3, 5, generator=g)
    target = torch.randint(0, 4, (2, 3, 5), generator=g)
    loss, stats = cross_entropy_with_stats(logits, target, reduction="none")
    assert loss.shape == stats.prediction.shape == (2, 3, 5)
    assert torch.equal(stats.prediction, logits.argmax(1))
    assert stats.count.sum().item() == 30


def _rank(rank, splits):
    logits, target, group = batch(dtype=torch.float64)
    part = slice(*splits[rank])
    z = logits[part].requires_grad_()
    _, stats = cross_entropy_with_stats(z, target[part], group=group[part], num_groups=3)
    total = stats.all_reduce()
    # A non-linear function of the sums: each rank computes it, and DDP would average the gradients.
    (gradient,) = torch.autograd.grad(total.mass.square().sum() + total.hit.pow(3).sum(), z)
    return gradient / len(splits), total.count, total.mass.detach()


@pytest.mark.parametrize("splits", [[(0, 60)], [(0, 17), (17, 60)], [(0, 40), (40, 40), (40, 60)]])
def test_processes_equal_one(splits, tmp_path):
    logits, target, group = batch(dtype=torch.float64)
    logits.requires_grad_()
    _, stats = cross_entropy_with_stats(logits, target, group=group, num_groups=3)
    (expected,) = torch.autograd.grad(stats.mass.square().sum() + stats.hit.pow(3).sum(), logits)
    results = run_processes(_rank, len(splits), tmp_path, splits)
    torch.testing.assert_close(torch.cat([result[0] for result in results]), expected)
    for _, count, mass in results:
        assert torch.equal(count, stats.count)
        torch.testing.assert_close(mass, stats.mass.detach())


def test_loss_is_that_of_cross_entropy():
    logits, target, group = batch()
    loss, _ = cross_entropy_with_stats(logits, target, group=group, num_groups=3, label_smoothing=0.1)
    assert torch.equal(loss, cross_entropy(logits, target, label_smoothing=0.1))
