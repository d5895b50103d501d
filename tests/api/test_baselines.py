"""ETF heads, dot regression, equidistance and generalised cross-entropy, against float64 NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import classfair
from classfair import dot_regression_loss, equidistance_loss, generalized_cross_entropy
from classfair.nn import ETFLinear, replace_head, with_features


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ETF


@pytest.mark.parametrize(("dim", "classes"), [(3, 3), (2, 2), (64, 10), (257, 100)])
def test_vectors_of_a_simplex(dim, classes):
    weight = ETFLinear(dim, classes, seed=3, dtype=torch.float64).weight
    expected = np.full((classes, classes), -1 / (classes - 1)) + np.eye(classes) * (1 + 1 / (classes - 1))
    np.testing.assert_allclose((weight @ weight.T).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(weight.sum(0).numpy(), 0, atol=1e-12)


def test_an_etf_is_of_its_seed_and_nothing_else():
    before = torch.get_rng_state()
    one, same, other = (ETFLinear(8, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, same.weight)
    assert not torch.allclose(one.weight, other.weight)
    assert list(one.parameters()) == []
    assert list(one.state_dict()) == ["weight"]
    with torch.device("meta"):
        meta = ETFLinear(8, 4, seed=0)
    meta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(meta.weight, one.weight)


def test_an_etf_as_the_head_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    replace_head(model, lambda head: torch.nn.Sequential(torch.nn.BatchNorm1d(8), ETFLinear(8, 4)))
    net = with_features(model)
    assert isinstance(net.head, ETFLinear)
    features, logits = net(normal(5, 6, dtype=torch.float32))
    torch.testing.assert_close(features.mean(0), torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(features @ net.head.weight.T, logits)
    logits.sum().backward()
    assert model[0].weight.grad is not None
    x = normal(3, 5).requires_grad_()
    head = ETFLinear(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(head, x)
    assert torch.autograd.gradgradcheck(head, x)
    assert ETFLinear(5, 4)(x.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 10), "ETFLinear: expected at least as many features as classes .10., got in_features=9"),
        ((4, 1), "ETFLinear: expected num_classes >= 2, got 1"),
        ((4, 3, -1), "ETFLinear: expected seed >= 0, got -1"),
    ],
)
def test_too_few_features_for_a_simplex(arguments, message):
    with pytest.raises(ValueError, match=message):
        ETFLinear(*arguments)
    with pytest.raises(TypeError, match="ETFLinear: expected in_features as an int"):
        ETFLinear(4.0, 3)


# dot regression


def numpy_dot_regression(features, weight, target):
    out = []
    for h, y in zip(features, target, strict=True):
        length, own = max(np.linalg.norm(h), 1e-8), weight[y]
        out.append((own @ h - np.linalg.norm(own) * length) ** 2 / length / 2)
    return np.array(out)


def test_dot_regression_is_its_formula():
    features, weight, target = normal(7, 5), normal(4, 5, seed=1), torch.tensor([0, 1, 2, 3, 0, -100, 2])
    each = dot_regression_loss(features, weight, target, reduction="none")
    counted = target >= 0
    expected = numpy_dot_regression(features[counted].numpy(), weight.numpy(), target[counted].numpy())
    np.testing.assert_allclose(each[counted].numpy(), expected, rtol=1e-12)
    assert each[5] == 0
    torch.testing.assert_close(dot_regression_loss(features, weight, target), each.sum() / 6)
    torch.testing.assert_close(dot_regression_loss(features, weight, target, reduction="sum"), each.sum())
    half = dot_regression_loss(features.bfloat16(), weight.bfloat16(), target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), each.sum() / 6, rtol=0.02, atol=0)


def test_derivatives_of_dot_regression_take_the_norm_for_a_constant():
    features, weight, target = normal(4, 3), normal(2, 3, seed=1), torch.tensor([0, 1, 1, 0])
    inputs = features.requires_grad_(), weight.requires_grad_()
    (gradient,) = torch.autograd.grad(dot_regression_loss(*inputs, target), features)
    for i in range(4):  # (w.h - |w||h|) w / |h|, of four
        h, own = features[i].detach(), weight[target[i]].detach()
        expected = (own @ h - own.norm() * h.norm()) / h.norm() * own / 4
        torch.testing.assert_close(gradient[i], expected)
    length = features.detach().norm(dim=1)

    def constant_norm(features, weight):
        own = weight[target]
        return (((features * own).sum(1) - own.norm(dim=1) * length) ** 2 / (2 * length)).mean()

    (twice,) = torch.autograd.grad(
        torch.autograd.grad(dot_regression_loss(*inputs, target), features, create_graph=True)[0].sum(), weight
    )
    (expected,) = torch.autograd.grad(
        torch.autograd.grad(constant_norm(*inputs), features, create_graph=True)[0].sum(), weight
    )
    torch.testing.assert_close(twice, expected)
    zero = torch.zeros(1, 3, requires_grad=True)
    dot_regression_loss(zero, torch.eye(3), torch.tensor([1])).backward()
    assert zero.grad.isfinite().all()


def test_bad_input_to_dot_regression():
    h, w, y = normal(3, 4), normal(2, 4), torch.tensor([0, 1, 1])
    with pytest.raises(IndexError, match=r"dot_regression_loss: expected labels in \[0, 2\), got 2 in row 1"):
        dot_regression_loss(h, w, torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"expected features of shape \(3, 4\), got \(3, 5\)"):
        dot_regression_loss(normal(3, 5), w, y)
    with pytest.raises(ValueError, match=r"expected target of shape \(3,\)"):
        dot_regression_loss(h, w, y[:2])
    with pytest.raises(TypeError, match="expected target of dtype"):
        dot_regression_loss(h, w, y.double())
    with pytest.raises(ValueError, match="dot_regression_loss: expected reduction"):
        dot_regression_loss(h, w, y, reduction="max")


# equidistance


def numpy_equidistance(mean):
    c = len(mean)
    d = np.array([((mean[i] - mean[j]) ** 2).sum() for i in range(c) for j in range(i + 1, c)])
    return ((d - d.mean()) ** 2).sum(), ((d / d.mean() - 1) ** 2).mean()


@pytest.mark.parametrize("shape", [(3, 1), (5, 4), (20, 7)])
def test_equidistance_is_its_formula(shape):
    mean = normal(*shape)
    total, relative = numpy_equidistance(mean.numpy())
    torch.testing.assert_close(equidistance_loss(mean, normalize=False).item(), total, rtol=1e-10, atol=0)
    torch.testing.assert_close(equidistance_loss(mean).item(), relative, rtol=1e-10, atol=0)
    torch.testing.assert_close(equidistance_loss(1000 * mean), equidistance_loss(mean))


def test_a_common_offset_costs_no_digits():
    mean = normal(6, 5, dtype=torch.float32)
    exact = equidistance_loss(mean.double() + 1000.0)
    shifted = mean + 1000.0  # rounded once
    torch.testing.assert_close(
        equidistance_loss(shifted).double(), equidistance_loss(shifted.double()), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(equidistance_loss(shifted).double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_derivatives_of_equidistance(normalize):
    mean = normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: equidistance_loss(m, normalize=normalize), mean)
    assert torch.autograd.gradgradcheck(lambda m: equidistance_loss(m, normalize=normalize), mean)


@pytest.mark.parametrize("mean", [torch.zeros(4, 3), torch.ones(2, 3), torch.ones(1, 3), torch.full((5, 2), 7.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_has_no_distances_has_neither_loss_nor_gradient(mean, normalize):
    mean = mean.clone().requires_grad_()
    loss = equidistance_loss(mean, normalize=normalize)
    loss.backward()
    assert loss == 0
    assert not mean.grad.any()


def test_a_simplex_is_at_equal_distances():
    assert equidistance_loss(ETFLinear(12, 9, dtype=torch.float64).weight) < 1e-25


def test_bad_input_to_equidistance():
    with pytest.raises(TypeError, match="equidistance_loss: expected mean as a floating tensor, got"):
        equidistance_loss(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"equidistance_loss: expected mean of shape \(C, D\)"):
        equidistance_loss(torch.ones(3))
    with pytest.raises(TypeError, match="expected normalize"):
        equidistance_loss(torch.ones(3, 2), normalize="yes")


# generalised cross-entropy


@pytest.mark.parametrize("q", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_generalized_cross_entropy_is_its_formula(q, reduction):
    logits, target = 3 * normal(6, 4), torch.tensor([0, 1, -100, 3, 2, 2])
    x = logits.numpy()
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    counted = target.numpy() >= 0
    each = np.where(counted, (1 - p[np.arange(6), target.clamp_min(0).numpy()] ** q) / q, 0)
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / 5}[reduction]
    result = generalized_cross_entropy(logits, target, q=q, reduction=reduction)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-11, atol=1e-15)


def test_limits_of_generalized_cross_entropy():
    logits, target = normal(5, 3), torch.tensor([0, 1, 2, 0, 1])
    nearly = generalized_cross_entropy(logits, target, q=1e-8)
    torch.testing.assert_close(nearly, F.cross_entropy(logits, target), rtol=1e-6, atol=0)
    sure = torch.tensor([[40.0, 0.0]])
    loss = generalized_cross_entropy(sure, torch.tensor([0]), q=0.5)
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-5)  # not rounded to 0
    wrong = torch.tensor([[-math.inf, 0.0]], requires_grad=True)
    loss = generalized_cross_entropy(wrong, torch.tensor([0]), q=0.5)
    loss.backward()
    assert loss == 2.0
    assert not wrong.grad.isnan().any()


def test_derivatives_of_generalized_cross_entropy():
    logits, target = normal(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 2])
    (gradient,) = torch.autograd.grad(generalized_cross_entropy(logits, target, reduction="sum"), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), logits)
    p = logits.detach().softmax(1)[torch.arange(4), target]
    torch.testing.assert_close(gradient, plain * p[:, None] ** 0.7)
    assert torch.autograd.gradcheck(lambda z: generalized_cross_entropy(z, target), logits)
    assert torch.autograd.gradgradcheck(lambda z: generalized_cross_entropy(z, target), logits)


def test_bad_input_to_generalized_cross_entropy():
    logits, target = normal(2, 3), torch.tensor([0, 1])
    for q in (0.0, 1.1, -1.0, math.nan):
        with pytest.raises(ValueError, match="generalized_cross_entropy: expected q"):
            generalized_cross_entropy(logits, target, q=q)
    with pytest.raises(TypeError, match="expected target as a tensor of labels, got MixedTarget"):
        generalized_cross_entropy(logits, classfair.MixedTarget(target, target, torch.ones(2)))
    with pytest.raises(TypeError, match="expected target as a tensor of labels, got probabilities"):
        generalized_cross_entropy(logits, logits.softmax(1))
    with pytest.raises(IndexError):
        generalized_cross_entropy(logits, torch.tensor([0, 3]))
