"""The steps that ``make bench-check`` times for two commits; pytest-benchmark shows them for the installed one.

It knows public names alone, so that it can run against any commit. A kernel that has become slower shows where it is
most of the time: forward and backward are timed on their own where the tensors are big, and as one step where they
are small and the overhead of a call counts.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import classfair

#: For the rounds of a case. Ten pairs of processes with all cases take about six minutes.
SECONDS = 0.3
CORES = sorted(os.sched_getaffinity(0))

Loss = Callable[[], Any]
Problem = tuple[Loss, tuple[Tensor, ...]]  # a loss, and what it is differentiated by


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(end: int, size: int) -> Tensor:
    return torch.randint(end, (size,), generator=torch.Generator().manual_seed(end + size))


def plain(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> Problem:
    logits, target = normal(rows, classes).to(dtype).requires_grad_(), integers(classes, rows)
    return partial(classfair.cross_entropy, logits, target), (logits,)


def statistics(rows: int, classes: int) -> Problem:
    """Mass and hit as parts of the loss."""
    logits, target, pull = normal(rows, classes).requires_grad_(), integers(classes, rows), normal(classes) / rows

    def loss() -> Tensor:
        value, stats = classfair.cross_entropy_with_stats(logits, target)
        return value + (stats.mass[0] + stats.hit[0]) @ pull

    return loss, (logits,)


def everything(rows: int, classes: int) -> Problem:
    """Offset, margin, pair rows, class weights, smoothing and statistics; offset and margin are learned."""
    logits, target, pull = normal(rows, classes).requires_grad_(), integers(classes, rows), normal(classes) / rows
    offset, margin = normal(classes).requires_grad_(), normal(classes).abs().requires_grad_()
    terms: dict[str, Any] = {"offset": offset, "margin": margin, "weight": normal(classes).abs() + 0.5}
    terms["pair"] = classfair.pair_variance(normal(classes, 8), normal(classes, 8).square(), target)

    def loss() -> Tensor:
        value, stats = classfair.cross_entropy_with_stats(logits, target, label_smoothing=0.1, **terms)
        return value + (stats.mass[0] + stats.hit[0]) @ pull

    return loss, (logits, offset, margin)


def penalty(function: Callable[..., Tensor], rows: int, classes: int, groups: int, **options: Any) -> Problem:
    logits, target, group = normal(rows, classes).requires_grad_(), integers(classes, rows), integers(groups, rows)
    options |= {"group": group, "num_groups": groups, "penalty": function, "penalty_weight": 10.0}
    return lambda: classfair.cross_entropy_with_stats(logits, target, **options)[0], (logits,)


def feature_loss(name: str, rows: int, classes: int, dim: int) -> Problem:
    features, weight = normal(rows, dim).requires_grad_(), (normal(classes, dim) * dim**-0.5).requires_grad_()
    first = {"ISDALoss": classes, "MetaLADLoss": 1 + integers(1000, classes)}[name]
    criterion = getattr(classfair, name)(first, dim)
    return partial(criterion, features, weight, integers(classes, rows)), (features, weight)


def pair_variance(rows: int, classes: int, dim: int) -> Problem:
    weight, cov, target = normal(classes, dim).requires_grad_(), normal(classes, dim).square(), integers(classes, rows)

    def loss() -> Tensor:
        return classfair.pair_variance(weight, cov, target, normalize=True).rows.sum()

    return loss, (weight,)


def update(rows: int, classes: int, dim: int) -> Problem:
    return partial(classfair.ClassStatistics(classes, dim).update, normal(rows, dim), integers(classes, rows)), ()


class Step(NamedTuple):
    """A part of a problem, at a size."""

    name: str
    problem: Callable[..., Problem]
    sizes: tuple[int, ...]
    part: str
    threads: int = 1

    @property
    def key(self) -> str:
        sizes = ",".join(map(str, self.sizes))
        return f"{self.name} ({sizes}) {self.part}" + (f", {self.threads} threads" if self.threads > 1 else "")

    def make(self) -> Callable[[], Any]:
        loss, leaves = self.problem(*self.sizes)
        if self.part == "forward":
            return loss
        if self.part == "both":
            return lambda: torch.autograd.grad(loss(), leaves)
        once = loss()
        return lambda: torch.autograd.grad(once, leaves, retain_graph=True)


PARTS = ("forward", "backward")
BFLOAT16 = partial(plain, dtype=torch.bfloat16)
IOU = partial(penalty, classfair.iou_loss)
EQUALIZED_ODDS = partial(penalty, classfair.equalized_odds_loss, joint="contested")
ISDA, METALAD = partial(feature_loss, "ISDALoss"), partial(feature_loss, "MetaLADLoss")
STEPS = (
    Step("plain", plain, (8, 1000), "both"),
    Step("plain", plain, (256, 1000), "both"),
    Step("plain bfloat16", BFLOAT16, (256, 1000), "both"),
    *(Step("plain", plain, (1024, 1000), part) for part in PARTS),
    *(Step("plain bfloat16", BFLOAT16, (1024, 1000), part) for part in PARTS),
    *(Step("plain", plain, (256, 8142), part) for part in PARTS),
    *(Step("plain bfloat16", BFLOAT16, (256, 8142), part) for part in PARTS),
    Step("plain", plain, (256, 8142), "both", threads=len(CORES)),
    *(Step("statistics", statistics, (1024, 1000), part) for part in PARTS),
    *(Step("everything", everything, (1024, 1000), part) for part in PARTS),
    Step("everything", everything, (1024, 1000), "both", threads=len(CORES)),
    Step("IoU", IOU, (256, 1000, 2), "both"),
    Step("IoU", IOU, (1024, 1000, 8), "both"),
    Step("equalized odds", EQUALIZED_ODDS, (256, 1000, 2), "both"),
    Step("ISDA", ISDA, (256, 1000, 2048), "both"),
    Step("MetaLAD", METALAD, (256, 1000, 2048), "both"),
    *(Step("pair variance", pair_variance, (16, 1000, 512), part) for part in PARTS),
    Step("class moments", update, (256, 1000, 512), "forward"),
)


@contextmanager
def turn() -> Iterator[None]:
    """Two processes take turns by a token that they pass through pipes; a process without pipes is alone."""
    pipes = [int(pipe) for pipe in os.environ.get("BENCH_TURNS", "").split()]
    if pipes:
        os.read(pipes[0], 1)
    yield
    if pipes:
        with suppress(BrokenPipeError):  # the other one has finished
            os.write(pipes[1], b".")


@pytest.fixture(scope="session")
def started() -> None:
    """An empty turn: nobody measures while the other one still imports torch."""
    with turn():
        pass


@pytest.fixture
def own_turn(started: None, step: Step) -> Iterator[None]:
    """A step that has the machine to itself: one thread stays on one core, the threads of a pool go where they like."""
    with turn():
        torch.set_num_threads(step.threads)
        os.sched_setaffinity(0, CORES[-1:] if step.threads == 1 else CORES)
        yield
        os.sched_setaffinity(0, CORES)


def timed(step: Step) -> Any:
    # A thread on its own has a clock that stops while other processes run on its core.
    timer = time.thread_time if step.threads == 1 else time.perf_counter
    rounds = {"max_time": SECONDS, "min_rounds": 5, "min_time": 2e-4, "warmup": True, "warmup_iterations": 3}
    return pytest.param(step, id=step.key, marks=pytest.mark.benchmark(timer=timer, disable_gc=True, **rounds))


@pytest.mark.usefixtures("own_turn")
@pytest.mark.parametrize("step", [timed(step) for step in STEPS])
def test_step(step, benchmark):
    benchmark.extra_info["package"] = os.path.dirname(classfair.__file__)
    benchmark(step.make())
