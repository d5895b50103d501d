"""One job for each weight of a penalty: what fairness costs, chosen on some images and reported on others."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import classfair
from classfair import metrics
from classfair.training.batches import EvaluationOrder
from classfair.training.config import TrainConfig
from classfair.training.distributed import SINGLE, Processes
from classfair.training.engine import Run
from classfair.training.group_measures import measures
from classfair.training.group_table import NO_GROUP
from classfair.training.jobs import prepare, run_all
from classfair.training.report import resolved_config, write_report
from classfair.training.run_folder import CONFIG, RunFolder
from classfair.training.sources import load_data
from classfair.training.totals import Epoch

SWEEP_VERSION = 1
HALVES = ("validation", "test")  # images with even and with odd numbers
COST = 0.02  # of the best balanced accuracy that the chosen weight may lose
BINS = 15  # of the calibration error
COLUMNS = ("all", "penalty", "iou_sd", "worst_group", "calibration_error")


def sweep(
    config: TrainConfig,
    folder: RunFolder | None,
    on_epoch: Callable[[Epoch], None],
    *,
    device: torch.device,
    processes: Processes = SINGLE,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Train with every weight, each in a folder of its own within the job's; compare them on the main process.

    A penalty is of probabilities, and a model can meet it by being unsure: so the spread of IoU of predicted classes
    and the calibration error stand beside it. Arguments: as those of :func:`classfair.training.train`.
    """
    jobs = {weight: _job(config, weight) for weight in (0.0, *config.fairness_sweep)}
    begun = {w: resume / name_of(w) for w in jobs if resume is not None and (resume / name_of(w) / CONFIG).exists()}
    processes.sum_(torch.zeros(1, device=device))  # all have looked before the main one writes
    if folder is None:
        for weight, job in jobs.items():
            run_all(job, None, on_epoch, device, processes, begun.get(weight))
        return {}
    with folder:
        if resume is None:
            folder.write_json(CONFIG, resolved_config(config, folder.path, processes.world))
        for weight, job in jobs.items():
            _train(job, folder, folder.path / name_of(weight), begun.get(weight), on_epoch, device, processes)
        places = {weight: folder.path / name_of(weight) for weight in jobs}
        result = compare({weight: _measured(job, places[weight], device) for weight, job in jobs.items()}, config)
        folder.write_json("sweep.json", result)
        folder.write("sweep.png", chart(result))
    return result


def _train(
    job: TrainConfig,
    parent: RunFolder,
    place: Path,
    begun: Path | None,
    on_epoch: Callable[[Epoch], None],
    device: torch.device,
    processes: Processes,
) -> None:
    """The job of one weight, on the main process."""
    folder = RunFolder(place, resume=begun is not None)
    try:
        with folder:
            if begun is None:
                folder.write_json(CONFIG, resolved_config(job, place, processes.world))
            write_report(folder, run_all(job, folder, on_epoch, device, processes, begun), job)
    finally:
        parent.has_checkpoint |= folder.has_checkpoint
        parent.finished += [f"{place.name}/{name}" for name in folder.finished]


def name_of(weight: float) -> str:
    return f"weight-{weight:g}"


def _job(config: TrainConfig, weight: float) -> TrainConfig:
    return replace(config, fairness_sweep=(), fairness_weight=weight)


def compare(measured: dict[float, dict[str, dict[str, dict[str, float]]]], config: TrainConfig) -> dict[str, Any]:
    """``points[loss]``: means over seeds by weight and half. ``chosen[loss]``: the weight with the least spread of IoU
    on validation among those that lose at most COST of the best balanced accuracy there."""
    points: dict[str, Any] = {}
    chosen: dict[str, float] = {}
    for loss in config.loss:
        points[loss] = [
            {"weight": weight, **{half: by_loss[loss][half] for half in HALVES}} for weight, by_loss in measured.items()
        ]
        best = max(point["validation"]["all"] for point in points[loss])
        able = [point for point in points[loss] if point["validation"]["all"] >= best - COST]
        chosen[loss] = min(able, key=lambda point: point["validation"]["iou_sd"])["weight"]
    return {"format_version": SWEEP_VERSION, "fairness": config.fairness, "points": points, "chosen": chosen}


