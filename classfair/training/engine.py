"""The training job: its configuration, one training run, and the runs of all seeds and losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import classfair
from classfair import metrics
from classfair.training.data import HEAD_COUNT, NUM_CLASSES, Split, digits_long_tailed
from classfair.training.model import mlp

WIDTHS = (64, 64, 32, NUM_CLASSES)
LOSSES = ("ce", "la")
COLUMNS = ("many", "medium", "few", "all", "geometric_mean", "worst_class")
CHECKPOINT_VERSION = 1

Criterion = classfair.CrossEntropyLoss | classfair.LogitAdjustedLoss


class DeviceUnavailableError(RuntimeError):
    """The requested device exists in PyTorch but not on this machine."""


def _option(default: Any, text: str, **cli: Any) -> Any:
    """A dataclass field that carries its own help text, for the command line to show."""
    return field(default=default, metadata={"help": text, **cli})


@dataclass(frozen=True)
class TrainConfig:
    """What to train. Wrong values raise ValueError: "expected X, got Y"."""

    data: str = _option(
        "digits",
        "Data set: digits, the 8x8 pixel handwritten digits that come with scikit-learn, made "
        "long-tailed. Half of them is the balanced test set.",
        metavar="{digits}",
    )
    loss: tuple[str, ...] = _option(
        LOSSES,
        "Losses to train with, one or several: ce is plain cross-entropy, la is logit adjustment, "
        "which makes up for rare classes.",
        metavar="{ce,la} ...",
    )
    tau: float = _option(1.0, "Strength of logit adjustment, no unit; 0 is plain cross-entropy. Only la uses it.")
    epochs: int = _option(150, "Passes over the training images.", aliases=("-e",))
    batch_size: int = _option(64, "Training images per optimiser step.", aliases=("-b",))
    lr: float = _option(0.1, "Learning rate at the start; it falls to 0 along a cosine.")
    momentum: float = _option(0.9, "Momentum of SGD, from 0 up to but excluding 1.")
    weight_decay: float = _option(5e-4, "L2 penalty of SGD on all parameters, at least 0.", aliases=("--wd",))
    seed: int = _option(0, "First random seed. A seed fixes data split, rare classes, initial weights and batches.")
    seeds: int = _option(3, "Number of seeds, counted up from --seed; every loss is trained once with each.")
    imbalance: float = _option(
        40.0,
        "Images of the most frequent class per image of the rarest, from 1 (balanced) to "
        f"{HEAD_COUNT}. The most frequent class has {HEAD_COUNT} training images.",
    )
    many_shot: int = _option(25, "A class with more training images than this counts as many-shot in the table.")
    few_shot: int = _option(5, "A class with fewer training images than this counts as few-shot in the table.")
    device: str = _option("cpu", "Where to compute: cpu, cuda or cuda:N.", metavar="DEVICE")

    def __post_init__(self) -> None:
        known = len(self.loss) > 0 and set(self.loss) <= set(LOSSES)
        rules = {
            "data": (self.data == "digits", "to be digits"),
            "loss": (known, f"to be one or several of {', '.join(LOSSES)}"),
            "tau": (_within(self.tau, 0), "of at least 0"),
            "epochs": (self.epochs >= 1, "of at least 1"),
            "batch_size": (self.batch_size >= 1, "of at least 1"),
            "lr": (_within(self.lr, 0) and self.lr > 0, "greater than 0"),
            "momentum": (0 <= self.momentum < 1, "from 0 up to but excluding 1"),
            "weight_decay": (_within(self.weight_decay, 0), "of at least 0"),
            "seed": (0 <= self.seed < 2**32 - max(self.seeds, 1), "from 0 up to 2**32 - seeds"),
            "seeds": (self.seeds >= 1, "of at least 1"),
            "imbalance": (
                1 <= self.imbalance <= HEAD_COUNT,
                f"from 1 to {HEAD_COUNT} (above, the rarest class gets no image)",
            ),
            "few_shot": (
                0 <= self.few_shot <= self.many_shot,
                f"from 0 to many_shot ({self.many_shot})",
            ),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                value = getattr(self, name)
                shown = " ".join(value) or "none" if isinstance(value, tuple) else value
                raise ValueError(f"expected {name} {expected}, got {shown}")
        object.__setattr__(self, "loss", tuple(dict.fromkeys(self.loss)))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "loss": list(self.loss)}


def _within(value: float, low: float) -> bool:
    return math.isfinite(value) and value >= low


@dataclass(frozen=True)
class Epoch:
    """Where a run stands after an epoch."""

    loss: str
    seed: int
    epoch: int  # counted from 1
    train_loss: float
    correct: NDArray[np.int64]  # (C,) on the test half
    test_count: NDArray[np.int64]  # (C,)


@dataclass(frozen=True)
class RunResult:
    """One loss with one seed: counts and accuracies per class after the last epoch."""

    loss: str
    seed: int
    train_count: NDArray[np.int64]  # (C,)
    test_count: NDArray[np.int64]  # (C,)
    correct: NDArray[np.int64]  # (C,) on the test half
    train_accuracy: NDArray[np.float64]  # (C,) measured during the last training epoch
    train_loss: list[float]  # per epoch

    @property
    def accuracy(self) -> NDArray[np.float64]:
        return metrics.per_class_accuracy(self.correct, self.test_count)

    def columns(self, config: TrainConfig) -> dict[str, float]:
        """The columns of the closing table, in the order of COLUMNS."""
        accuracy = self.accuracy
        groups = metrics.shot_accuracy(accuracy, self.train_count, many=config.many_shot, few=config.few_shot)
        return {
            **groups,
            "all": metrics.balanced_accuracy(accuracy),
            "geometric_mean": metrics.geometric_mean_accuracy(accuracy),
            "worst_class": metrics.worst_class_accuracy(accuracy),
        }


def summarise(results: list[RunResult], config: TrainConfig) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds: ``summary[loss][column]["mean" | "sd"]``."""
    summary: dict[str, Any] = {}
    for loss in config.loss:
        rows = [result.columns(config) for result in results if result.loss == loss]
        summary[loss] = {column: _mean_sd([row[column] for row in rows]) for column in COLUMNS}
    return summary


