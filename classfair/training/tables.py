"""What a finished job prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from classfair._names import markup, printable
from classfair.training import totals
from classfair.training.config import TrainConfig
from classfair.training.group_measures import NEED_JOINT
from classfair.training.run_folder import json_ready
from classfair.training.totals import COLUMNS, RunResult, group_columns, summarise

NAMES = {
    "ce": "cross-entropy",
    "la": "logit adjustment",
    "ldam": "label-distribution-aware margins",
    "cb": "class-balanced weights",
    "focal": "focal loss",
    "isda": "implicit semantic data augmentation",
    "nisda": "normalised ISDA",
    "distance": "class distance",
    "metalad": "proportion, variance and distance",
    "estimated-offset": "estimated offset",
}

HEADINGS = {
    "many": "many",
    "medium": "medium",
    "few": "few",
    "all": "all",
    "geometric_mean": "geo. mean",
    "worst_class": "worst",
    "worst_group": "worst group",
    "demographic_parity": "DP diff.",
    "equalized_odds": "EO diff.",
    "iou_sd": "sd of IoU",
}


def print_results(results: list[RunResult], config: TrainConfig, path: Path, *, as_json: bool) -> None:
    """The closing tables, or the summary as JSON, to stdout."""
    summary = summarise(results, config)
    part = "Validation" if config.reads_images else "Test"
    if line := _left_out(results[0], part):
        print(line, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(json_ready(summary), indent=2, allow_nan=False))
        return
    spread = f"mean ± sd over {config.seeds} seeds" if config.seeds > 1 else "1 seed"
    table = Table(
        title=f"{part} accuracy in %, {spread}",
        caption=f"{', '.join(f'{loss}: {NAMES[loss]}' for loss in config.loss)}. many: classes with more than "
        f"{config.many_shot} training images, few: fewer than {config.few_shot}. "
        "all: mean of all classes.",
        box=SIMPLE_HEAD,
    )
    table.add_column("loss")
    for column in COLUMNS:
        table.add_column(HEADINGS[column], justify="right", no_wrap=True)
    for loss in config.loss:
        table.add_row(loss, *(_cell(**summary[loss][column]) for column in COLUMNS))
    console = Console()
    console.print(table)
    if results[0].groups:
        console.print(_group_table(results, summary, config, f"{part} images by group in %, {spread}"))
    console.print(f"Run folder: {printable(path)}", soft_wrap=True, highlight=False, markup=False)


def print_sweep(result: dict[str, Any], config: TrainConfig, path: Path, *, as_json: bool) -> None:
    """The trade-off of a sweep, on test images, or all of it as JSON, to stdout."""
    if as_json:
        print(json.dumps(json_ready(result), indent=2, allow_nan=False))
        return
    table = Table(
        title=f"Weights of {config.fairness} on test images in %, mean of {config.seeds} seeds",
        caption="Test images: every second one. *: chosen on the others: least sd of IoU at little cost.",
        box=SIMPLE_HEAD,
    )
    for column in ("loss", "weight", "all", config.fairness, "sd of IoU", "worst group", "calibration"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for loss, points in result["points"].items():
        for point in points:
            mark = "*" if point["weight"] == result["chosen"][loss] else ""
            test = point["test"]
            shown = [f"{100 * test[name]:.1f}" for name in ("all", "iou_sd", "worst_group", "calibration_error")]
            table.add_row(loss, f"{mark}{point['weight']:g}", shown[0], f"{test['penalty']:.3g}", *shown[1:])
    console = Console()
    console.print(table)
    console.print(f"Run folder: {printable(path)}", soft_wrap=True, highlight=False, markup=False)


def _group_table(results: list[RunResult], summary: dict[str, Any], config: TrainConfig, title: str) -> Table:
    names_of_groups = ", ".join(map(markup, results[0].groups))
    trained = "" if config.fairness == "none" else f" {config.fairness}: the penalty on all of these images, not in %."
    table = Table(
        title=title,
        caption=f"Groups: {names_of_groups}. Differences are the largest between two groups: DP in how "
        f"often a class is predicted, EO in its true or false positives.{trained}",
        box=SIMPLE_HEAD,
    )
    table.add_column("loss")
    names = group_columns(config)
    for column in names:
        table.add_column(HEADINGS.get(column, config.fairness), justify="right", no_wrap=True)
    for loss, columns in summary.items():
        table.add_row(loss, *(_cell(**columns[name], percent=name != "penalty") for name in names))
    return table


def _left_out(result: RunResult, part: str) -> str:
    """What is said of penalties of the whole set that nothing was kept for; nothing if all are there."""
    if not result.groups or result.val.joint is not None:
        return ""
    classes = len(result.class_names)
    return (
        f"{part} penalties {' and '.join(NEED_JOINT)} are left out: their table of {classes} x "
        f"{len(result.groups)} x {classes} numbers is above {totals.MAX_TABLE_BYTES / 2**20:.3g} MiB"
    )


def _cell(mean: float, sd: float, *, percent: bool = True) -> str:
    if mean != mean:  # nan: a group without classes, a penalty that was left out
        return "\N{EN DASH}"
    if percent:
        return f"{100 * mean:.1f}" + (f"±{100 * sd:.1f}" if sd == sd else "")
    return f"{mean:.3g}" + (f"±{sd:.1g}" if sd == sd else "")
