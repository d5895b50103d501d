"""Pan et al. 2025: zero-uniformity training."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.reproduction.claims import HIGHER, LOWER, Claim, Part, untried
from benchmarks.reproduction.measures import CE, gain, with_counts
from benchmarks.reproduction.runs import Runs, Trained

PAPER = "Zero-uniformity training"
CURVE: dict[str, Any] = {"zero_uniformity": 0.05}


def zut(alpha: float, **options: Any) -> dict[str, Any]:
    return {"loss": "ce", "zero_uniformity": alpha, **options}


def response(trained: Trained) -> torch.Tensor:
    """(C,) logits of an input of zeros."""
    return trained.logits(torch.zeros(1, trained.train_images[0].shape[1]))[0]


def rise(runs: Runs) -> float:
    curve = runs("digits", **CURVE).responses
    return max(curve) - curve[0]


def fall(runs: Runs) -> float:
    curve = runs("digits", **CURVE).responses
    return curve[-1] - max(curve)


def growth_without(runs: Runs) -> float:
    curve = runs("digits").responses
    return curve[-1] - curve[0]


D = "digits"
DIGITS = Part(
    "zut-digits",
    PAPER,
    "digits-LT, 40:1",
    10,
    [
        Claim(
            "rises",
            "fig. 9",
            "The deviation of the zero input's logits rises at first, α = 0.05: peak − first epoch",
            rise,
            HIGHER,
        ),
        Claim("falls", "fig. 9", "Then it falls: last epoch − peak", fall, LOWER),
        Claim("grows", "fig. 9", "Without the loss it grows: last epoch − first", growth_without),
        Claim("zut-all", "results", "The loss raises accuracy, α = 1: all, it − CE", gain(D, "all", zut(1.0), CE)),
        Claim("zut-few", "results", "The same of few-shot classes", gain(D, "few", zut(1.0), CE)),
        Claim("zut-small", "results", "The same with α = 0.05: all", gain(D, "all", zut(0.05), CE)),
        Claim(
            "probe-one",
            "table 4",
            "A probe of ones does so too, α = 0.05: all, it − CE",
            gain(D, "all", zut(0.05, probe="one"), CE),
        ),
        Claim("probe-mean", "table 4", "And the mean of a batch", gain(D, "all", zut(0.05, probe="mean"), CE)),
        Claim("probe-random", "table 4", "And a random one", gain(D, "all", zut(0.05, probe="random"), CE)),
        Claim(
            "probe-prior",
            "introduction",
            "Logits of the zero input follow class frequency: rank correlation with counts, CE",
            with_counts(D, response),
        ),
    ],
)

M, SHORT = "mnist-lt", {"epochs": 5}
MNIST = Part(
    "zut-mnist",
    PAPER,
    "MNIST-LT, 100:1, 5 epochs",
    5,
    [
        Claim(
            "mnist-zut-all",
            "results",
            "The loss raises accuracy, α = 0.05: all, it − CE",
            gain(M, "all", zut(0.05), CE, SHORT),
        ),
        Claim("mnist-zut-few", "results", "The same of few-shot classes", gain(M, "few", zut(0.05), CE, SHORT)),
        Claim(
            "mnist-probe-prior",
            "introduction",
            "Logits of the zero input follow class frequency: rank correlation, CE",
            with_counts(M, response, **SHORT),
        ),
    ],
    seconds=120,
    needs_mnist=True,
)

NOT_TRIED = Part(
    "zut-untried",
    PAPER,
    "",
    0,
    [],
    untried=[
        untried("zut-cost", "method", "A step costs about 1/B more", "measured elsewhere: docs/benchmarks.md"),
        untried(
            "zut-kinds",
            "eq. 2, 3",
            "Mean and entropy in place of the deviation",
            "the training command has the deviation only",
        ),
        untried("zut-multi-label", "results", "Mean average precision of VOC", "no data"),
        untried("zut-dense", "results", "Segmentation of ADE20K and re-identification of persons", "no data"),
    ],
)

PARTS = [DIGITS, MNIST, NOT_TRIED]
