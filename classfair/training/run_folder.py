"""The folder a run leaves behind: every file appears complete or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

import classfair
from classfair.training.engine import COLUMNS, RunResult, TrainConfig, summarise

METRICS_VERSION = 1
STYLE = {  # label, colour (told apart by colour-blind readers too), marker, shift of the dots
    "ce": ("cross-entropy", "#D55E00", "s", -0.12),
    "la": ("logit adjustment", "#0072B2", "o", 0.12),
}


class RunFolder:
    """A new folder for one job. A job that fails before its first checkpoint leaves nothing.

    Raises OSError with a one-line message if the folder holds files or cannot be written to.

    Use it as a context manager around the job:

        with RunFolder(path) as folder:
            folder.write_json("config.json", {...})
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints: list[Path] = []
        self._created: list[Path] = []
        self._written: list[Path] = []
        try:
            self._created += [p for p in (path, *path.parents) if not p.exists()]  # deepest first
            path.mkdir(parents=True, exist_ok=True)
            if entries := sorted(entry.name for entry in path.iterdir()):
                raise FileExistsError(f"expected a new or empty output folder, got {path}, which holds {entries[0]}")
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            self._remove_created()
            if error.strerror is None:
                raise
            reason = error.strerror.lower()
            raise type(error)(f"expected a writable output folder, got {path} ({reason})") from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self.checkpoints:
            for path in self._written:
                path.unlink(missing_ok=True)
            self._remove_created()

    def write(self, name: str, content: bytes) -> Path:
        """Write to a temporary neighbour, force it to disk, then rename: never half a file."""
        target = self.path / name
        if not target.parent.exists():
            target.parent.mkdir()
            self._created.insert(0, target.parent)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:  # an interrupt too
            temporary.unlink(missing_ok=True)
            raise
        self._written.append(target)
        return target

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(json_ready(content), indent=2, allow_nan=False)
        self.write(name, text.encode() + b"\n")

    def write_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        name = f"checkpoints/{checkpoint['loss']}-seed{checkpoint['seed']}.pt"
        self.checkpoints.append(self.write(name, buffer.getvalue()))

    def write_report(self, results: list[RunResult], config: TrainConfig) -> None:
        """Everything that needs all runs: metrics.json, per_class.csv, per_class_accuracy.png."""
        self.write_json("metrics.json", report(results, config))
        self.write("per_class.csv", per_class_csv(results).encode())
        self.write("per_class_accuracy.png", accuracy_chart(results, config))

    def _remove_created(self) -> None:
        for path in self._created:
            try:
                path.rmdir()
            except OSError:  # never made, or something else lives in it by now
                continue


def json_ready(value: Any) -> Any:
    """Strict JSON has no nan: it becomes null."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def resolved_config(config: TrainConfig, output: Path) -> dict[str, Any]:
    """The configuration with everything that a repetition needs to know."""
    versions = {
        "classfair": classfair.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": version("scikit-learn"),
    }
    return {**config.as_dict(), "output": str(output), "versions": versions}


def report(results: list[RunResult], config: TrainConfig) -> dict[str, Any]:
    """The content of metrics.json; the same job gives the same content."""
    runs = [
        {
            "loss": result.loss,
            "seed": result.seed,
            **result.columns(config),
            "accuracy": result.accuracy.tolist(),
            "train_accuracy": result.train_accuracy.tolist(),
            "train_count": result.train_count.tolist(),
            "train_loss": result.train_loss,
        }
        for result in results
    ]
    return {
        "format_version": METRICS_VERSION,
        "columns": list(COLUMNS),
        "summary": summarise(results, config),
        "runs": runs,
    }


def per_class_csv(results: list[RunResult]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["loss", "seed", "class", "train_count", "test_count", "correct", "accuracy"])
    for result in results:
        counts = zip(result.train_count, result.test_count, result.correct, strict=True)
        for label, (row, accuracy) in enumerate(zip(counts, result.accuracy, strict=True)):
            table.writerow([result.loss, result.seed, label, *row, float(accuracy)])
    return text.getvalue()


def accuracy_chart(results: list[RunResult], config: TrainConfig) -> bytes:
    """PNG: accuracy of every class, classes sorted from most to fewest training images."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for loss in config.loss:
        runs = [result for result in results if result.loss == loss]
        order = [np.argsort(-run.train_count, kind="stable") for run in runs]
        percent = 100 * np.stack([r.accuracy[o] for r, o in zip(runs, order, strict=True)])
        rank = np.arange(1, percent.shape[1] + 1)
        label, color, marker, shift = STYLE[loss]
        axes.plot(rank, percent.mean(0), color=color, marker=marker, lw=2, label=label)
        if len(runs) > 1:  # one dot per seed, beside the line so that both losses stay visible
            beside = np.broadcast_to(rank + shift, percent.shape)
            axes.scatter(beside, percent, s=14, color=color, alpha=0.45, lw=0)
    counts = np.sort(results[0].train_count)[::-1]  # the profile is the same for every seed
    _mark_groups(axes, counts, config)
    seeds = f"lines: mean, dots: {config.seeds} seeds" if config.seeds > 1 else "1 seed"
    axes.set_title(f"Digits, {config.imbalance:g}:1 long-tailed: accuracy per class ({seeds})")
    axes.set_xlabel("training images of the class (classes sorted from most to fewest)")
    axes.set_ylabel("test accuracy of the class (%)")
    axes.set_xticks(rank, [str(count) for count in counts])
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


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
