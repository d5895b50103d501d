"""The loss, the optimiser and their schedules, as configured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import classfair
from classfair.priors import counts_of_frequency
from classfair.training.config import TrainConfig
from classfair.training.report import METRICS_VERSION
from classfair.training.schema import CheckpointError, Number, read_json

TERMS = {"nisda": ("variance",), "distance": ("distance",), "metalad": ("proportion", "variance", "distance")}
WARMUP_START = 0.01  # of the learning rate, in the first epoch of its warm-up


def build_criterion(
    loss: str, config: TrainConfig, counts: Tensor, effective: Tensor | None, feature_dim: int
) -> classfair.CrossEntropyLoss:
    """The loss as a sum over images: the step divides by the weights of all processes and forward passes."""
    common: dict[str, Any] = {"reduction": "sum", "label_smoothing": config.label_smoothing}
    if loss == "la":
        return classfair.LogitAdjustedLoss(counts if effective is None else effective, config.tau, **common)
    if loss == "ldam":
        return classfair.LDAMLoss(counts, config.max_margin, scale=config.cosine_scale, **common)
    if loss == "cb":
        return classfair.ClassBalancedLoss(counts if effective is None else effective, config.beta, **common)
    if loss == "isda":
        return classfair.ISDALoss(counts.numel(), feature_dim, strength=config.strength, **common)
    if loss in TERMS:
        return classfair.MetaLADLoss(counts, feature_dim, omega=config.omega, terms=TERMS[loss], **common)
    if loss == "estimated-offset":
        return classfair.EstimatedOffsetLoss(config.center_weight, config.uniform_weight, **common)
    if loss == "focal":
        return classfair.FocalLoss(config.gamma, **common)
    return classfair.CrossEntropyLoss(**common)


def build_schedules(criterion: classfair.CrossEntropyLoss, config: TrainConfig, counts: Tensor) -> list[Any]:
    """What changes the loss from epoch to epoch."""
    schedules: list[Any] = []
    if isinstance(criterion, classfair.ISDALoss):
        schedules.append(classfair.ISDARamp(criterion, config.epochs))
    if config.loss_warmup:
        schedules.append(classfair.Warmup(criterion, config.loss_warmup))
    if config.drw_start:
        drw = classfair.DeferredReweighting(criterion, counts, start=config.drw_start, beta=config.beta)
        schedules.append(drw)
    return schedules


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.opt == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)


def build_lr_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> lr_scheduler.LRScheduler:
    """Stepped once per epoch."""
    warmup = config.lr_warmup_epochs
    main: lr_scheduler.LRScheduler
    if config.lr_scheduler == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, config.epochs - warmup)
    elif config.lr_scheduler == "step":
        main = lr_scheduler.StepLR(optimizer, config.lr_step_size, config.lr_gamma)
    else:
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return main
    rising = lr_scheduler.LinearLR(optimizer, WARMUP_START, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rising, main], [warmup])


def read_effective_counts(run: Path, loss: str, seed: int, class_names: list[str]) -> Tensor:
    """(C,) class counts for la or cb from what the plain cross-entropy run of that seed measured on validation images.

    As :func:`classfair.effective_counts`: effective frequencies alone for la, times the numbers of images for cb.
    """
    run_schema = {"loss": str, "seed": int, "effective_frequency": [Number | None], "val_count": [int]}
    try:
        report = read_json(run / "metrics.json", {"class_names": [str], "runs": [run_schema]}, METRICS_VERSION)
    except CheckpointError as error:
        raise ValueError(f"expected effective_frequency to name a finished run folder, got {run} ({error})") from None
    runs = [r for r in report["runs"] if r["seed"] == seed]
    runs = [r for r in runs if r["loss"] == "ce"] or runs
    names, values = report["class_names"], runs[0]["effective_frequency"] if len(runs) == 1 else None
    if values is None:
        raise ValueError(f"expected one run of seed {seed}, of ce if there are several, in {run}, got {len(runs)}")
    if names != class_names:
        raise ValueError(f"expected a run with the same classes in {run}, got others")
    if len(values) != len(names) or not all(value is None or 0 <= value <= 1 for value in values):
        raise ValueError(f"expected {len(names)} effective frequencies from 0 to 1 in {run}, got others")
    number = runs[0]["val_count"]
    if [n > 0 for n in number] != [value is not None for value in values] or not any(number):
        raise ValueError(f"expected images where there are effective frequencies in {run}, got others")
    frequency = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    counts = torch.tensor(number, dtype=torch.float64) if loss == "cb" else torch.ones_like(frequency)
    return counts_of_frequency(frequency, counts, measured=loss == "cb")
