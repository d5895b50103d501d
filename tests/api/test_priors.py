"""Vectors made from class counts, against the formulas of their papers."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

import classfair
from classfair import (
    ClassBalancedLoss,
    LogitAdjustedLoss,
    cross_entropy_with_stats,
    effective_counts,
    effective_frequency,
    effective_number_weights,
    ldam_margins,
    logit_adjustment,
    tau_normalize,
)

COUNTS = [80, 15, 5]


def test_logit_adjustment_is_the_log_prior():
    expected = 1.5 * np.log(np.array(COUNTS) / 100)
    np.testing.assert_allclose(logit_adjustment(COUNTS, tau=1.5), expected, rtol=1e-6)


def test_posthoc_adjustment_moves_predictions_to_rare_classes():
    logits = torch.zeros(2, 3, 4)
    adjusted = classfair.posthoc_logit_adjustment(logits, COUNTS, tau=2.0)
    torch.testing.assert_close(adjusted[0, :, 0], -2 * torch.tensor(COUNTS).div(100).log())
    assert adjusted.argmax(1).unique().tolist() == [2]
    assert classfair.posthoc_logit_adjustment(logits.bfloat16(), COUNTS).dtype == torch.bfloat16


def test_margins_are_those_of_the_authors():
    """Cao et al.'s code: 1 / sqrt(sqrt(n)), scaled so that the largest is max_margin."""
    m = 1.0 / np.sqrt(np.sqrt(COUNTS))
    np.testing.assert_allclose(ldam_margins(COUNTS, 0.4), m * (0.4 / m.max()), rtol=1e-6)
    assert ldam_margins(COUNTS).max().item() == 0.5


@pytest.mark.parametrize(("counts", "absent_as"), [([16, 0, 81], 1.0), ([0.5, 0.0, 0.25], 0.25)])
def test_a_class_without_samples_has_the_largest_margin(counts, absent_as):
    with pytest.warns(UserWarning, match="1 of 3 classes have no sample; they are treated as if they had one"):
        margins = ldam_margins(counts)
    expected = np.where(np.array(counts) == 0, absent_as, counts) ** -0.25
    np.testing.assert_allclose(margins, 0.5 * expected / expected.max(), rtol=1e-6)
    assert margins.argmax() == 1


