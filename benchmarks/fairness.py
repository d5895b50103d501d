"""Group penalties beside loops over cells and plain torch; ``make bench-fairness``.

Cross-entropy plus ten times a penalty, forward plus backward from the logits, as multiples of this library's own plain
cross-entropy in the same run. Every provider's gradient is compared with float64 before it is timed.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import classfair
from classfair.ops import label_index

from . import machine
from .measure import in_process, interleave, keep, seconds_per_call

PENALTIES: dict[str, Callable[..., Tensor]] = {
    "dp-l2": partial(classfair.demographic_parity_loss, kind="l2"),
    "dp-mi": partial(classfair.demographic_parity_loss, kind="mi"),
    "eo-l2": partial(classfair.equalized_odds_loss, kind="l2"),
    "eo-mi": partial(classfair.equalized_odds_loss, kind="mi"),
    "iou": classfair.iou_loss,
}
SHAPES = {"imagenet": (256, 1000, 2), "attribute": (4096, 2, 2), "imagenet-groups": (1024, 1000, 8)}
WEIGHT = 10.0
SLOW_SECONDS = 0.2  # a step that takes longer is timed three times only


class Inputs(NamedTuple):
    logits: Tensor  # (N, C)
    target: Tensor  # (N,)
    group: Tensor  # (N,)
    groups: int


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Inputs:
    rows, classes, groups = shape
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=g).to(dtype).requires_grad_()
    target, group = (torch.randint(0, n, (rows,), generator=g) for n in (classes, groups))
    return Inputs(logits, target, group, groups)


def _options(name: str, x: Inputs, cells: bool | str) -> dict[str, Any]:
    return {"group": x.group, "num_groups": x.groups, "joint": name.startswith("eo") and cells}


def ours(name: str, x: Inputs, cells: bool | str = "contested") -> Tensor:
    """The loss takes the penalty along."""
    given = {"penalty": PENALTIES[name], "penalty_weight": WEIGHT}
    return classfair.cross_entropy_with_stats(x.logits, x.target, **_options(name, x, cells), **given)[0]


def added(name: str, x: Inputs, backend: str | None = None) -> Tensor:
    """The penalty is added to the loss, as one does with a function of one's own."""
    options = _options(name, x, "contested" if backend is None else True)
    loss, stats = classfair.cross_entropy_with_stats(x.logits, x.target, **options, backend=backend)
    return torch.add(loss, partial(PENALTIES[name], backend=backend)(stats), alpha=WEIGHT)


def _dependence(rows: Tensor, count: Tensor, kind: str) -> Tensor:
    """Of sums of probabilities (G, C) over `count` (G, 1) samples on the group."""
    total, size = rows.sum(0), count.sum()
    if kind == "l2":
        return torch.where(count > 0, rows / count.clamp_min(1) - total / size, 0).square().sum()
    return torch.special.xlogy(rows / size, rows * size / (total * count).clamp_min(1e-30)).sum()


def _iou(hit: Tensor, union: Tensor, count: Tensor) -> Tensor:
    there = count > 0
    return torch.where(there, hit / union.clamp_min(1e-30), 0).sum(-1) / there.sum(-1).clamp_min(1)


def plain_torch(name: str, x: Inputs) -> Tensor:
    """One-hot matrix products for groups; for the cells of equalized odds, of which there are up to N, index_add."""
    loss, p = F.cross_entropy(x.logits, x.target), x.logits.softmax(1)
    classes = p.shape[1]
    member = F.one_hot(x.group, x.groups).to(p.dtype)  # (N, G)
    if name.startswith("dp"):
        return loss + WEIGHT * _dependence(member.T @ p, member.sum(0)[:, None], name[3:])
    if name == "iou":
        own = F.one_hot(x.target, classes).to(p.dtype)
        mass, hit, count = member.T @ p, member.T @ (p * own), member.T @ own
        union = mass + count - hit
        by_group, overall = _iou(hit, union, count), _iou(hit.sum(0), union.sum(0), count.sum(0))
        return loss + WEIGHT * torch.where(member.sum(0) > 0, by_group - overall, 0).square().sum()
    cell = label_index(x.target, classes, x.group, x.groups)
    label = label_index(x.target, classes)
    rows = p.new_zeros(len(p), classes).index_add(0, cell.slot, p)
    samples = p.new_zeros(len(p)).index_add(0, cell.slot, torch.ones_like(p[:, 0]))
    first = torch.zeros_like(cell.slot).scatter(0, cell.slot, label.slot)  # label slot of each cell
    total = torch.zeros_like(rows).index_add(0, first, rows)[first]
    size = torch.zeros_like(samples).index_add(0, first, samples)[first]
    there = (samples > 0)[:, None]
    n, m = samples.clamp_min(1)[:, None], size.clamp_min(1)[:, None]
    if name == "eo-l2":
        return loss + WEIGHT * torch.where(there, rows / n - total / m, 0).square().sum()
    ratio = torch.where(there, rows * m / (total * n).clamp_min(1e-30), 1)
    return loss + WEIGHT * torch.special.xlogy(rows / m, ratio).sum()


