"""Measures that many claims share: differences of two runs, and correlations over the classes of one."""

from __future__ import annotations

from typing import Any

from benchmarks.reproduction.claims import Measure
from benchmarks.reproduction.runs import Runs, Trained, spearman

CE: dict[str, Any] = {"loss": "ce"}


def gain(
    data: str, column: str, of: dict[str, Any], over: dict[str, Any], both: dict[str, Any] | None = None
) -> Measure:
    """A column of the one run less that of the other, with the same seed; ``both`` are options of both."""

    def measure(runs: Runs) -> float:
        first, second = (runs(data, **{**(both or {}), **options}) for options in (of, over))
        return first[column] - second[column]

    return measure


def area_gain(data: str, of: dict[str, Any], over: dict[str, Any]) -> Measure:
    """How much further from a straight line the false positives of the one run accumulate."""

    def measure(runs: Runs) -> float:
        first, second = (runs(data, **options) for options in (of, over))
        return abs(first.false_positive_area) - abs(second.false_positive_area)

    return measure


def with_counts(data: str, what: Any, **options: Any) -> Measure:
    """Rank correlation over classes of ``what(trained)`` with the number of training images."""

    def measure(runs: Runs) -> float:
        trained: Trained = runs(data, **options)
        return spearman(what(trained), trained.counts)

    return measure


def norms(trained: Trained) -> Any:
    return trained.head.weight.norm(dim=1)
