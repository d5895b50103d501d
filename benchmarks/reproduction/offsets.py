"""Kim et al. 2021, "Rethinking Learning Imbalanced Data": estimated offset and uniform constraint."""

from __future__ import annotations

from typing import Any

import torch

import classfair
from benchmarks.reproduction.claims import LOWER, ZERO, Claim, Measure, Part, untried
from benchmarks.reproduction.measures import CE, area_gain, gain, with_counts
from benchmarks.reproduction.runs import Runs, Trained

PAPER = "Estimated offset"
FULL: dict[str, Any] = {"loss": "estimated-offset"}
ZERO_FIXED: dict[str, Any] = {**FULL, "offset": "zero", "center_weight": 0.0, "uniform_weight": 0.0}
CONSTRAINT_ONLY: dict[str, Any] = {**FULL, "offset": "zero"}
OFFSET_ONLY: dict[str, Any] = {**FULL, "uniform_weight": 0.0}


@torch.no_grad()
def empirical(trained: Trained) -> torch.Tensor:
    return classfair.empirical_offset(trained.head.weight, trained.moments.mean)


def bias(trained: Trained) -> torch.Tensor:
    return trained.head.bias


def flattened(data: str, both: dict[str, Any]) -> Measure:
    """Rank correlation of empirical offset and counts with the constraint, less that with a zero-fixed offset."""

    def measure(runs: Runs) -> float:
        full, fixed = (with_counts(data, empirical, **options, **both) for options in (FULL, ZERO_FIXED))
        return full(runs) - fixed(runs)

    return measure


def estimate_error(runs: Runs) -> float:
    """Deviation of empirical less estimated offset, as a share of that of the empirical one without constraint."""
    trained = runs("digits", **OFFSET_ONLY)
    return float((empirical(trained) - trained.head.offset).std() / empirical(trained).std())


@torch.no_grad()
def asymmetry(runs: Runs) -> float:
    """Of boundary distances with rows inv(S) m and offsets half m inv(S) m, the largest |d_jk - d_kj| / d_jk."""
    generator = torch.Generator().manual_seed(runs.seed)
    mean = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    weight = torch.linalg.solve(root @ root.T + torch.eye(4), mean.T).T
    distance = classfair.boundary_distance(weight, classfair.empirical_offset(weight, mean), mean)
    off = ~torch.eye(5, dtype=torch.bool)
    return float(((distance - distance.T).abs() / distance)[off].max())


D = "digits"
DIGITS = Part(
    "offset-digits",
    PAPER,
    "digits-LT, 40:1",
    10,
    [
        Claim(
            "bias-prior",
            "fig. 1b",
            "The trained bias follows the prior: rank correlation with counts, CE",
            with_counts(D, bias),
        ),
        Claim(
            "offset-prior",
            "fig. 1c",
            "So does the empirical offset where the offset is fixed at zero",
            with_counts(D, empirical, **ZERO_FIXED),
        ),
        Claim(
            "flattens",
            "fig. 3",
            "The uniform constraint flattens it: correlation with constraint − without",
            flattened(D, {}),
            LOWER,
        ),
        Claim(
            "estimates",
            "section 3",
            "Centres estimate it: deviation of empirical − estimated offset over that of the empirical one",
            estimate_error,
            ZERO,
            0.05,
        ),
        Claim(
            "symmetric",
            "eq. 4",
            "Distances to the boundary are symmetric for rows of discriminant analysis: largest relative difference",
            asymmetry,
            ZERO,
            1e-9,
            digits=12,
        ),
        Claim("offset-few", "table 1", "The whole method helps few-shot classes: it − CE", gain(D, "few", FULL, CE)),
        Claim("offset-all", "table 1", "It beats CE: all, it − CE", gain(D, "all", FULL, CE)),
        Claim("offset-gm", "fig. 4", "It raises the geometric mean: it − CE", gain(D, "geometric_mean", FULL, CE)),
        Claim(
            "offset-area",
            "fig. 5",
            "False positives accumulate closer to a straight line: absolute area between, it − CE",
            area_gain(D, FULL, CE),
            LOWER,
        ),
        Claim(
            "constraint-only",
            "table 3",
            "The constraint without the offset beats the zero-fixed baseline: all",
            gain(D, "all", CONSTRAINT_ONLY, ZERO_FIXED),
        ),
        Claim(
            "offset-only",
            "table 3",
            "The offset without the constraint beats it too: all",
            gain(D, "all", OFFSET_ONLY, ZERO_FIXED),
        ),
        Claim("zero-fixed", "table 3", "Both together beat it: all", gain(D, "all", FULL, ZERO_FIXED)),
    ],
)

M, SHORT = "mnist-lt", {"epochs": 5}
MNIST = Part(
    "offset-mnist",
    PAPER,
    "MNIST-LT, 100:1, 5 epochs",
    5,
    [
        Claim(
            "mnist-offset-prior",
            "fig. 1c",
            "The empirical offset follows the prior: rank correlation, zero-fixed",
            with_counts(M, empirical, **ZERO_FIXED, **SHORT),
        ),
        Claim(
            "mnist-flattens",
            "fig. 3",
            "The constraint flattens it: correlation with constraint − without",
            flattened(M, SHORT),
            LOWER,
        ),
        Claim(
            "mnist-offset-few",
            "table 1",
            "The whole method helps few-shot classes: it − CE",
            gain(M, "few", FULL, CE, SHORT),
        ),
        Claim("mnist-offset-all", "table 1", "It beats CE: all, it − CE", gain(M, "all", FULL, CE, SHORT)),
    ],
    seconds=200,
    needs_mnist=True,
)

NOT_TRIED = Part(
    "offset-untried",
    PAPER,
    "",
    0,
    [],
    untried=[
        untried(
            "imagenet-lt",
            "tables 1, 2",
            "Accuracy on ImageNet-LT, Places-LT and SUN397",
            "no data; docs/imagenet-lt.md is the recipe",
        ),
        untried("posterior", "eq. 3", "Identity of the posterior and offset", "an identity; the tests check it"),
    ],
)

PARTS = [DIGITS, MNIST, NOT_TRIED]
