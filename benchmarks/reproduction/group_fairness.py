"""Hänel et al. 2022, "Enhancing Fairness of Visual Attribute Predictors": penalties of groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import classfair
from benchmarks.reproduction.claims import KEPT, LOWER, NOT_RAISED, Claim, Measure, Part, untried
from benchmarks.reproduction.measures import CE, gain
from benchmarks.reproduction.runs import Runs
from classfair.training.group_measures import PENALTIES
from classfair.training.models import mlp

PAPER = "FVAP"
D = "digits-groups"
NAMES = {"dp-l2": "DP-l2", "dp-mi": "DP-MI", "eo-l2": "EO-l2", "eo-mi": "EO-MI", "iou": "IoU"}
EQUATIONS = {"dp-l2": "eq. 3", "dp-mi": "eq. 4", "eo-l2": "eq. 6", "eo-mi": "eq. 7", "iou": "eq. 12"}


def trained_with(kind: str, weight: float = 10.0) -> dict[str, Any]:
    return {"loss": "ce", "fairness": kind, "fairness_weight": weight}


def penalty_gain(measured: str, kind: str) -> Measure:
    """A penalty of all test images of a run that was trained with one, less that of a run without."""

    def measure(runs: Runs) -> float:
        return runs(D, **trained_with(kind)).penalties[measured] - runs(D).penalties[measured]

    return measure


def calibration_gain(kind: str) -> Measure:
    def measure(runs: Runs) -> float:
        return runs(D, **trained_with(kind)).calibration_error - runs(D).calibration_error

    return measure


def _of_each() -> list[Claim]:
    """What is asked of every penalty: its own measure, accuracy, calibration."""
    claims = []
    for kind, name in NAMES.items():
        own = Claim(
            f"own-{kind}",
            EQUATIONS[kind],
            f"{name} lowers its own measure: {name}, with − without",
            penalty_gain(kind, kind),
            LOWER,
            digits=4,
        )
        if kind.startswith("dp"):
            cost = Claim(
                f"accuracy-{kind}",
                "results",
                f"{name} costs accuracy: all, with − without",
                gain(D, "all", trained_with(kind), CE),
                LOWER,
            )
        else:
            cost = Claim(
                f"accuracy-{kind}",
                "results",
                f"{name} keeps accuracy: all, with − without",
                gain(D, "all", trained_with(kind), CE),
                KEPT,
                0.01,
            )
        calibrated = Claim(
            f"calibration-{kind}",
            "results",
            f"{name} keeps calibration: calibration error, with − without",
            calibration_gain(kind),
            NOT_RAISED,
            0.01,
        )
        claims += [own, cost, calibrated]
    return claims


@dataclass(frozen=True)
class Applicants:
    """Two labels and two groups: each group has one label more often, in training and test, and noise of its own."""

    x: Tensor  # (N, 2)
    y: Tensor  # (N,)
    s: Tensor  # (N,)

    @classmethod
    def draw(cls, number: int, generator: torch.Generator) -> Applicants:
        s = torch.randint(0, 2, (number,), generator=generator)
        y = (torch.rand(number, generator=generator) < torch.where(s == 1, 0.7, 0.3)).long()
        noise = torch.randn(number, 2, generator=generator) * torch.where(s == 1, 1.0, 0.6)[:, None]
        return cls(torch.stack([2.0 * y - 1, 2.0 * s - 1], 1) + noise, y, s)


def stats_of(model: torch.nn.Module, data: Applicants) -> tuple[Tensor, classfair.BatchStats]:
    return classfair.cross_entropy_with_stats(
        model(data.x), data.y, group=data.s, num_groups=2, joint=True, differentiable=True
    )


def applicants(runs: Runs, kind: str = "none") -> dict[str, float]:
    """Accuracy and penalties on 20 000 test samples of a perceptron, trained with a penalty of weight 10."""

    def train() -> dict[str, float]:
        generator = torch.Generator().manual_seed(runs.seed)
        data, test = (Applicants.draw(number, generator) for number in (2000, 20_000))
        model = mlp((2, 32, 2), torch.Generator().manual_seed(runs.seed))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(300):
            optimizer.zero_grad()
            loss, stats = stats_of(model, data)
            (loss if kind == "none" else loss + 10 * PENALTIES[kind](stats)).backward()
            optimizer.step()
        with torch.no_grad():
            _, stats = stats_of(model, test)
            accuracy = float(stats.correct.sum() / stats.count.sum())
            return {"accuracy": accuracy} | {name: float(penalty(stats)) for name, penalty in PENALTIES.items()}

    return runs.once(("applicants", kind), train)


def change(measured: str, kind: str) -> Measure:
    return lambda runs: applicants(runs, kind)[measured] - applicants(runs)[measured]


def _of_applicants() -> list[Claim]:
    claims = []
    for kind, name in NAMES.items():
        text = f"{name} lowers its own measure: {name}, with − without"
        claims.append(Claim(f"people-own-{kind}", EQUATIONS[kind], text, change(kind, kind), LOWER, digits=4))
        keeps = ("costs", LOWER) if kind.startswith("dp") else ("keeps", KEPT)
        text = f"{name} {keeps[0]} accuracy: with − without"
        measure = change("accuracy", kind)
        claims.append(Claim(f"people-accuracy-{kind}", "results", text, measure, keeps[1], 0.01))
    text = "DP-l2 does not lower IoU: with − without"
    claims.append(Claim("people-dp-iou", "results", text, change("iou", "dp-l2"), KEPT, 0.01, digits=4))
    text = "EO-l2 lowers DP-l2, too: with − without"
    claims.append(Claim("people-eo-dp", "results", text, change("dp-l2", "eo-l2"), LOWER, digits=4))
    return claims


GROUPS = Part(
    "fairness-digits",
    PAPER,
    "digits with groups, weight 10",
    10,
    [
        *_of_each(),
        Claim(
            "eo-dp",
            "results",
            "EO-l2 lowers the other measures too: DP-l2, with − without",
            penalty_gain("dp-l2", "eo-l2"),
            LOWER,
            digits=4,
        ),
        Claim(
            "eo-iou", "results", "The same: IoU, with EO-l2 − without", penalty_gain("iou", "eo-l2"), LOWER, digits=4
        ),
        Claim(
            "iou-dp",
            "results",
            "IoU lowers the other measures too: DP-l2, with − without",
            penalty_gain("dp-l2", "iou"),
            LOWER,
            digits=4,
        ),
        Claim(
            "iou-eo", "results", "The same: EO-l2, with IoU − without", penalty_gain("eo-l2", "iou"), LOWER, digits=4
        ),
        Claim(
            "dp-eo",
            "results",
            "DP-l2 does not lower EO-l2: with − without",
            penalty_gain("eo-l2", "dp-l2"),
            KEPT,
            0.01,
            digits=4,
        ),
        Claim(
            "dp-iou",
            "results",
            "DP-l2 does not lower IoU: with − without",
            penalty_gain("iou", "dp-l2"),
            KEPT,
            0.01,
            digits=4,
        ),
        Claim(
            "iou-hard",
            "σ_IOU",
            "IoU lowers the deviation of groups' IoU of predicted classes: with − without",
            gain(D, "iou_sd", trained_with("iou"), CE),
            LOWER,
        ),
        Claim("eo-hard", "σ_IOU", "So does EO-l2", gain(D, "iou_sd", trained_with("eo-l2"), CE), LOWER),
        Claim(
            "dp-strong",
            "results",
            "A larger weight of DP-l2 costs more accuracy: all, weight 100 − weight 1",
            gain(D, "all", trained_with("dp-l2", 100.0), trained_with("dp-l2", 1.0)),
            LOWER,
        ),
    ],
    note="In training the group depends on the digit, in the test it does not.",
)

NOT_TRIED = Part(
    "fairness-untried",
    PAPER,
    "",
    0,
    [],
    untried=[
        untried("faces", "results", "CelebA, UTKFace and ISIC", "no data"),
        untried(
            "squeezing",
            "discussion",
            "Squeezed probabilities meet penalties without another decision",
            "an identity; the tests check it",
        ),
    ],
)

PEOPLE = Part(
    "fairness-gaussians",
    PAPER,
    "two Gaussian groups, weight 10",
    12,
    _of_applicants(),
    note="One label is more frequent in the one group, in training and test alike.",
)

PARTS = [GROUPS, PEOPLE, NOT_TRIED]
