"""Inputs of ``class_moments`` for its conformance suite, and how a back-end is compared with the oracle."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from classfair.ops import SlotMoments, class_moments, class_moments_merge, label_index
from tests.support.conformance import assert_as_accurate

Edit = Callable[[Tensor, Tensor], None]  # features, target


@dataclass(frozen=True)
class Case:
    """``count`` batches of ``shape`` (N, D) with C classes; ``edit`` breaks or bends a batch."""

    id: str
    shape: tuple[int, int]
    num_classes: int
    edit: Edit | None = None
    offset: float = 3.0  # mean of the features, whose deviation is 2

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


def zero_state(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """count, mean, variance and error of no sample."""
    shape = (case.num_classes, case.shape[1])
    count = torch.zeros(case.num_classes, dtype=torch.int64, device=device)
    return [count, *torch.zeros(3, *shape, dtype=dtype, device=device).unbind()]


def run(
    batches: list[tuple[Tensor, Tensor]], case: Case, backend: str, *, momentum: float | None, error: bool
) -> tuple[list[SlotMoments], list[Tensor]]:
    """Moments of each batch, and the state after all of them: count, mean, variance (and error)."""
    features = batches[0][0]
    acc = torch.float64 if features.dtype == torch.float64 else torch.float32
    state, results = zero_state(case, acc, features.device.type), []
    for values, target in batches:
        index = label_index(target, case.num_classes, ignore_index=-1, backend="reference")
        results.append(class_moments(values, index, backend=backend))
        used = state if error else state[:3]
        class_moments_merge(results[-1], index.key_of_slot, *used, momentum=momentum, backend=backend)
    return results, state


def check_case(case: Case, backend: str, device: str, dtype: torch.dtype, momentum: float | None = None) -> None:
    """Moments of three batches and the state they leave, against the float64 oracle.

    Means and variances are sums over the rows of a class, in which rounding errors walk. Means in float32 are off by
    the rounding of their own size, and their differences enter the variances of the state at first order.
    """
    batches = [tuple(t.to(device) for t in (f.to(dtype), y)) for f, y in map(case.batch, range(3))]
    check_batches(batches, case, backend, dtype, momentum)


def check_batches(
    batches: list[tuple[Tensor, Tensor]], case: Case, backend: str, dtype: torch.dtype, momentum: float | None = None
) -> None:
    """The same of batches on their device."""
    error = momentum is None
    before = [f.clone() for f, _ in batches]
    got, state = run(batches, case, backend, momentum=momentum, error=error)
    exact = [(f.double().cpu(), y.cpu()) for f, y in batches]
    truth, true_state = run(exact, case, "reference", momentum=momentum, error=error)
    alike = [(f.cpu(), y.cpu()) for f, y in batches]
    same, same_state = run(alike, case, "reference", momentum=momentum, error=error)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"acc": acc, "terms": max(1, case.shape[0])}
    for one, exactly, likewise in zip(got, truth, same, strict=True):
        assert torch.equal(one.count.cpu(), exactly.count), f"count: {one.count.tolist()[:20]}"
        assert torch.equal(one.nonfinite.cpu(), exactly.nonfinite), f"nonfinite: {one.nonfinite.item()}"
        for name in ("mean", "variance"):
            assert_as_accurate(name, *(getattr(o, name) for o in (one, exactly, likewise)), **options)
        single = exactly.count == 1
        assert bool((one.variance.cpu()[single] == 0).all()), "variance of a single row"
    assert torch.equal(state[0].cpu(), true_state[0]), f"state count: {state[0].tolist()[:20]}"
    assert_as_accurate("state mean", state[1], true_state[1], same_state[1], **options)
    size = float(true_state[1].abs().amax().clamp_min(1)) if case.shape[0] else 1.0
    options["terms"] = max(options["terms"], int(size**2))
    assert_as_accurate("state variance", state[2], true_state[2], same_state[2], **options)
    for old, (f, _) in zip(before, batches, strict=True):
        assert torch.equal(old.nan_to_num(nan=7.0), f.nan_to_num(nan=7.0)), "the features were written"
