"""Theorems of Wu et al. 2023 on Gaussian classes, by closed form, brute force and simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

import classfair
from benchmarks.reproduction.claims import HIGHER, LOWER, ZERO, Claim, Part
from benchmarks.reproduction.runs import Runs
from tests.support.theory import TwoGaussians, fit_linear, phi, theorem2_accuracies, theorem3_errors

SAMPLES = 500  # of either class, to train on


def fit(criterion: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Difference of rows and of biases of a linear classifier of two classes."""
    weight, bias = fit_linear(criterion, x, y, 2)
    return weight[0] - weight[1], bias[0] - bias[1]


def gap(runs: Runs, loss: str, deviation: float = 2.0) -> float:
    """Error of the class of larger deviation less that of the other, exact for the trained classifier."""
    task = TwoGaussians(sd_pos=deviation, sd_neg=1.0)
    make: dict[str, Any] = {
        "ce": classfair.CrossEntropyLoss,
        "isda": lambda: classfair.ISDALoss(2, 2, strength=0.5),
        "nisda": lambda: classfair.MetaLADLoss([SAMPLES] * 2, 2, terms=("variance",), omega=(1.0, 0.25, 1.0)),
    }

    def train() -> float:
        x = torch.cat(task.sample(SAMPLES, runs.seed, torch.float32))
        wide, narrow = task.errors(*fit(make[loss](), x, torch.arange(2).repeat_interleave(SAMPLES)))
        return float(wide - narrow)

    return runs.once(("gap", loss, deviation), train)


def gap_of_la(runs: Runs, deviation: float) -> float:
    """Absolute difference of both errors under logit adjustment, with half as many samples of the wide class."""
    task, counts = TwoGaussians(sd_pos=deviation, sd_neg=1.0, v=2.0), [SAMPLES // 2, SAMPLES]

    def train() -> float:
        pos, neg = task.sample(SAMPLES, runs.seed, torch.float32)
        y = torch.arange(2).repeat_interleave(torch.tensor(counts))
        trained = fit(classfair.LogitAdjustedLoss(counts), torch.cat([pos[: counts[0]], neg]), y)
        wide, narrow = task.errors(*trained)
        return abs(float(wide - narrow))

    return runs.once(("gap of la", deviation), train)


def drawn(runs: Runs) -> tuple[float, float, float]:
    """Distance, ratio of deviations and ratio of proportions, at random.

    From closer or less equal classes than these a constant rule errs less than the threshold of the theorems.
    """
    rng = np.random.default_rng(runs.seed)
    k = rng.uniform(1.5, 3.0)
    return rng.uniform(2.5, 4.0), k, rng.uniform(1.0, k)


def of_theorem_3(runs: Runs, exponent: float) -> float:
    """Largest difference of eq. 20 from brute force, with sigma_1 : sigma_2 = 1 : K**exponent in the task."""
    a, k, v = drawn(runs)
    deviation = k**exponent
    task = TwoGaussians(sd_pos=1.0, sd_neg=deviation, v=v, eta=a / math.sqrt(2))
    _, pos, neg = task.minimise()
    closed = theorem3_errors(a, k, v)
    return max(abs(pos - closed[0]), abs(neg - closed[1]))


def errors_at(a: float, k: float, v: float) -> float:
    """Difference of the errors of both classes, that of +1 first."""
    _, pos, neg = TwoGaussians(sd_pos=1.0, sd_neg=k, v=v, eta=a / math.sqrt(2)).minimise()
    return pos - neg


def equal_at_k(runs: Runs) -> float:
    a, k, _ = drawn(runs)
    return abs(errors_at(a, k, k))


def narrowing(runs: Runs) -> float:
    """How much smaller the absolute gap is half way from V = 1 to V = K than at V = 1."""
    a, k, _ = drawn(runs)
    return abs(errors_at(a, k, 1.0)) - abs(errors_at(a, k, (1 + k) / 2))


def widening(runs: Runs) -> float:
    """How much larger it is at V = 2K than at V = 1.5K."""
    a, k, _ = drawn(runs)
    return abs(errors_at(a, k, 2 * k)) - abs(errors_at(a, k, 1.5 * k))


def weighted_gap(runs: Runs) -> float:
    """How the absolute gap changes when +1 counts twice, at V = 2K: that halves V."""
    a, k, _ = drawn(runs)
    return abs(errors_at(a, k, k)) - abs(errors_at(a, k, 2 * k))


def of_theorem_2(runs: Runs, *, printed: bool) -> float:
    """Largest deviation of simulated accuracies of three classes in a row from the closed form."""
    a = drawn(runs)[0]
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(runs.seed), dtype=torch.float64)
    outer, middle = float((x < a / 2).double().mean()), float((x.abs() < a / 2).double().mean())
    if printed:
        tail = float(phi(-3 * a / 2))
        closed = 1 - tail, 1 - 2 * tail
    else:
        closed = theorem2_accuracies(a)[:2]
    return max(abs(outer - closed[0]), abs(middle - closed[1]))


