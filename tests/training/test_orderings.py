"""Which loss beats which, trained on real images and on synthetic classes; pairs share split, weights and batches.

Thresholds lie about four standard errors inside what was measured, so that other rounding does not cross them.
Orderings that were not reliable are left out: NISDA or the distance term against cross-entropy on digits, the sum
of the three terms against logit adjustment.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import classfair
from classfair.training import TrainConfig, engine, train
from tests.support.theory import TwoGaussians, fit_linear

SEEDS = 8


def difference(results, loss, column, baseline="ce"):
    """Mean over paired seeds of what a loss gains on the baseline, and the numbers behind it."""
    gains = np.array(results[loss][column]) - np.array(results[baseline][column])
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    shown = f"{loss} - {baseline}, {column}: {gains.mean():+.4f} ± {error:.4f}, by seed {gains.round(3).tolist()}"
    print(shown)  # pytest shows it where the test fails
    return gains.mean()


def columns_of(config):
    """{loss: {column: [value of each seed]}}"""
    results = {loss: {} for loss in config.loss}
    for result in train(config, None, lambda epoch: None):
        for column, value in result.columns(config).items():
            results[result.loss].setdefault(column, []).append(value)
    return results


def test_sum_of_the_three_terms_beats_cross_entropy():
    """Measured with 8 seeds: +0.062 ± 0.009, seeds from +0.026 to +0.097."""
    results = columns_of(TrainConfig(loss=("ce", "metalad"), seeds=3, epochs=30))
    assert difference(results, "metalad", "all") > 0.02


@pytest.fixture(scope="module")
def digits():
    """All losses on long-tailed digits; "distance" is replaced by the first term with the sign as printed."""
    literal, build = "distance", engine.build_criterion

    def with_literal_sign(loss, config, counts, frequency, feature_dim):
        if loss != literal:
            return build(loss, config, counts, frequency, feature_dim)
        return classfair.MetaLADLoss(counts, feature_dim, terms=("proportion",), paper_sign=True, reduction="sum")

    with pytest.MonkeyPatch.context() as patch:  # no option of the job asks for a known mistake
        patch.setattr(engine, "build_criterion", with_literal_sign)
        results = columns_of(TrainConfig(loss=("ce", "la", literal, "metalad", "isda"), seeds=SEEDS, strength=0.5))
    results["literal"] = results.pop(literal)
    return results


@pytest.mark.slow
def test_digits_logit_adjustment_helps_few_shot_classes(digits):
    """Measured: +0.114 ± 0.011."""
    assert difference(digits, "la", "few") > 0.07


@pytest.mark.slow
def test_digits_printed_sign_harms_few_shot_classes(digits):
    """Eq. 30 of Wu et al. 2023 as printed. Measured: -0.138 ± 0.028."""
    assert difference(digits, "literal", "few") < -0.03


@pytest.mark.slow
def test_digits_sum_of_the_three_terms(digits):
    """Measured: all +0.038 ± 0.005, few +0.126 ± 0.015."""
    assert difference(digits, "metalad", "all") > 0.018
    assert difference(digits, "metalad", "few") > 0.06


@pytest.mark.slow
def test_digits_isda_does_not_help_few_shot_classes(digits):
    """Measured: -0.012 ± 0.003. Wu et al. 2023 say so too: ISDA cannot cope with imbalance of proportion."""
    assert difference(digits, "isda", "few") < 0.005


@pytest.fixture(scope="module")
def long_tailed_gaussians():
    """Seven Gaussian classes in eight dimensions of 200 to 3 samples and of different variance; the last four few."""
    counts, dim, tested = torch.tensor([200, 100, 50, 20, 10, 5, 3]), 8, 1000
    num_classes = len(counts)
    losses = {
        "ce": classfair.CrossEntropyLoss,
        "la": lambda: classfair.LogitAdjustedLoss(counts),
        "literal": lambda: classfair.MetaLADLoss(counts, dim, terms=("proportion",), paper_sign=True),
        "metalad": lambda: classfair.MetaLADLoss(counts, dim),
    }
    results = {loss: {"few": [], "all": []} for loss in losses}
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(num_classes, dim, generator=generator)
        deviation = torch.linspace(0.7, 1.3, num_classes)[torch.randperm(num_classes, generator=generator)]

        def sample(y, mean=mean, deviation=deviation, generator=generator):
            return mean[y] + deviation[y, None] * torch.randn(len(y), dim, generator=generator)

        y = torch.arange(num_classes).repeat_interleave(counts)
        x, test_x = sample(y), sample(torch.arange(num_classes).repeat_interleave(tested))
        for loss, make in losses.items():
            predicted = F.linear(test_x, *fit_linear(make(), x, y, num_classes)).argmax(1).view(num_classes, tested)
            accuracy = (predicted == torch.arange(num_classes)[:, None]).double().mean(1)
            results[loss]["few"].append(float(accuracy[3:].mean()))
            results[loss]["all"].append(float(accuracy.mean()))
    return results


@pytest.mark.slow
def test_gaussians_logit_adjustment_helps_few_shot_classes(long_tailed_gaussians):
    """Measured: +0.206 ± 0.026."""
    assert difference(long_tailed_gaussians, "la", "few") > 0.1


@pytest.mark.slow
def test_gaussians_printed_sign_harms_few_shot_classes(long_tailed_gaussians):
    """Measured: -0.192 ± 0.017."""
    assert difference(long_tailed_gaussians, "literal", "few") < -0.1


@pytest.mark.slow
def test_gaussians_sum_of_the_three_terms(long_tailed_gaussians):
    """Measured: +0.079 ± 0.011."""
    assert difference(long_tailed_gaussians, "metalad", "all") > 0.03


@pytest.mark.slow
def test_variance_terms_narrow_the_gap_of_theorem_1():
    """Two classes, one with twice the standard deviation, 500 samples of each: its error less that of the other.

    Measured: CE 0.082, ISDA (0.25 as Wu et al. count, 0.5 here) 0.069, NISDA (0.25) 0.010; ISDA - CE -0.0124 ± 0.0010,
    NISDA - ISDA -0.059 ± 0.003. With three times the deviation NISDA of this strength overshoots.
    """
    task, n = TwoGaussians(sd_pos=2.0, sd_neg=1.0), 500
    losses = {
        "ce": classfair.CrossEntropyLoss,
        "isda": lambda: classfair.ISDALoss(2, 2, strength=0.5),
        "nisda": lambda: classfair.MetaLADLoss([n, n], 2, terms=("variance",), omega=(1.0, 0.25, 1.0)),
    }
    results = {loss: {"gap": []} for loss in losses}
    for seed in range(SEEDS):
        x = torch.cat(task.sample(n, seed, torch.float32))
        y = torch.arange(2).repeat_interleave(n)
        for loss, make in losses.items():
            weight, bias = fit_linear(make(), x, y, 2)
            pos, neg = task.errors(weight[0] - weight[1], bias[0] - bias[1])
            results[loss]["gap"].append(float(pos - neg))
    assert difference(results, "isda", "gap") < -0.006
    assert difference(results, "nisda", "gap", baseline="isda") < -0.03
    assert abs(np.mean(results["nisda"]["gap"])) < 0.04
