"""A claim of a paper, and what measured values say about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from benchmarks.reproduction.runs import Runs

#: Values that one run gives, or several runs that share a seed: a paired difference, a correlation, a deviation.
Measure = Callable[[Runs], float]

HIGHER, LOWER, KEPT, NOT_RAISED, ZERO = "above 0", "below 0", "not lowered", "not raised", "0"


@dataclass(frozen=True)
class Claim:
    """What a paper says, where it says so, and how it is tried here.

    Attributes:
        name: unique, short.
        where: equation, figure or table of the paper.
        text: the claim, and the difference that is measured.
        measure: one value of a seed; None: not tried.
        expected: where the mean has to lie by the claim.
        margin: how much KEPT and NOT_RAISED may change, or how far from 0 ZERO may be.
        reason: why it was not tried.
        digits: decimals shown.
    """

    name: str
    where: str
    text: str
    measure: Measure | None = None
    expected: str = HIGHER
    margin: float = 0.0
    reason: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Part:
    """Claims of one paper that share runs on one data set.

    ``seconds`` is what all seeds may take of a processor's time: when they are spent and MIN_SEEDS are done, no further
    seed begins.
    """

    name: str
    paper: str
    data: str
    seeds: int
    claims: Sequence[Claim]
    seconds: float = 300.0
    needs_mnist: bool = False
    untried: Sequence[Claim] = field(default_factory=tuple)
    note: str = ""


MIN_SEEDS = 3


def untried(name: str, where: str, text: str, reason: str) -> Claim:
    return Claim(name, where, text, reason=reason)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; nan for the error of a single value."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


def verdict(claim: Claim, values: Sequence[float]) -> str:
    """Whether a claim holds, by twice the standard error of the mean."""
    if bad := sum(not math.isfinite(value) for value in values):
        return f"no: {bad} of {len(values)} seeds gave no finite value"
    if len(values) < 2:
        return "not tried here: fewer than two seeds"
    mean, error = mean_and_error(values)
    low, high = mean - 2 * error, mean + 2 * error
    if claim.expected == ZERO:
        return "yes" if max(-low, high) <= claim.margin else f"no: further from 0 than {claim.margin:g}"
    sign = -1 if claim.expected in (LOWER, NOT_RAISED) else 1
    low, high = (low, high) if sign > 0 else (-high, -low)
    if claim.expected in (KEPT, NOT_RAISED):
        if low > -claim.margin:
            return "yes"
        return "no: the other way" if high < 0 else "no: within the error"
    if low > 0:
        return "yes"
    return "no: the other way" if high < 0 else "no: within the error"
