"""Wu et al. 2023, "Rethinking Class Imbalance in Machine Learning": MetaLAD and its terms."""

from __future__ import annotations

from typing import Any

import torch

import classfair
from benchmarks.reproduction.claims import KEPT, LOWER, Claim, Part, untried
from benchmarks.reproduction.measures import CE, gain, norms, with_counts
from benchmarks.reproduction.runs import Runs, Trained, head_of

PAPER = "MetaLAD"
LA: dict[str, Any] = {"loss": "la"}
SUM: dict[str, Any] = {"loss": "metalad"}
ISDA: dict[str, Any] = {"loss": "isda", "strength": 0.5}
NISDA: dict[str, Any] = {"loss": "nisda"}
DISTANCE: dict[str, Any] = {"loss": "distance"}
PRINTED: dict[str, Any] = {"loss": "distance", "change": "printed-sign"}
LDAM_DRW: dict[str, Any] = {"loss": "ldam", "drw_start": 120}
BALANCED: dict[str, Any] = {"loss": "cb", "beta": 0.999}


def bilevel(step: float, **options: Any) -> dict[str, Any]:
    """Ten images of every class held out; a step of 0 leaves omega at 1 and the same images out."""
    return {"loss": "metalad", "meta_per_class": 10, "meta_lr": step, **options}


@torch.no_grad()
def towards_others(weight: torch.Tensor, moments: classfair.ClassMoments, *, projected: bool) -> torch.Tensor:
    """(C,) mean over the other classes of the variance along the difference of their classifier rows."""
    assert moments.cov is not None
    table = classfair.pair_variance(weight, moments.cov, normalize=projected)
    assert isinstance(table, torch.Tensor)
    return table.sum(1) / (len(weight) - 1)


def mapped(trained: Trained) -> torch.Tensor:
    return towards_others(trained.head.weight, trained.moments_of(*trained.test_images), projected=False)


def projected(trained: Trained) -> torch.Tensor:
    return towards_others(trained.head.weight, trained.moments_of(*trained.test_images), projected=True)


def variance_spread(runs: Runs) -> float:
    """Standard deviation over classes of the second term: at the end of training less that after EARLY epochs."""
    trained = runs("digits", **SUM)
    assert trained.early is not None
    ends = (head_of(trained.early).weight, trained.early_moments), (trained.head.weight, trained.moments)
    early, late = (towards_others(weight, moments, projected=True).std() for weight, moments in ends)
    return float(late - early)


def distance_spread(runs: Runs) -> float:
    """The same of the third term."""
    trained = runs("digits", **SUM)
    assert trained.early is not None
    tables = [classfair.distance_margin(m.mean) for m in (trained.early_moments, trained.moments)]
    early, late = (table.sum(1).std() / (len(table) - 1) for table in tables if isinstance(table, torch.Tensor))
    return float(late - early)


D = "digits"
DIGITS = Part(
    "metalad-digits",
    PAPER,
    "digits-LT, 40:1",
    12,
    [
        Claim(
            "la-few",
            "eq. 24",
            "Logit adjustment (LA) helps few-shot classes: accuracy, LA − CE",
            gain(D, "few", LA, CE),
        ),
        Claim("la-all", "eq. 24", "LA beats CE: accuracy of all classes, LA − CE", gain(D, "all", LA, CE)),
        Claim(
            "printed-few",
            "eq. 30",
            "The first term with the sign as printed helps few-shot classes: it − CE",
            gain(D, "few", PRINTED, CE),
        ),
        Claim(
            "sum-ce",
            "table 7",
            "The sum of the three terms, weights 1, beats CE: all, sum − CE",
            gain(D, "all", SUM, CE),
        ),
        Claim("sum-la", "table 7", "The sum beats its first term: all, sum − LA", gain(D, "all", SUM, LA)),
        Claim(
            "isda-few",
            "CIFAR-LT tables",
            "ISDA lowers few-shot accuracy under imbalance: ISDA − CE",
            gain(D, "few", ISDA, CE),
            LOWER,
        ),
        Claim(
            "nisda-few",
            "fig. 17",
            "NISDA does not lower few-shot accuracy: NISDA − CE",
            gain(D, "few", NISDA, CE),
            KEPT,
            0.02,
        ),
        Claim("nisda-isda", "fig. 17", "NISDA beats ISDA: all, NISDA − ISDA", gain(D, "all", NISDA, ISDA)),
        Claim("nisda-ce", "table 7", "The variance term alone beats CE: all, NISDA − CE", gain(D, "all", NISDA, CE)),
        Claim("distance-ce", "table 7", "The distance term alone beats CE: all, it − CE", gain(D, "all", DISTANCE, CE)),
        Claim(
            "la-cb",
            "table 7",
            "The first term alone beats class-balanced CE: all, LA − CB",
            gain(D, "all", LA, BALANCED),
        ),
        Claim("nisda-cb", "table 7", "So does the second: all, NISDA − CB", gain(D, "all", NISDA, BALANCED)),
        Claim("distance-cb", "table 7", "So does the third: all, distance − CB", gain(D, "all", DISTANCE, BALANCED)),
        Claim("la-ldam", "CIFAR-LT tables", "LA beats LDAM: all, LA − LDAM", gain(D, "all", LA, {"loss": "ldam"})),
        Claim(
            "sum-ldam",
            "CIFAR-LT tables",
            "The sum beats LDAM with deferred weights: all, sum − LDAM-DRW",
            gain(D, "all", SUM, LDAM_DRW),
        ),
        Claim(
            "variance-spread",
            "fig. 18 to 21",
            "The variance term differs less between classes as training goes on: deviation, last epoch − tenth, sum",
            variance_spread,
            LOWER,
        ),
        Claim("distance-spread", "fig. 18 to 21", "So does the distance term", distance_spread, LOWER),
        Claim(
            "weights-digits",
            "fig. 15",
            "Frequent classes have longer weights under CE: rank correlation with counts",
            with_counts(D, norms),
        ),
        Claim(
            "mapped",
            "fig. 16",
            "Their mapped variance, of test images, is larger: rank correlation with counts",
            with_counts(D, mapped),
        ),
        Claim(
            "projected",
            "fig. 16",
            "Their projected variance, of test images, is smaller: rank correlation with counts",
            with_counts(D, projected),
            LOWER,
        ),
    ],
    note="Class-balanced CE (β = 0.999) fails to train with some seeds: differences from it have large errors then.",
)