THEORY = Part(
    "metalad-theory",
    "MetaLAD",
    "two or three Gaussian classes",
    12,
    [
        Claim(
            "thm1",
            "theorem 1",
            "The class of twice the deviation is worse under CE: its error − the other's",
            lambda r: gap(r, "ce"),
        ),
        Claim(
            "thm1-isda", "eq. 7, 29", "ISDA narrows that gap: ISDA − CE", lambda r: gap(r, "isda") - gap(r, "ce"), LOWER
        ),
        Claim(
            "thm1-nisda",
            "eq. 7, 29",
            "NISDA narrows it more: NISDA − ISDA",
            lambda r: gap(r, "nisda") - gap(r, "isda"),
            LOWER,
        ),
        Claim(
            "thm1-k",
            "theorem 1",
            "The gap grows with the ratio of deviations: ratio 3 − ratio 2, CE",
            lambda r: gap(r, "ce", 3.0) - gap(r, "ce"),
            HIGHER,
        ),
        Claim(
            "thm2-printed",
            "theorem 2",
            "Accuracies of three classes in a row as printed: distance from a simulation",
            lambda r: of_theorem_2(r, printed=True),
            ZERO,
            0.01,
        ),
        Claim(
            "thm2-corrected",
            "theorem 2",
            "The same with half the distance instead of 3/2 of it",
            lambda r: of_theorem_2(r, printed=False),
            ZERO,
            0.01,
        ),
        Claim(
            "thm3-printed",
            "theorem 3",
            "Eq. 20 with K the ratio of variances, as printed: distance from the best threshold",
            lambda r: of_theorem_3(r, 0.5),
            ZERO,
            1e-4,
            digits=5,
        ),
        Claim(
            "thm3-corrected",
            "theorem 3",
            "Eq. 20 with K the ratio of standard deviations",
            lambda r: of_theorem_3(r, 1.0),
            ZERO,
            1e-4,
            digits=5,
        ),
        Claim(
            "cor1-equal",
            "corollary 1",
            "Both errors are equal where K = V: their distance",
            equal_at_k,
            ZERO,
            1e-4,
            digits=5,
        ),
        Claim(
            "cor1-falls", "corollary 1", "For fixed K the gap falls up to V = K: gap at 1 − gap at (1 + K)/2", narrowing
        ),
        Claim("cor1-rises", "corollary 1", "Then it rises: gap at 2K − gap at 1.5K", widening),
        Claim(
            "la-variance",
            "section III",
            "LA does not even out classes of different variance, V = 2: its gap with ratio 3 − its gap with ratio 1",
            lambda r: gap_of_la(r, 3.0) - gap_of_la(r, 1.0),
        ),
        Claim(
            "cor1-remark",
            "after corollary 1",
            "Where V > K, more weight of class +1 widens the gap: weight 2 − weight 1, V = 2K",
            weighted_gap,
        ),
    ],
    seconds=120,
)

PARTS = [THEORY]
