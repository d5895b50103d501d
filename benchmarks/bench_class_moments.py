"""Moments of a batch and their merge into running state: ``python -m benchmarks.bench_class_moments``.

That measures providers in turn, in a process with malloc pinned, and prints medians and ratios to the best torch
formulation. ``pytest benchmarks/bench_class_moments.py --benchmark-enable -k ...`` times one provider after the other
under pytest-benchmark. Each provider is first checked against float64 on a small batch.
"""

import itertools
import os
import statistics as numbers
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from classfair import ClassStatistics, backends

from .measure import MALLOC, interleave

State = tuple[Tensor, Tensor, Tensor]  # count (C,), mean (C, D), variance (C, D)
Update = Callable[[Tensor, Tensor], object]


class Workload(NamedTuple):
    """A batch of features; variances are merged into the state of all classes."""

    rows: int
    classes: int
    columns: int
    reason: str


WORKLOADS = {
    "A": Workload(256, 1000, 2048, "ImageNet, ResNet-50: most labels occur once in a batch"),
    "B": Workload(1024, 1000, 768, "ImageNet, ViT-B: labels repeat"),
    "C": Workload(256, 8142, 2048, "iNaturalist 2018: state far larger than a batch"),
}
YARDSTICK = "present"
SECONDS = 3.0
#: The published formulation is left out where one of its N x C x D tensors is larger than this.
MAX_PUBLISHED_BYTES = 2.2e9


def zero_state(workload: Workload, dtype: torch.dtype) -> State:
    shape = (workload.classes, workload.columns)
    return torch.zeros(workload.classes, dtype=dtype), torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def dense(state: State) -> Update:
    """Sums of every class by index_add_: simple, and all of the state is read and written."""
    count, mean, variance = state

    def update(x: Tensor, target: Tensor) -> None:
        n = torch.zeros_like(count).index_add_(0, target, torch.ones_like(x[:, 0]))
        divisor = n.clamp_min(1)[:, None]
        m = torch.zeros_like(mean).index_add_(0, target, x) / divisor
        deviation = x - m[target]
        v = torch.zeros_like(mean).index_add_(0, target, deviation * deviation) / divisor
        w = (n / (count + n).clamp_min(1))[:, None]
        delta = m - mean
        variance.lerp_(v, w).add_(w * (1 - w) * delta * delta)
        mean.add_(w * delta)
        count.add_(n)

    return update


def present(state: State) -> Update:
    """The same for the labels present only: the best that torch's own calls do on a CPU. Waits for a GPU."""
    count, mean, variance = state

    def update(x: Tensor, target: Tensor) -> None:
        labels, slot = torch.unique(target, return_inverse=True)
        n = x.new_zeros(labels.numel()).index_add_(0, slot, torch.ones_like(x[:, 0]))
        m = x.new_zeros(labels.numel(), x.shape[1]).index_add_(0, slot, x) / n[:, None]
        deviation = x - m[slot]
        v = torch.zeros_like(m).index_add_(0, slot, deviation * deviation) / n[:, None]
        w = (n / (count[labels] + n))[:, None]
        delta = m - mean[labels]
        variance.index_copy_(0, labels, variance[labels].lerp_(v, w).add_(w * (1 - w) * delta * delta))
        mean.index_add_(0, labels, w * delta)
        count.index_add_(0, labels, n)

    return update


def published(state: State) -> Update:
    """The estimator of Wang et al. 2019 (ISDA), from its formulas: features and labels as (N, C, D) tensors."""
    count, mean, variance = state

    def update(x: Tensor, target: Tensor) -> None:
        classes = mean.shape[0]
        one_hot = torch.nn.functional.one_hot(target, classes).to(x.dtype)[:, :, None]  # (N, C, 1)
        by_class = x[:, None, :] * one_hot  # (N, C, D)
        n = one_hot.sum(0)  # (C, 1)
        divisor = n.clamp_min(1)
        m = by_class.sum(0) / divisor
        v = (by_class - m * one_hot).pow(2).sum(0) / divisor
        w = n / (n + count[:, None]).clamp_min(1)
        variance.copy_((1 - w) * variance + w * v + w * (1 - w) * (mean - m).pow(2))
        mean.copy_((1 - w) * mean + w * m)
        count.add_(n[:, 0])

    return update


TORCH = {"published": published, "dense": dense, YARDSTICK: present}
OURS = backends.available("class_moments", "cpu")


def provider(name: str, workload: Workload, dtype: torch.dtype = torch.float32) -> tuple[Update, State]:
    """An update, and the state that it writes."""
    if name in TORCH:
        state = zero_state(workload, dtype)
        return TORCH[name](state), state
    module = ClassStatistics(workload.classes, workload.columns, backend=name).to(dtype)
    assert module.cov is not None
    return module.update, (module.count, module.mean, module.cov)


def names(workload: Workload) -> list[str]:
    size = 4 * workload.rows * workload.classes * workload.columns
    return [n for n in (*TORCH, *OURS) if n != "published" or size <= MAX_PUBLISHED_BYTES]


def batches(workload: Workload, count: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of other samples and labels, so that the rows of the state are not always the same."""
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(workload.rows, workload.columns, generator=g) + 1
        yield x.to(dtype), torch.randint(workload.classes, (workload.rows,), generator=g)


def verify(name: str) -> None:
    """The gate before timing: three small batches against float64."""
    small = Workload(40, 9, 33, "")
    got, expected = provider(name, small), provider(YARDSTICK, small, torch.float64)
    for update, dtype in ((got[0], torch.float32), (expected[0], torch.float64)):
        for x, target in batches(small, 3, dtype):
            update(x, target)
    for value, truth in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)


def stepper(name: str, workload: Workload) -> Callable[[], object]:
    """A step without arguments."""
    verify(name)
    update, _ = provider(name, workload)
    turn = itertools.cycle(list(batches(workload, 8)))
    return lambda: update(*next(turn))


@pytest.mark.benchmark(warmup=True)
@pytest.mark.parametrize(("key", "name"), [(k, n) for k, w in WORKLOADS.items() for n in names(w)])
def test_update(key, name, benchmark):
    benchmark.group = key
    benchmark(partial(verify, name) if benchmark.disabled else stepper(name, WORKLOADS[key]))


def main() -> None:
    if not os.environ.keys() >= MALLOC["pinned"].keys():  # glibc reads them once, at start
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name], os.environ | MALLOC["pinned"])
    for key, workload in WORKLOADS.items():
        print(f"{key} ({workload.rows}, {workload.classes}, {workload.columns}): {workload.reason}")
        steps = {n: stepper(n, workload) for n in names(workload)}
        slow = steps.pop("published", None)
        samples = interleave(steps, SECONDS, "cpu")
        if slow is not None:  # seconds a call
            samples["published"] = [_seconds(slow) for _ in range(3)]
        yardstick = numbers.median(samples[YARDSTICK])
        for name, values in samples.items():
            middle = numbers.median(values)
            print(f"  {name:12}{1e3 * middle:10.3f} ms{middle / yardstick:9.2f}")


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
