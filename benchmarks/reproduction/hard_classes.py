"""Classes that are hard although they are as frequent as others: on a part of MNIST, and on Gaussian classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import classfair
from benchmarks.reproduction.runs import Runs, head_of
from classfair.metrics import difficulty_accuracy
from classfair.training.mnist import MEAN, SD, read_mnist
from classfair.training.models import mlp

PER_CLASS, EPOCHS, BATCH = 200, 20, 64
SHIFT = 2  # pixels, of the augmentation
SIDE = 28

#: Images (B, 784) and labels (B,) to the loss of a batch.
BatchLoss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def fit(
    widths: tuple[int, ...], x: Tensor, y: Tensor, seed: int, loss: BatchLoss, epochs: int = EPOCHS
) -> nn.Sequential:
    """A perceptron trained by SGD along a cosine to 0."""
    model, generator = mlp(widths, torch.Generator().manual_seed(seed)), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(model, x[chosen], y[chosen], generator).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def plain(model: nn.Module, x: Tensor, y: Tensor, _: torch.Generator) -> Tensor:
    return classfair.cross_entropy(model(x), y)


def of(criterion: nn.Module) -> BatchLoss:
    return lambda model, x, y, _: criterion(model(x), y)


def shifted(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to SHIFT pixels in both directions."""
    dx, dy = torch.randint(-SHIFT, SHIFT + 1, (2, len(x)), generator=generator)
    blank = float(x.min())
    padded = F.pad(x.view(-1, SIDE, SIDE), (SHIFT,) * 4, value=blank)
    rows = (torch.arange(SIDE) + SHIFT + dy[:, None])[:, :, None]
    columns = (torch.arange(SIDE) + SHIFT + dx[:, None])[:, None]
    return classfair.cross_entropy(model(padded[torch.arange(len(x))[:, None, None], rows, columns].flatten(1)), y)


def mixed(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """MixUp with a share drawn uniformly."""
    other, share = torch.randperm(len(x), generator=generator), torch.rand(len(x), generator=generator)
    images = share[:, None] * x + (1 - share[:, None]) * x[other]
    return classfair.cross_entropy(model(images), classfair.MixedTarget(y, y[other], share))


class MnistPart:
    """Two disjoint sets of 200 training images a digit, 10 000 images to judge difficulty on, 10 000 to report on."""

    def __init__(self, runs: Runs) -> None:
        images, labels, test_x, test_y = read_mnist(str(runs.mnist))
        rng = np.random.default_rng(runs.seed)
        orders = [rng.permutation(np.flatnonzero(labels.numpy() == digit)) for digit in range(10)]
        sets = [np.concatenate([order[a:b] for order in orders]) for a, b in ((0, 200), (200, 400), (400, 1400))]
        self.seed = runs.seed
        self.x, self.other_x, self.val_x = (pixels(images[torch.from_numpy(chosen)]) for chosen in sets)
        self.y, self.other_y, self.val_y = (labels[torch.from_numpy(chosen)] for chosen in sets)
        self.test_x, self.test_y = pixels(test_x), test_y
        self._accuracy: dict[str, Tensor] = {}

    def model(self, loss: BatchLoss) -> nn.Sequential:
        return fit((SIDE * SIDE, 100, 100, 10), self.x, self.y, self.seed, loss)

    @cached_property
    def reference(self) -> nn.Sequential:
        return self.model(plain)

    @cached_property
    def stats(self) -> Any:
        """Of the plain model on the images that difficulty is judged on."""
        with torch.no_grad():
            return classfair.cross_entropy_with_stats(self.reference(self.val_x), self.val_y)[1]

    def accuracy(self, name: str) -> Tensor:
        """(C,) on the test images, of a model trained in one of the ways of LOSSES."""
        if name not in self._accuracy:
            model = self.reference if name == "plain" else self.model(LOSSES[name](self))
            self._accuracy[name] = class_accuracy(model, self.test_x, self.test_y)
        return self._accuracy[name]

    def third(self, name: str, third: str) -> float:
        """Mean accuracy of the easy, medium or hard classes, as the plain model finds them on other images."""
        judged = class_accuracy(self.reference, self.val_x, self.val_y)
        return difficulty_accuracy(self.accuracy(name), judged)[third]

    def accuracy_of_another(self) -> Tensor:
        """(C,) of a model of other initial weights, trained on other images."""
        model = fit((SIDE * SIDE, 100, 100, 10), self.other_x, self.other_y, self.seed + 1000, plain)
        return class_accuracy(model, self.test_x, self.test_y)


#: What EF re-weighting is made of: the plain model's effective frequencies on other images.
LOSSES: dict[str, Callable[[MnistPart], BatchLoss]] = {
    "shift": lambda part: shifted,
    "mixup": lambda part: mixed,
    "la-ef": lambda part: of(classfair.LogitAdjustedLoss(classfair.effective_counts(part.stats, torch.ones(10)))),
    "cb-ef": lambda part: of(classfair.ClassBalancedLoss(classfair.effective_counts(part.stats), 0.999)),
}


def pixels(images: Tensor) -> Tensor:
    return ((images.float() / 255 - MEAN) / SD).flatten(1)


@torch.no_grad()
def class_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    stats = classfair.cross_entropy_with_stats(model(x), y)[1]
    return (stats.correct.sum(0) / stats.count.sum(0)).double()


def mnist_part(runs: Runs) -> MnistPart:
    return runs.once("mnist part", lambda: MnistPart(runs))


def _variances(features: Tensor, y: Tensor, classes: int) -> Tensor:
    """(C, D) of each class."""
    variances = classfair.class_moments(features, y, classes, covariance="diag").cov
    assert variances is not None
    return variances


class Gaussians:
    """Twenty equally frequent classes in twenty dimensions, with deviations from 0.5 to 2, and a trained model."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        classes, dim = 20, 20
        mean = torch.randn(classes, dim, generator=generator)
        deviation = torch.linspace(0.5, 2.0, classes)

        def sample(number: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(classes).repeat_interleave(number)
            return mean[y] + deviation[y, None] * torch.randn(len(y), dim, generator=generator), y

        (x, y), (test_x, test_y) = sample(100), sample(300)
        model = fit((dim, 64, 32, classes), x, y, seed, plain)
        with torch.no_grad():
            stats = classfair.cross_entropy_with_stats(model(test_x), test_y)[1]
            features = model[:-1](x)
            self.accuracy = (stats.correct.sum(0) / stats.count.sum(0)).double()
            self.false_mass = classfair.prediction_bias(stats).negative
            self.variance = _variances(features, y, classes).norm(dim=1)
            rows = F.normalize(head_of(model).weight, dim=1)
            self.cosine = (rows @ rows.T).mean(1)


def gaussians(runs: Runs) -> Gaussians:
    return runs.once("gaussians", lambda: Gaussians(runs.seed))
