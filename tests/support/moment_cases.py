"""Inputs of ``class_moments`` for the conformance suite."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.support.conformance import Inputs

Edit = Callable[[Tensor, Tensor], None]  # features, target


@dataclass(frozen=True)
class Case:
    """Three batches of ``shape`` (N, D) with C classes; ``edit`` breaks or bends a batch."""

    id: str
    shape: tuple[int, int]
    num_classes: int
    edit: Edit | None = None
    offset: float = 3.0  # mean of the features, whose deviation is 2
    momentum: float | None = None  # of an exponential state

    small = False

    def build(self) -> Inputs:
        features, target = map(torch.stack, zip(*map(self.batch, range(3)), strict=True))
        sizes = {"num_classes": self.num_classes, "momentum": self.momentum}
        return {"features": features, "target": target, **sizes}

    def batch(self, number: int = 0) -> tuple[Tensor, Tensor]:
        """Features (N, D) in float64 and labels (N,), a fifth of them -1, which is ignored."""
        g = torch.Generator().manual_seed(sum(map(ord, self.id)) + number)
        features = self.offset + 2 * torch.randn(self.shape, generator=g, dtype=torch.float64)
        target = torch.randint(0, self.num_classes, self.shape[:1], generator=g)
        target[torch.rand(self.shape[0], generator=g) < 0.2] = -1
        if self.edit is not None:
            self.edit(features, target)
        return features, target


def _nonfinite(features: Tensor, target: Tensor) -> None:
    features[1, -1], features[5, 0], features[6] = torch.nan, -torch.inf, torch.inf
    target[[1, 5, 6]] = torch.tensor([0, 1, 1])


def _nonfinite_class(features: Tensor, target: Tensor) -> None:
    """A class with no other rows, and an ignored row."""
    target[target == 2] = 0
    features[3:5, 1], target[3:5] = torch.nan, 2
    features[7], target[7] = torch.nan, -1


def nan_at(features: Tensor, target: Tensor) -> None:
    features[5, 3] = torch.nan


def _fill(value: int) -> Edit:
    return lambda features, target: target.fill_(value)


def _constant(features: Tensor, target: Tensor) -> None:
    features.copy_(features[:1].expand_as(features))


def _skewed(features: Tensor, target: Tensor) -> None:
    target[: target.shape[0] * 9 // 10] = 1


# Below, at and above a vector, an unrolled strip, a block of columns, a block of rows.
_SIZES = [
    ((0, 5), 4),
    ((1, 1), 1),
    ((9, 1), 3),
    ((40, 7), 5),
    ((31, 32), 2),
    ((33, 33), 1),
    ((65, 129), 1),
    ((200, 31), 2),
    ((7, 511), 3),
    ((5, 513), 40),
    ((3, 2048), 60),
    ((6, 2049), 50),
    ((300, 6), 2),
]
CASES = [Case(f"{n}x{d}-{c}", (n, d), c) for (n, d), c in _SIZES] + [
    Case("nonfinite", (40, 37), 4, _nonfinite),
    Case("nonfinite-class", (40, 600), 4, _nonfinite_class),
    Case("nonfinite-many", (300, 9), 2, _nonfinite),
    Case("all-ignored", (9, 5), 4, _fill(-1)),
    Case("one-label", (100, 9), 6, _fill(4)),
    Case("last-label", (3, 9), 8142, _fill(8141)),
    Case("constant", (40, 21), 3, _constant),
    Case("skewed", (200, 17), 12, _skewed),
    Case("large-offset", (90, 40), 4, offset=1e4),
    Case("large-offset-many", (300, 9), 1, offset=1e4),
]


#: The same with an exponential state.
EXPONENTIAL = [replace(c, id=f"{c.id}-exponential", momentum=0.3) for c in CASES if c.shape[1] < 100]
STATE = ("count", "mean", "variance", "mean error", "variance error")


def zero_state(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """What :data:`STATE` names of no sample, (C,) or (C, D)."""
    count = torch.zeros(shape[0], dtype=torch.int64, device=device)
    return [count, *torch.zeros(4, *shape, dtype=dtype, device=device).unbind()]
