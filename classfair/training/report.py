"""What a finished job reports: metrics.json, per_class.csv and a chart."""

from __future__ import annotations

import csv
import io
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import classfair
from classfair._names import cell
from classfair.training.config import TrainConfig
from classfair.training.data_option import DIGITS
from classfair.training.run_folder import RunFolder
from classfair.training.totals import COLUMNS, RunResult, group_columns, summarise

METRICS_VERSION = 2
CONFIG_VERSION = 1
STYLE = {  # label, colour (told apart by colour-blind readers too), marker, shift of the dots
    "ce": ("cross-entropy", "#D55E00", "s", -0.12),
    "la": ("logit adjustment", "#0072B2", "o", 0.12),
    "ldam": ("LDAM", "#009E73", "^", -0.24),
    "cb": ("class-balanced", "#CC79A7", "D", 0.24),
    "focal": ("focal", "#E69F00", "v", 0.0),
    "isda": ("ISDA", "#56B4E9", "P", -0.18),
    "nisda": ("NISDA", "#F0E442", "X", 0.18),
    "distance": ("class distance", "#000000", "<", -0.06),
    "metalad": ("MetaLAD", "#999999", ">", 0.06),
    "estimated-offset": ("estimated offset", "#7F3C8D", "d", -0.3),
}
MANY_CLASSES = 40  # above, ranks instead of counts on the axis, a dot per class and a line through their running mean


def resolved_config(config: TrainConfig, output: Path, world: int) -> dict[str, Any]:
    """The configuration with everything that a repetition needs to know."""
    packages = {}
    for name in ("classfair", "torch", "numpy", "scikit-learn", "torchvision", "timm"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    versions = {"python": platform.python_version(), **packages, "torch": torch.__version__}
    versions["classfair"] = classfair.__version__
    return {
        "format_version": CONFIG_VERSION,
        **config.as_dict(),
        "processes": world,
        "output": str(output),
        "versions": versions,
    }


def write_report(folder: RunFolder, results: list[RunResult], config: TrainConfig) -> None:
    """Everything that needs all runs: metrics.json, per_class.csv, per_class_accuracy.png."""
    folder.write_json("metrics.json", report(results, config))
    folder.write("per_class.csv", per_class_csv(results).encode())
    folder.write("per_class_accuracy.png", accuracy_chart(results, config))


def report(results: list[RunResult], config: TrainConfig) -> dict[str, Any]:
    """The content of metrics.json; the same job gives the same content."""
    runs: list[dict[str, Any]] = [
        {
            "loss": result.loss,
            "seed": result.seed,
            **result.columns(config),
            **result.val.summary("val", []),
            "accuracy": result.accuracy.tolist(),
            "effective_frequency": result.val.effective_frequency.tolist(),
            "train_accuracy": result.train.accuracy.tolist(),
            "train_count": result.train_count.tolist(),
            "val_count": result.val.count.tolist(),
            "train_loss": result.train_loss,
        }
        for result in results
    ]
    groups = results[0].groups
    if groups:
        for run, result in zip(runs, results, strict=True):
            run["groups"] = {"train": result.train.by_group(groups), "val": result.val.by_group(groups)}
    return {
        "format_version": METRICS_VERSION,
        "class_names": results[0].class_names,
        **({"group_names": groups} if groups else {}),
        "columns": [*COLUMNS, *(group_columns(config) if groups else ())],
        "summary": summarise(results, config),
        "runs": runs,
    }


def per_class_csv(results: list[RunResult]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = ("train_count", "test_count", "correct", "predicted", "accuracy", "effective_frequency")
    table.writerow(["loss", "seed", "class", "name", *columns])
    for result in results:
        val = result.val
        counts = zip(result.train_count, val.count, val.correct, val.predicted, strict=True)
        shares = zip(val.accuracy.tolist(), val.effective_frequency.tolist(), strict=True)
        for label, (row, share) in enumerate(zip(counts, shares, strict=True)):
            table.writerow([result.loss, result.seed, label, cell(result.class_names[label]), *row, *share])
    return text.getvalue()


def accuracy_chart(results: list[RunResult], config: TrainConfig) -> bytes:
    """PNG: accuracy of every class, classes sorted from most to fewest training images."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    counts = np.sort(results[0].train_count)[::-1]
    few_classes = len(counts) <= MANY_CLASSES
    for loss in config.loss:
        runs = [result for result in results if result.loss == loss]
        order = [np.argsort(-run.train_count, kind="stable") for run in runs]
        percent = 100 * np.stack([r.accuracy[o] for r, o in zip(runs, order, strict=True)])
        rank = np.arange(1, percent.shape[1] + 1)
        label, color, marker, shift = STYLE[loss]
        mean = percent.mean(0)
        if few_classes:
            axes.plot(rank, mean, color=color, marker=marker, lw=2, label=label)
        else:
            axes.scatter(rank, mean, s=6, color=color, alpha=0.35, lw=0)
            width = len(mean) // 20
            axes.plot(_running(rank, width), _running(mean, width), color=color, lw=2, label=label)
        if len(runs) > 1 and few_classes:  # one dot per seed, beside the line so that all losses stay visible
            beside = np.broadcast_to(rank + shift, percent.shape)
            axes.scatter(beside, percent, s=14, color=color, alpha=0.45, lw=0)
    _mark_groups(axes, counts, config)
    several = f"lines: mean, dots: {config.seeds} seeds" if few_classes else f"mean of {config.seeds} seeds"
    seeds = several if config.seeds > 1 else "1 seed"
    digits = "Digits" if config.kind in DIGITS else "MNIST"
    tail = f", {config.imbalance:g}:1 long-tailed" if config.imbalance > 1 else ""
    what = config.model if config.reads_images else digits + tail
    axes.set_title(f"{what}: accuracy per class ({seeds})")
    axes.set_ylabel("validation accuracy of the class (%)")
    if few_classes:
        axes.set_xlabel("training images of the class (classes sorted from most to fewest)")
        axes.set_xticks(rank, [str(count) for count in counts])
    else:
        axes.set_xlabel("rank of the class by its number of training images")
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _running(values: np.ndarray, width: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    return np.ma.masked_invalid(windows).mean(axis=1)  # without a warning about windows of nothing but nan


def _mark_groups(axes: Any, counts: np.ndarray, config: TrainConfig) -> None:
    """Name the many-, medium- and few-shot classes above the curves, with lines between them."""
    is_many, is_few = counts > config.many_shot, counts < config.few_shot
    groups = {
        f"many (> {config.many_shot})": is_many,
        "medium": ~(is_many | is_few),
        f"few (< {config.few_shot})": is_few,
    }
    for name, members in groups.items():
        if members.any():
            first, last = np.flatnonzero(members)[[0, -1]] + 1
            axes.text((first + last) / 2, 104, name, ha="center", va="center", color="0.35")
            if last < len(counts):
                axes.axvline(last + 0.5, color="0.6", lw=1, ls="--")