def _measured(config: TrainConfig, folder: Path, device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """By loss and half, means over seeds of what finished runs say of the validation images."""
    rows: dict[str, dict[str, list[dict[str, float]]]] = {loss: {half: [] for half in HALVES} for loss in config.loss}
    for seed in range(config.seed, config.seed + config.seeds):
        data = load_data(config, seed)
        for loss in config.loss:
            run = prepare(loss, seed, data, config, device, SINGLE, folder)
            logits, target, group = predictions(run)
            for start, half in enumerate(HALVES):
                part = slice(start, None, 2)
                rows[loss][half].append(measure(logits[part], target[part], group[part], run))
    return {
        loss: {
            half: {name: float(np.mean([row[name] for row in some])) for name in COLUMNS}
            for half, some in halves.items()
        }
        for loss, halves in rows.items()
    }


@torch.no_grad()
def predictions(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C), labels and groups of all validation images, on the CPU."""
    run.model.eval()
    groups = run.data.groups
    assert groups is not None
    logits, targets = [], []
    order = EvaluationOrder(run.data.num_val, run.config.val_batch_size, SINGLE)
    for images, target, _ in run._batches(run.data.val, order, None):
        output = run.model(images.to(run.device))
        output = output[1] if isinstance(output, tuple) else output  # of a model that returns features too
        logits.append(output.float().cpu())
        targets.append(target.cpu())
    return torch.cat(logits), torch.cat(targets), groups.val


def measure(logits: Tensor, target: Tensor, group: Tensor, run: Run) -> dict[str, float]:
    named = (group != NO_GROUP) & (target >= 0)
    _, stats = classfair.cross_entropy_with_stats(
        logits[named], target[named], group=group[named], num_groups=len(run.group_names), joint=True
    )
    fares = measures(stats)
    known = target >= 0
    predicted, classes = logits.argmax(1), logits.shape[1]
    correct = torch.bincount(target[known & (predicted == target)], minlength=classes).numpy()
    counts = torch.bincount(target[known], minlength=classes).numpy()
    return {
        "all": metrics.balanced_accuracy(metrics.per_class_accuracy(correct, counts)),
        "penalty": fares["penalties"][run.config.fairness],
        "iou_sd": fares["iou_sd"],
        "worst_group": fares["worst_group"],
        "calibration_error": calibration_error(logits[known], target[known]),
    }


def calibration_error(logits: Tensor, target: Tensor) -> float:
    """Expected calibration error: confidence against accuracy, in bins of equal width (Guo et al. 2017)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    number = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gap = confidence - (predicted == target).double()
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, number, gap)
    return float(sums.abs().sum() / len(target))


def chart(result: dict[str, Any]) -> bytes:
    """PNG: accuracy over the spread of IoU on test images, one point for each weight, the chosen one ringed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for loss, points in result["points"].items():
        x, y = ([100 * point["test"][name] for point in points] for name in ("iou_sd", "all"))
        axes.plot(x, y, marker="o", label=loss)
        for point, *spot in zip(points, x, y, strict=True):
            at = spot[0], spot[1]
            axes.annotate(f"{point['weight']:g}", at, xytext=(5, 4), textcoords="offset points", fontsize=8)
            if point["weight"] == result["chosen"][loss]:
                axes.plot(*at, marker="o", ms=14, mfc="none", mec="black")
    axes.set_title(f"{result['fairness']}: what each weight of the penalty costs (test images; ringed: chosen)")
    axes.set_xlabel("standard deviation of the groups' IoU (%)")
    axes.set_ylabel("mean accuracy of classes (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