FIXED = bilevel(0.0)
BILEVEL = Part(
    "metalad-bilevel",
    PAPER,
    "digits-LT, 10 images a class held out",
    8,
    [
        Claim(
            "bilevel-all",
            "eq. 33 to 36",
            "Learnt Ω beats fixed Ω = 1, same images, η₂ = 10: all, learnt − fixed",
            gain(D, "all", bilevel(10.0), FIXED),
        ),
        Claim("bilevel-few", "eq. 33 to 36", "The same of few-shot classes", gain(D, "few", bilevel(10.0), FIXED)),
        Claim("bilevel-30-all", "eq. 33 to 36", "The same with η₂ = 30: all", gain(D, "all", bilevel(30.0), FIXED)),
        Claim(
            "bilevel-100-all",
            "settings",
            "The same with the paper's η₂ = 100: all",
            gain(D, "all", bilevel(100.0), FIXED),
        ),
        Claim(
            "perturbed-fixed",
            "eq. 35",
            "Learning Ω on the perturbed loss, as printed, beats fixed Ω, η₂ = 1: all, it − fixed",
            gain(D, "all", bilevel(1.0, change="perturbed"), FIXED),
        ),
        Claim(
            "perturbed-ce",
            "eq. 35",
            "Learning Ω on the perturbed loss is as good as on CE, η₂ = 10: all, perturbed − CE",
            gain(D, "all", bilevel(10.0, change="perturbed"), bilevel(10.0)),
            KEPT,
            0.01,
        ),
    ],
    seconds=700,
)

M, SHORT = "mnist-lt", {"epochs": 5}
MNIST = Part(
    "metalad-mnist",
    PAPER,
    "MNIST-LT, 100:1, 5 epochs",
    5,
    [
        Claim("mnist-la-few", "eq. 24", "LA helps few-shot classes: LA − CE", gain(M, "few", LA, CE, SHORT)),
        Claim(
            "mnist-printed-few",
            "eq. 30",
            "The first term as printed helps few-shot classes: it − CE",
            gain(M, "few", PRINTED, CE, SHORT),
        ),
        Claim(
            "mnist-sum-ce",
            "table 7",
            "The sum of the three terms beats CE: all, sum − CE",
            gain(M, "all", SUM, CE, SHORT),
        ),
        Claim("mnist-sum-la", "table 7", "The sum beats its first term: all, sum − LA", gain(M, "all", SUM, LA, SHORT)),
        Claim(
            "mnist-isda-few",
            "CIFAR-LT tables",
            "ISDA lowers few-shot accuracy: ISDA − CE",
            gain(M, "few", ISDA, CE, SHORT),
            LOWER,
        ),
        Claim("mnist-nisda-few", "fig. 17", "NISDA does not: NISDA − CE", gain(M, "few", NISDA, CE, SHORT), KEPT, 0.02),
        Claim("mnist-nisda-isda", "fig. 17", "NISDA beats ISDA: all, NISDA − ISDA", gain(M, "all", NISDA, ISDA, SHORT)),
        Claim(
            "mnist-bilevel",
            "eq. 33 to 36",
            "Learnt Ω beats fixed Ω = 1, same images, η₂ = 10: all, learnt − fixed",
            gain(M, "all", bilevel(10.0), FIXED, SHORT),
        ),
        Claim(
            "mnist-weights",
            "fig. 15",
            "Frequent classes have longer weights under CE: rank correlation with counts",
            with_counts(M, norms, **SHORT),
        ),
    ],
    seconds=400,
    needs_mnist=True,
)

NOT_TRIED = Part(
    "metalad-untried",
    PAPER,
    "",
    0,
    [],
    untried=[
        untried(
            "cifar",
            "tables 1 to 6",
            "Error on CIFAR, CIFAR-LT and iNaturalist",
            "no data; see docs/imagenet-lt.md for a recipe",
        ),
        untried("noise", "eq. 17", "Feature noise is variance imbalance; label noise", "not written"),
        untried("local", "fig. 3, 4, 11, 12", "Local imbalance of neighbourhoods", "no such data set"),
        untried("relative-loss", "fig. 22", "Relative loss variation of each class", "not written"),
    ],
)

PARTS = [DIGITS, BILEVEL, MNIST, NOT_TRIED]