def _mean_sd(values: list[float]) -> dict[str, float]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "sd": sd}


def resolve_device(name: str) -> torch.device:
    """The device of that name, after checking that it works here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"expected device to be cpu, cuda or cuda:N, got {name}") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise DeviceUnavailableError(f"expected a device of this machine, got {name}") from None
    return device


def build_criterion(loss: str, class_counts: torch.Tensor, tau: float) -> Criterion:
    if loss == "la":
        return classfair.LogitAdjustedLoss(class_counts, tau=tau)
    return classfair.CrossEntropyLoss()


def train_epoch(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    split: Split,
    batches: tuple[torch.Tensor, ...],
) -> tuple[float, NDArray[np.float64]]:
    """Mean loss per image and accuracy per class (C,) of one pass over the training images."""
    model.train()
    criterion.train()
    loss_sum = torch.zeros((), device=split.train_x.device)
    counts = torch.zeros(2, NUM_CLASSES, dtype=torch.int64, device=split.train_x.device)
    for index in batches:
        logits = model(split.train_x[index])  # (B, C)
        loss, stats = criterion.with_stats(logits, split.train_y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(index)
        counts += torch.cat([stats.correct, stats.count])  # 2 x (1, C)
    return float(loss_sum) / len(split.train_y), metrics.per_class_accuracy(*counts)


@torch.no_grad()
def evaluate(model: nn.Module, criterion: Criterion, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Correct and all test images per class, (C,) each."""
    model.eval()
    criterion.eval()
    _, stats = criterion.with_stats(model(split.test_x), split.test_y)
    return stats.correct[0].cpu().numpy(), stats.count[0].cpu().numpy()


def fit(
    loss: str, seed: int, split: Split, config: TrainConfig, on_epoch: Callable[[Epoch], None]
) -> tuple[RunResult, dict[str, Any]]:
    """Train once; returns the result and the checkpoint of the last epoch.

    Weights and batches come from two generators of the same seed, whatever the loss: runs that
    differ only in the loss are paired.
    """
    device = split.train_x.device
    model = mlp(WIDTHS, torch.Generator().manual_seed(seed)).to(device)
    shuffle = torch.Generator().manual_seed(seed)
    counts = classfair.class_counts(split.train_y, NUM_CLASSES)
    criterion = build_criterion(loss, counts, config.tau).to(device)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    losses: list[float] = []
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(len(split.train_y), generator=shuffle).to(device)
        batches = order.split(config.batch_size)
        train_loss, train_accuracy = train_epoch(model, criterion, optimizer, split, batches)
        if not math.isfinite(train_loss):
            raise FloatingPointError(
                f"expected finite {loss} loss, got {train_loss} in epoch {epoch}: try a smaller lr"
            )
        schedule.step()
        losses.append(train_loss)
        correct, test_count = evaluate(model, criterion, split)
        on_epoch(Epoch(loss, seed, epoch, train_loss, correct, test_count))
    result = RunResult(loss, seed, counts.cpu().numpy(), test_count, correct, train_accuracy, losses)
    states: dict[str, Any] = {"model": model, "criterion": criterion, "optimizer": optimizer}
    return result, {
        "format_version": CHECKPOINT_VERSION,
        "loss": loss,
        "seed": seed,
        "epoch": config.epochs,
        "config": config.as_dict(),
        **{name: part.state_dict() for name, part in states.items()},
    }


def run_all(config: TrainConfig, on_epoch: Callable[[Epoch], None]) -> Iterator[tuple[RunResult, dict[str, Any]]]:
    """Every loss with every seed; yields each run as soon as it is finished."""
    device = resolve_device(config.device)
    for seed in range(config.seed, config.seed + config.seeds):
        split = digits_long_tailed(seed, config.imbalance).to(device)
        for loss in config.loss:
            yield fit(loss, seed, split, config, on_epoch)