def exact_weights(counts, beta):
    """Cui et al., section 4, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        b = Decimal(beta)
        w = [(1 - b) / (1 - b**n) for n in counts]
        return [float(len(counts) * x / sum(w)) for x in w]


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-9])
def test_effective_number_weights(beta):
    counts = [5000, 1300, 17, 1]
    expected = [1.0] * 4 if beta == 0 else exact_weights(counts, beta)
    weights = effective_number_weights(counts, beta)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights, expected, rtol=3e-7)
    if beta == 0:
        assert weights.tolist() == expected


@pytest.mark.parametrize("beta", [0.0, 0.99])
def test_a_class_without_samples_has_weight_zero(beta):
    with pytest.warns(UserWarning, match="1 of 3 classes have no sample; their weight is 0"):
        weights = effective_number_weights([100, 0, 10], beta)
    assert weights[1] == 0
    torch.testing.assert_close(weights[[0, 2]], effective_number_weights([100, 10], beta))


# ---- Effective frequency


def test_effective_frequency_is_the_mean_probability_of_the_true_class():
    g = torch.Generator().manual_seed(6)
    logits, target = torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    _, stats = cross_entropy_with_stats(logits, target, group=target % 2, num_groups=2)
    p = logits.softmax(1).numpy()
    expected = [p[target.numpy() == c, c].mean() for c in range(3)]
    np.testing.assert_allclose(effective_frequency(stats)[:3], expected, rtol=1e-5)
    assert effective_frequency(stats)[3].isnan()
    torch.testing.assert_close(effective_frequency(stats + stats)[:3].float(), effective_frequency(stats)[:3])


def never_recognised():
    """Class 1 has probability 1e-6 for itself, class 3 has no sample."""
    logits = torch.tensor([[0.0, 0.0, 0.0, -99.0], [14.0, 0.2, 0.0, -99.0], [0.0, 0.0, 3.0, -99.0]])
    return cross_entropy_with_stats(logits, torch.tensor([0, 1, 2]))[1]


def test_effective_counts():
    stats = never_recognised()
    frequency = effective_frequency(stats).numpy()
    assert frequency[1] < 1e-4
    present = np.maximum(frequency[:3], 1e-3)
    mean = np.nanmean(frequency)
    np.testing.assert_allclose(effective_counts(stats), [*present, mean], rtol=1e-6)  # one sample each
    np.testing.assert_allclose(effective_counts(stats + stats), 2 * np.array([*present, mean]), rtol=1e-6)
    np.testing.assert_allclose(
        effective_counts(stats, [10, 20, 30, 40]), [*present, mean] * np.arange(10, 50, 10), 1e-6
    )


def test_reweighting_by_effective_frequency():
    stats = never_recognised()
    offset = LogitAdjustedLoss(effective_counts(stats, torch.ones(4))).offset
    assert offset.argmin() == 1  # the hardest class is the rarest
    assert bool(offset.isfinite().all())
    weights = ClassBalancedLoss(effective_counts(stats), beta=0.9).reweight
    assert weights.argmax() == 1
    assert weights[[0, 2]].min() < weights[3] < weights[1]  # without validation samples, and so an average class
    assert bool(weights.isfinite().all())


# ---- Normalised heads


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_tau_normalize(tau):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weight[2] = 0
    expected = [w / np.linalg.norm(w) ** tau if w.any() else w for w in weight.numpy()]
    np.testing.assert_allclose(tau_normalize(weight, tau), expected, rtol=1e-12)
    assert tau_normalize(weight.bfloat16(), tau).dtype == torch.bfloat16
    leaf = weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: tau_normalize(w, tau), weight[:2].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda w: tau_normalize(w, tau), weight[:2].clone().requires_grad_())
    (gradient,) = torch.autograd.grad(tau_normalize(leaf, tau).square().sum(), leaf, create_graph=True)
    assert bool(gradient.isfinite().all())
    assert bool(torch.autograd.grad(gradient.square().sum(), leaf)[0].isfinite().all())


COUNT_MAKERS = {
    "ldam_margins": ldam_margins,
    "effective_number_weights": lambda counts: effective_number_weights(counts, 0.9),
}


@pytest.mark.parametrize("name", COUNT_MAKERS)
@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        ([3, -1], ValueError, "expected finite class counts >= 0, got -1 for class 1"),
        ([3, float("nan")], ValueError, "got nan for class 1"),
        ([0, 0], ValueError, "expected at least one non-zero class count"),
        ([[1, 2]], ValueError, r"of shape \(C,\) with C >= 1, got \(1, 2\)"),
        ("many", TypeError, "expected class_counts as a tensor, array or sequence of numbers, got str"),
    ],
)
def test_bad_counts(name, counts, error, match):
    with pytest.raises(error, match=f"^{name}: .*{match}"):
        COUNT_MAKERS[name](counts)


BAD = [
    (lambda: ldam_margins(COUNTS, -0.1), ValueError, r"ldam_margins: expected max_margin >= 0, got -0.1"),
    (lambda: ldam_margins(COUNTS, "a"), TypeError, r"ldam_margins: expected max_margin as a number, got str"),
    (lambda: effective_number_weights(COUNTS, 1.0), ValueError, r"expected beta in \[0, 1\), got 1.0"),
    (lambda: effective_number_weights(COUNTS, math.nan), ValueError, r"effective_number_weights: .*got nan"),
    (lambda: tau_normalize([[1.0]], 1.0), TypeError, r"tau_normalize: expected weight as a \(C, D\) tensor, got list"),
    (lambda: tau_normalize(torch.ones(3), 1.0), ValueError, r"tau_normalize: expected weight .*, got \(3,\)"),
    (
        lambda: tau_normalize(torch.ones(2, 3).long(), 1.0),
        TypeError,
        r"tau_normalize: expected weight as a floating tensor",
    ),
    (
        lambda: tau_normalize(torch.ones(3)[None], None),
        TypeError,
        r"tau_normalize: expected tau as a number, got NoneType",
    ),
    (lambda: effective_frequency(3), TypeError, r"effective_frequency: expected stats as BatchStats, got int"),
    (lambda: effective_counts(None), TypeError, r"expected stats as BatchStats, got NoneType"),
    (
        lambda: effective_counts(never_recognised(), COUNTS),
        ValueError,
        r"effective_counts: expected class_counts of shape \(4,\), got \(3,\)",
    ),
    (
        lambda: effective_counts(cross_entropy_with_stats(torch.zeros(1, 3), torch.tensor([-100]))[1]),
        ValueError,
        r"effective_counts: expected statistics of at least one sample, got none",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match[:60] for _, _, match in BAD])
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
