"""What functions of counts, torchmetrics classes and training runs share; needs no torchmetrics."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classfair import _validate as check

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def as_numbers(value: Any, function: str, name: str) -> Array:
    """The input as a float64 array on the host, or a ValueError that names it."""
    if isinstance(value, torch.Tensor):
        # Through double: NumPy has no bfloat16.
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{function}: expected numbers for {name}, got {value!r:.80}") from None


def as_counts(value: Any, function: str, name: str) -> Array:
    counts = as_numbers(value, function, name)
    bad = counts[~(np.isfinite(counts) & (counts >= 0))]
    if bad.size:
        raise ValueError(f"{function}: expected finite {name} of at least 0, got {bad[0]:g}")
    return counts


def as_accuracies(value: Any, function: str, name: str = "acc") -> Array:
    acc = as_numbers(value, function, name)
    if acc.ndim != 1 or acc.size == 0:
        raise ValueError(f"{function}: expected {name} of shape (C,) with C >= 1, got {acc.shape}")
    bad = acc[(acc < 0) | (acc > 1)]
    if bad.size:
        raise ValueError(f"{function}: expected accuracies in [0, 1] or nan, got {bad[0]:g}")
    return acc


def shot_groups(function: str, train_count: Array, many: float, few: float) -> dict[str, Mask]:
    """(C,) masks of the many-, medium- and few-shot classes."""
    check.check_number(function, "many", many)
    check.check_number(function, "few", few)
    if not 0 <= few <= many:
        raise ValueError(f"{function}: expected 0 <= few <= many, got few={few}, many={many}")
    is_many, is_few = train_count > many, train_count < few
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


def difficulty_groups(reference: Array) -> dict[str, Mask]:
    """(C,) masks of the thirds of the classes by the reference's accuracy, those with nan in none."""
    order = np.argsort(-reference, kind="stable")  # nan last
    thirds = np.array_split(order[: np.count_nonzero(~np.isnan(reference))], 3)
    ids = np.arange(reference.size)
    return {name: np.isin(ids, third) for name, third in zip(("easy", "medium", "hard"), thirds, strict=True)}


def frequency_order(train_count: Array) -> NDArray[np.int64]:
    """Classes from many to few training images, ties by class id."""
    return np.argsort(-train_count, kind="stable").astype(np.int64)


def normal_quantile(function: str, confidence: float) -> float:
    """How many standard deviations to either side hold a share ``confidence`` of a normal distribution."""
    check.check_number(function, "confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"{function}: expected confidence in (0, 1), got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson_terms(acc: Any, count: Any, z: float) -> tuple[Any, Any]:
    """Middle and half width of Wilson's interval, of arrays or of tensors."""
    scale = 1 + z**2 / count
    return (acc + z**2 / (2 * count)) / scale, z / scale * (acc * (1 - acc) / count + (z / (2 * count)) ** 2) ** 0.5


def between_groups(rates: Tensor, reduction: str) -> Tensor:
    """Largest difference, or smallest ratio, between groups (dimension -2) over all other dimensions.

    Groups without a rate are left out, and so is what fewer than two groups have a rate of: nothing to compare.
    """
    missing = rates.isnan()
    comparable = (~missing).sum(-2) > 1
    high = rates.masked_fill(missing, -torch.inf).amax(-2)
    low = rates.masked_fill(missing, torch.inf).amin(-2)
    if reduction == "difference":
        worst = torch.where(comparable, high - low, -torch.inf).amax()
        return torch.where(worst.isinf(), torch.nan, worst)
    # 0 / 0 is NaN: no group has a rate above 0.
    ratio = torch.where(comparable, low / high, torch.nan).nan_to_num(nan=torch.inf).amin()
    return torch.where(ratio.isinf(), torch.nan, ratio)