def loops(name: str, x: Inputs) -> Tensor:
    """As published: a boolean mask and a number for every class and group.

    Kinder to equalized odds than the published code: all predicted classes of a (label, group) cell at once, because
    C * C * G numbers would take minutes.
    """
    loss, p = F.cross_entropy(x.logits, x.target), x.logits.softmax(1)
    groups = [x.group == g for g in range(x.groups)]
    penalty: Any = 0.0
    if name.startswith("dp"):
        for c in range(p.shape[1]):
            penalty = penalty + _looped_dependence(p[:, c : c + 1], groups, name[3:])
        return loss + WEIGHT * penalty
    if name.startswith("eo"):
        for label in range(p.shape[1]):
            own = x.target == label
            if own.any():
                penalty = penalty + _looped_dependence(p[own], [g[own] for g in groups], name[3:])
        return loss + WEIGHT * penalty
    values, sums = [], torch.zeros(2, p.shape[1])
    for own in groups:
        ious = []
        for c in range(p.shape[1]):
            true = own & (x.target == c)
            inter = p[true, c].sum()
            union = p[own, c].sum() + true.sum() - inter
            sums = sums + F.one_hot(torch.tensor(c), p.shape[1]) * torch.stack([inter, union])[:, None]
            if true.any():
                ious.append(inter / union)
        values.append(torch.stack(ious).mean())
    present = torch.bincount(x.target, minlength=p.shape[1]) > 0
    overall = (sums[0] / sums[1])[present].mean()
    return loss + WEIGHT * sum((v - overall) ** 2 for v in values)


def _looped_dependence(p: Tensor, groups: list[Tensor], kind: str) -> Any:
    total: Any = 0.0
    mean = p.mean(0)
    for own in groups:
        if not own.any():
            continue
        if kind == "l2":
            total = total + (p[own].mean(0) - mean).square().sum()
        else:
            joint = p[own].sum(0) / len(p)
            total = total + (joint * (joint / (mean * own.sum() / len(p))).log()).sum()
    return total


def stepper(loss: Callable[[], Tensor], x: Inputs) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(loss(), x.logits)[0]


def steps_of(name: str, x: Inputs, shape: tuple[int, int, int]) -> dict[str, Callable[[], Tensor]]:
    """A step of each provider, all of which have been compared with float64."""
    wide = make_inputs(shape, torch.float64)
    truth = stepper(lambda: added(name, wide, "reference"), wide)()
    compiled = torch.compile(plain_torch)
    steps = {
        "classfair": stepper(lambda: ours(name, x), x),
        "added": stepper(lambda: added(name, x), x),
        "torch eager": stepper(lambda: plain_torch(name, x), x),
        "torch.compile": stepper(lambda: compiled(name, x), x),
        "loops": stepper(lambda: loops(name, x), x),
    }
    if name.startswith("eo"):
        steps["all cells"] = stepper(lambda: ours(name, x, cells=True), x)
    for provider, step in steps.items():
        error = float((step().double() - truth).abs().max() / truth.abs().max())
        assert error < 1e-4, f"{name} {provider}: relative error {error:.1e}"
    return steps


def measure(shape: str, seconds: float) -> list[dict[str, Any]]:
    x, rows = make_inputs(SHAPES[shape]), []
    for name in PENALTIES:
        steps = steps_of(name, x, SHAPES[shape])
        steps["own cross-entropy"] = stepper(lambda: classfair.cross_entropy(x.logits, x.target), x)
        single = {k: seconds_per_call(s, 1, "cpu") for k, s in steps.items()}
        slow = [k for k, s in single.items() if s > SLOW_SECONDS]
        samples = interleave({k: s for k, s in steps.items() if k not in slow}, seconds, "cpu")
        samples |= {k: [seconds_per_call(steps[k], 1, "cpu") for _ in range(3)] for k in slow}
        median = {k: float(torch.tensor(v, dtype=torch.float64).median()) for k, v in samples.items()}
        own = median["own cross-entropy"]
        rows += [
            {"shape": shape, "penalty": name, "provider": k, "median_ms": 1e3 * m, "ratio": m / own}
            for k, m in median.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.seconds)))
        return
    rows = []
    for shape in SHAPES:
        for row in in_process("benchmarks.fairness", "--child", shape, "--seconds", str(options.seconds)):
            rows.append(row)
            print(
                f"{shape:16} {row['penalty']:6} {row['provider']:18} {row['median_ms']:10.3f} ms {row['ratio']:8.2f}",
                flush=True,
            )
    keep({**machine.describe("cpu"), "shapes": SHAPES, "weight": WEIGHT, "results": rows}, "fairness")


if __name__ == "__main__":
    main()
