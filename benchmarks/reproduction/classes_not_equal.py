"""Cui et al. 2024, "Classes Are Not Equal": which classes are hard, and what helps them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import classfair
from benchmarks.reproduction.claims import HIGHER, LOWER, ZERO, Claim, Measure, Part, untried
from benchmarks.reproduction.hard_classes import gaussians, mnist_part
from benchmarks.reproduction.measures import CE, gain, norms, with_counts
from benchmarks.reproduction.runs import Runs, Trained, spearman

PAPER = "Classes Are Not Equal"
NEIGHBOURS = 20


@torch.no_grad()
def neighbour_accuracy(trained: Trained) -> torch.Tensor:
    """(C,) of the majority among the nearest training images by the cosine of features."""
    (x, y), (test_x, test_y) = trained.train_images, trained.test_images
    pool, asked = (F.normalize(trained.features(images), dim=1) for images in (x, test_x))
    near = (asked @ pool.T).topk(NEIGHBOURS).indices
    votes = F.one_hot(y[near], len(trained.counts)).sum(1)
    return torch.stack([(votes.argmax(1) == c)[test_y == c].double().mean() for c in range(len(trained.counts))])


def neighbours_below_head(runs: Runs) -> float:
    trained = runs("digits")
    return float(neighbour_accuracy(trained).mean()) - trained["all"]


def lemma_1(runs: Runs) -> float:
    """Largest |G_n + G_p - CF| / CF of a logistic classifier with bias, on the images that it was fitted to."""
    x, y = runs("digits").train_images
    x, weight = x.double(), torch.zeros(10, 64, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    stop: Any = {"max_iter": 2000, "tolerance_grad": 1e-12, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **stop)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        stats = classfair.cross_entropy_with_stats(F.linear(x, weight, bias), y)[1]
    parts = classfair.prediction_bias(stats)
    count = stats.count.sum(0)
    return float(((parts.negative + parts.positive - count).abs() / count).max())


def third_gain(name: str, third: str) -> Measure:
    def measure(runs: Runs) -> float:
        part = mnist_part(runs)
        return part.third(name, third) - part.third("plain", third)

    return measure


def hard_over_easy(name: str) -> Measure:
    """What the hard classes gain more than the easy ones."""
    return lambda runs: third_gain(name, "hard")(runs) - third_gain(name, "easy")(runs)


D = "digits"
DIGITS = Part(
    "classes-digits",
    PAPER,
    "digits-LT, 40:1",
    10,
    [
        Claim(
            "norms", "fig. 5a", "Weight norms follow frequency: rank correlation with counts, CE", with_counts(D, norms)
        ),
        Claim(
            "knn",
            "section 4",
            "So do accuracies of a vote of 20 nearest neighbours in place of the head",
            with_counts(D, neighbour_accuracy),
        ),
        Claim(
            "knn-head",
            "section 4",
            "Neighbours do not beat the head: all, neighbours − head",
            neighbours_below_head,
            LOWER,
        ),
        Claim(
            "lemma",
            "lemma 1",
            "G_n + G_p is the class frequency, with a bias: largest relative deviation",
            lemma_1,
            ZERO,
            1e-5,
            digits=8,
        ),
        Claim(
            "etf",
            "fig. 3b",
            "A fixed simplex head helps few-shot classes: it − CE",
            gain(D, "few", {"head": "etf"}, CE),
        ),
        Claim("crt", "fig. 3b", "So does cRT", gain(D, "few", {"stage2": "crt"}, CE)),
        Claim("tau-norm", "section 4", "So does τ-normalisation, τ = 0.7", gain(D, "few", {"stage2": "tau-norm"}, CE)),
        Claim("lws", "section 4", "So does learnable weight scaling", gain(D, "few", {"stage2": "lws"}, CE)),
    ],
)

EQUAL = {"imbalance": 1.0, "epochs": 60}
BALANCED = Part(
    "classes-balanced",
    PAPER,
    "digits, balanced",
    10,
    [
        Claim(
            "lff-balanced",
            "table 4",
            "On balanced data LfF lowers accuracy: all, it − CE",
            gain(D, "all", {"method": "lff"}, CE, EQUAL),
            LOWER,
        ),
        Claim("jtt-balanced", "table 4", "So does JTT", gain(D, "all", {"method": "jtt"}, CE, EQUAL), LOWER),
        Claim(
            "lff-worst",
            "table 4",
            "LfF lowers the worst class, too: it − CE",
            gain(D, "worst_class", {"method": "lff"}, CE, EQUAL),
            LOWER,
        ),
        Claim("jtt-worst", "table 4", "So does JTT", gain(D, "worst_class", {"method": "jtt"}, CE, EQUAL), LOWER),
    ],
)

HARD = Part(
    "classes-mnist",
    PAPER,
    "2000 images of MNIST, balanced",
    10,
    [
        Claim(
            "same-hard",
            "section 3",
            "The same classes are hard in every training: rank correlation of class accuracies of two models",
            lambda r: spearman(mnist_part(r).accuracy("plain"), mnist_part(r).accuracy_of_another()),
        ),
        Claim(
            "la-ef-hard",
            "table 4",
            "Re-weighting LA by effective frequency helps hard classes: LA(EF) − CE",
            third_gain("la-ef", "hard"),
        ),
        Claim("la-ef-easy", "table 4", "It costs easy classes: LA(EF) − CE", third_gain("la-ef", "easy"), LOWER),
        Claim(
            "cb-ef-hard", "table 4", "Re-weighting CB so helps hard classes: CB(EF) − CE", third_gain("cb-ef", "hard")
        ),
        Claim("cb-ef-easy", "table 4", "It costs easy classes: CB(EF) − CE", third_gain("cb-ef", "easy"), LOWER),
        Claim(
            "shift",
            "table 3",
            "Augmentation (shifts) helps hard classes more than easy ones: gain of hard − gain of easy",
            hard_over_easy("shift"),
        ),
        Claim("mixup", "table 3", "So does MixUp", hard_over_easy("mixup")),
    ],
    needs_mnist=True,
)

SYNTHETIC = Part(
    "classes-gaussians",
    PAPER,
    "20 balanced Gaussian classes",
    10,
    [
        Claim(
            "bias-hard",
            "fig. 4",
            "Hard classes receive more false positives: rank correlation of G_n and accuracy",
            lambda r: spearman(gaussians(r).false_mass, gaussians(r).accuracy),
            LOWER,
        ),
        Claim(
            "variance-hard",
            "section 4",
            "Their features vary more: rank correlation of variance and accuracy",
            lambda r: spearman(gaussians(r).variance, gaussians(r).accuracy),
            LOWER,
        ),
        Claim(
            "angle-hard",
            "section 4",
            "Their mean cosine to other rows is smaller: rank correlation of it and accuracy",
            lambda r: spearman(gaussians(r).cosine, gaussians(r).accuracy),
            HIGHER,
        ),
    ],
)

C, SHORT = "mnist-colour", {"epochs": 3}
LFF, JTT = {"method": "lff"}, {"method": "jtt"}
COLOURS = Part(
    "classes-colours",
    PAPER,
    "MNIST in colours, 3 epochs",
    4,
    [
        Claim(
            "lff-colours",
            "Nam et al. 2020",
            "LfF helps where a colour misleads: all, it − CE",
            gain(C, "all", LFF, CE, SHORT),
        ),
        Claim(
            "lff-worst-colour",
            "Nam et al. 2020",
            "It raises the worst colour: it − CE",
            gain(C, "worst_group", LFF, CE, SHORT),
        ),
        Claim("jtt-colours", "Liu et al. 2021", "JTT helps too: all, it − CE", gain(C, "all", JTT, CE, SHORT)),
        Claim(
            "jtt-worst-colour",
            "Liu et al. 2021",
            "It raises the worst colour: it − CE",
            gain(C, "worst_group", JTT, CE, SHORT),
        ),
    ],
    seconds=360,
    needs_mnist=True,
)

M, FIVE = "mnist-lt", {"epochs": 5}
MNIST = Part(
    "classes-mnist-lt",
    PAPER,
    "MNIST-LT, 100:1, 5 epochs",
    5,
    [
        Claim(
            "mnist-etf",
            "fig. 3b",
            "A fixed simplex head helps few-shot classes: it − CE",
            gain(M, "few", {"head": "etf"}, CE, FIVE),
        ),
        Claim("mnist-crt", "fig. 3b", "So does cRT", gain(M, "few", {"stage2": "crt", "stage2_epochs": 2}, CE, FIVE)),
        Claim(
            "mnist-tau",
            "section 4",
            "So does τ-normalisation, τ = 0.7",
            gain(M, "few", {"stage2": "tau-norm"}, CE, FIVE),
        ),
    ],
    seconds=200,
    needs_mnist=True,
)

NOT_TRIED = Part(
    "classes-untried",
    PAPER,
    "",
    0,
    [],
    untried=[
        untried("imagenet", "tables 1 to 3", "Easy, medium and hard classes of ImageNet and CIFAR-100", "no data"),
        untried("pretraining", "table 2", "MAE and GPaCo", "no data and no pretraining here"),
        untried("policies", "table 3", "AutoAugment, CutMix and Cutout", "made for colour photographs"),
        untried("real-labels", "section 4.2", "Multi-label accuracy on ImageNet-ReaL", "no data"),
        untried("per-class-gain", "fig. 7", "Gain of each class between runs", "not written"),
    ],
)

PARTS = [DIGITS, BALANCED, HARD, SYNTHETIC, COLOURS, MNIST, NOT_TRIED]
