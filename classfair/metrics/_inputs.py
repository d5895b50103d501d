"""Checks of what metrics are given: numbers in any form become float64 tensors on the CPU."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classfair import _validate as check


def as_numbers(value: Any, function: str, name: str) -> Tensor:
    """The input in float64 on the CPU, or a ValueError that names it."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    try:
        return torch.from_numpy(np.array(value, dtype=np.float64, order="C"))
    except (TypeError, ValueError):
        raise ValueError(f"{function}: expected numbers for {name}, got {value!r:.80}") from None


def as_counts(value: Any, function: str, name: str) -> Tensor:
    counts = as_numbers(value, function, name)
    bad = counts[~(counts.isfinite() & (counts >= 0))]
    if bad.numel():
        raise ValueError(f"{function}: expected finite {name} of at least 0, got {float(bad[0]):g}")
    return counts


def as_class_counts(value: Any, function: str, name: str) -> Tensor:
    """Counts (C,) of at least one class."""
    counts = as_counts(value, function, name)
    if counts.dim() != 1 or not counts.numel():
        raise ValueError(f"{function}: expected {name} of shape (C,) with C >= 1, got {tuple(counts.shape)}")
    return counts


def as_accuracies(value: Any, function: str, name: str = "acc") -> Tensor:
    acc = as_numbers(value, function, name)
    if acc.dim() != 1 or not acc.numel():
        raise ValueError(f"{function}: expected {name} of shape (C,) with C >= 1, got {tuple(acc.shape)}")
    bad = acc[(acc < 0) | (acc > 1)]
    if bad.numel():
        raise ValueError(f"{function}: expected accuracies in [0, 1] or nan, got {float(bad[0]):g}")
    return acc


def check_shots(function: str, many: Any, few: Any) -> None:
    check.check_number(function, "many", many)
    check.check_number(function, "few", few)
    if not 0 <= few <= many:
        raise ValueError(f"{function}: expected 0 <= few <= many, got few={few}, many={many}")


def check_eps(function: str, eps: Any) -> None:
    check.check_number(function, "eps", eps)
    if not 0 < eps <= 1:
        raise ValueError(f"{function}: expected eps in (0, 1], got {eps}")


def normal_quantile(function: str, confidence: Any) -> float:
    """How many standard deviations to either side hold a share ``confidence`` of a normal distribution."""
    check.check_number(function, "confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"{function}: expected confidence in (0, 1), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
