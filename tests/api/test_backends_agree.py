"""Corners in which the back-ends gave different answers; the random calls of ``make fuzz`` look for more."""

import math

import pytest
import torch

from classfair import MixedTarget, PairTerms, cross_entropy, cross_entropy_with_stats, ops, pair_variance
from tests.fuzz.__main__ import call_of, check
from tests.support.pairs import runnable

X, Y = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.1, 0.2], [-1.0, 3.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 1, 2, 0])
backends = pytest.mark.parametrize("backend", [b for b, d in runnable("softmax_loss") if d == "cpu"])


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed):
    check(call_of(seed))


@backends
@pytest.mark.parametrize("mass", [1e-45, 1e-42, 1e-38, 2e-38, 1e-30])
def test_mutual_information_of_a_tiny_mass(mass, backend):
    """Reference: value and gradient were inf or NaN, though x log x is next to nothing."""
    rows = torch.tensor([[mass, 8.0], [2 * mass, 5.0]], requires_grad=True)
    count = torch.tensor([[8, 0], [5, 0]])
    value = ops.dependence(rows, count, mutual_information=True, backend=backend)
    (gradient,) = torch.autograd.grad(value, rows, create_graph=True)
    assert value.item() == pytest.approx(0.0, abs=1e-7)
    n, total, normal = torch.tensor([8.0, 5.0]).double(), 3.0 * mass, torch.finfo(torch.float32).tiny
    expected = torch.log(rows[:, 0].double().detach() * 13 / (total * n)) / 13
    expected = torch.where(rows[:, 0].detach() >= normal, expected, 0)
    if mass > normal or 2 * mass < normal:
        torch.testing.assert_close(gradient[:, 0].double().detach(), expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


@backends
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_mixtures_of_ignored_labels(reduction, backend):
    ignored = torch.full((4,), -100)
    logits = X.clone().requires_grad_()
    loss = cross_entropy(logits, MixedTarget(ignored, ignored, 0.3), reduction=reduction, backend=backend)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    loss.nan_to_num().sum().backward()
    assert logits.grad is not None
    assert (logits.grad.nan_to_num() == 0).all()


@backends
def test_a_nan_among_the_weights_is_one_in_its_own_pairs(backend):
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.nan, 0.0], [3.0, 0.0]])
    table = pair_variance(weight, torch.ones(4, 2), normalize=True, backend=backend)
    nan = torch.zeros(4, 4, dtype=torch.bool)
    nan[2], nan[:, 2] = True, True
    assert torch.equal(table.isnan(), nan)


@backends
def test_a_nan_does_not_leave_by_slots_that_are_not_in_use(backend):
    weight = torch.tensor([[math.nan, 0.0], [0.0, 1.0], [2.0, 0.0]], requires_grad=True)
    pair = pair_variance(weight, torch.ones(3, 2), torch.tensor([-100, -100]), backend=backend)
    assert (pair.rows == 0).all()
    (gradient,) = torch.autograd.grad(pair.rows.sum(), weight)
    assert (gradient == 0).all()


@backends
@pytest.mark.parametrize("normalize", [False, True])
def test_features_of_no_dimension(normalize, backend):
    weight = torch.zeros(3, 0, requires_grad=True)
    table = pair_variance(weight, torch.zeros(3, 0), normalize=normalize, backend=backend)
    assert torch.equal(table, torch.zeros(3, 3))
    assert torch.autograd.grad(table.sum(), weight)[0].shape == (3, 0)


@backends
def test_pair_terms_without_rows_perturb_nothing(backend):
    """Reference refused them, and the statistics of native were of memory that nobody had written."""
    none = torch.empty(0, 3, requires_grad=True)
    pair = PairTerms(none, torch.full((4,), -1), torch.empty(0, dtype=torch.int64), torch.tensor(0))
    logits = X.clone().requires_grad_()
    loss, stats = cross_entropy_with_stats(logits, Y, pair=pair, confusion=True, backend=backend)
    expected, plain = cross_entropy_with_stats(X, Y, confusion=True, backend=backend)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats.mass, plain.mass)
    assert torch.equal(stats.confusion, plain.confusion)
    (loss + stats.mass[0, 0]).backward()
    assert none.grad is not None
    assert none.grad.shape == (0, 3)


@backends
def test_probabilities_of_float64_leave_a_float32_loss(backend):
    target = X.double().softmax(1).requires_grad_()
    loss = cross_entropy(X, target, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    assert target.grad is not None
    assert target.grad.dtype == torch.float64
    torch.testing.assert_close(target.grad, -X.log_softmax(1).double() / 4)
