"""ISDA and MetaLAD beside the published formulation and the best one in plain torch; ``make bench-features``.

Forward plus backward from features to the gradients of features and classifier, as multiples of plain
``F.cross_entropy(F.linear(...))`` in the same run. Ours and the published formulation include the update of the class
statistics, each in its own way; plain torch is spared it. Every provider's loss is compared with float64 before it is
timed.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import classfair
from classfair.ops import label_index

from . import machine
from .measure import in_process, interleave, keep, peak_extra_bytes, seconds_per_call

SHAPES = {"A": (256, 1000, 2048), "B": (1024, 1000, 768), "C": (256, 8142, 2048)}
STRENGTH = 0.5
# A step takes seconds and tens of gigabytes: three times, not at C, and in a process of its own with malloc as it is.
# (glibc takes tensors of more than 32 MB from the system whatever they are for; pinned, B would not fit in 24 GB.)
SLOW = ("published",)


class Inputs(NamedTuple):
    features: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    target: Tensor  # (N,)
    cov: Tensor  # (C, D)
    mean: Tensor  # (C, D)
    counts: Tensor  # (C,)


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Inputs:
    rows, classes, dim = shape
    g = torch.Generator().manual_seed(0)
    features = torch.randn(rows, dim, generator=g)
    weight = torch.randn(classes, dim, generator=g) * dim**-0.5
    target = torch.randint(0, classes, (rows,), generator=g)
    cov = torch.rand(classes, dim, generator=g) + 0.5
    mean = torch.randn(classes, dim, generator=g)
    counts = torch.randint(1, 1000, (classes,), generator=g)
    trained = (t.to(dtype).requires_grad_() for t in (features, weight, torch.zeros(classes)))
    return Inputs(*trained, target, cov.to(dtype), mean.to(dtype), counts)


def plain(x: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(x.features, x.weight, x.bias), x.target)


@torch.no_grad()
def published_moments(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the batch by class, (C,) and (C, D), from a one-hot label for every sample, class and feature."""
    member = F.one_hot(x.target, x.weight.shape[0]).to(x.features.dtype)[:, :, None].expand(-1, -1, x.features.shape[1])
    by_class = x.features[:, None] * member  # (N, C, D)
    count = member[:, :, 0].sum(0)
    divisor = count.clamp_min(1)[:, None]
    mean = by_class.sum(0) / divisor
    variance = by_class.sub_(mean * member).square_().sum(0) / divisor  # in place, or shape B would not fit in memory
    return count, mean, variance


def update_as_published(x: Inputs) -> None:
    """Every class is rewritten, present or not. As ours, the state weighs so much that it stays what it is."""
    count, mean, variance = published_moments(x)
    w = (count / (count + 1e6))[:, None]
    with torch.no_grad():
        x.cov.copy_((1 - w) * x.cov + w * variance + w * (1 - w) * (x.mean - mean).square())
        x.mean.copy_((1 - w) * x.mean + w * mean)


def published_isda(x: Inputs) -> Tensor:
    """A difference of weights for every sample, class and feature: (N, C, D)."""
    update_as_published(x)
    difference = x.weight[None] - x.weight[x.target][:, None]
    variance = (difference.square() * x.cov[x.target][:, None]).sum(2)
    return F.cross_entropy(F.linear(x.features, x.weight, x.bias) + 0.5 * STRENGTH * variance, x.target)


def expanded_isda(x: Inputs) -> Tensor:
    """The square multiplied out, its cross term absorbed in the features: one matrix product more than plain."""
    scaled = STRENGTH * x.cov[x.target]
    logits = F.linear(x.features - scaled * x.weight[x.target], x.weight, x.bias)
    return F.cross_entropy(logits + F.linear(scaled, 0.5 * x.weight.square()), x.target)


def ratio_rows(weight: Tensor, cov: Tensor, label: Tensor) -> Tensor:
    """Normalised variance (M, C) from matrix products, centred because they cancel."""
    centred = weight - weight.mean(0)
    own, v, squares = centred[label], cov[label], centred.square()
    variance = v @ squares.T - 2 * (v * own) @ centred.T + (v * own.square()).sum(1, keepdim=True)
    square = squares.sum(1) - 2 * own @ centred.T + own.square().sum(1, keepdim=True)
    other = torch.arange(weight.shape[0]) != label[:, None]
    valid = other & (square > 1e-12)
    return torch.where(valid, variance.clamp_min(0) / torch.where(valid, square, 1), 0)


def margin_rows(mean: Tensor, label: Tensor, average: Tensor) -> Tensor:
    distance = torch.cdist(mean[label], mean)
    other = torch.arange(mean.shape[0]) != label[:, None]
    return torch.where(other, average.log() - distance.clamp_min(1e-6).log(), 0)


def metalad_loss(x: Inputs, variance: Tensor, slot: Tensor, label: Tensor, average: Tensor) -> Tensor:
    prior = (x.counts / x.counts.sum()).log().to(x.weight.dtype)
    rows = prior - prior[label, None] + variance + margin_rows(x.mean, label, average)
    return F.cross_entropy(F.linear(x.features, x.weight, x.bias) + rows[slot], x.target)


def published_metalad(x: Inputs, average: Tensor) -> Tensor:
    update_as_published(x)
    difference = x.weight[None] - x.weight[x.target][:, None]  # (N, C, D)
    square = difference.square()
    variance, total = (square * x.cov[x.target][:, None]).sum(2), square.sum(2)
    ratio = torch.where(total > 0, variance / torch.where(total > 0, total, 1), 0)
    return metalad_loss(x, ratio, torch.arange(len(x.target)), x.target, average)


def expanded_metalad(x: Inputs, average: Tensor) -> Tensor:
    """On the labels present only, which plain torch would have to wait for the device to know."""
    index = label_index(x.target, x.weight.shape[0])
    label = index.key_of_slot
    return metalad_loss(x, ratio_rows(x.weight, x.cov, label), index.slot, label, average)


def ours(x: Inputs, criterion: Any, **options: Any) -> Callable[[Inputs], Tensor]:
    """The loss with these statistics, which weigh so much that the updates of the timed steps do not move them."""
    statistics = criterion.statistics
    statistics.count.fill_(1_000_000)
    statistics.mean.copy_(x.mean)
    statistics.cov.copy_(x.cov)
    if options.pop("stats", False):
        return lambda x: criterion.with_stats(x.features, x.weight, x.target, linear_bias=x.bias, differentiable=False)[
            0
        ]
    return lambda x: criterion(x.features, x.weight, x.target, linear_bias=x.bias)


def make_providers(x: Inputs) -> dict[str, dict[str, Callable[[Inputs], Tensor]]]:
    classes, dim = x.weight.shape
    average = classfair.mean_class_distance(x.mean)
    metalad = classfair.MetaLADLoss(x.counts, dim)
    metalad.mean_distance.copy_(average)
    isda = {"strength": STRENGTH}
    compiled = torch.compile(lambda x: expanded_metalad(x, average))
    return {
        "isda": {
            "plain": plain,
            "published": published_isda,
            "torch eager": expanded_isda,
            "torch.compile": torch.compile(expanded_isda),
            "classfair": ours(x, classfair.ISDALoss(classes, dim, **isda)),
            "classfair, raw logits and statistics": ours(x, classfair.ISDALoss(classes, dim, **isda), stats=True),
        },
        "metalad": {
            "plain": plain,
            "published": lambda x: published_metalad(x, average),
            "torch eager": lambda x: expanded_metalad(x, average),
            "torch.compile": compiled,
            "classfair": ours(x, metalad),
        },
    }


def stepper(loss: Callable[[Inputs], Tensor], x: Inputs) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(x), (x.features, x.weight, x.bias))


def check(name: str, loss: Callable[[Inputs], Tensor], x: Inputs, expected: Tensor) -> None:
    error = abs(loss(x).double() - expected) / expected
    assert error < 1e-4, f"{name}: relative error {error:.1e}"


def measure(what: str, shape: str, seconds: float) -> list[dict[str, Any]]:
    """``what``: time or memory of the fast providers, or both of the slow ones."""
    x, wide = make_inputs(SHAPES[shape]), make_inputs(SHAPES[shape], torch.float64)
    average = classfair.mean_class_distance(wide.mean)
    truth = {"isda": expanded_isda(wide).detach(), "metalad": expanded_metalad(wide, average).detach()}
    rows = []
    for objective, every in make_providers(x).items():
        providers = {name: loss for name, loss in every.items() if (name in SLOW) == (what == "slow")}
        for name, loss in providers.items():
            if name != "plain":  # torch's own, and another loss
                check(f"{objective} {name}", loss, x, truth[objective])
        steps = {name: stepper(loss, x) for name, loss in providers.items()}
        results: dict[str, dict[str, float]] = {name: {} for name in steps}
        if what != "time":
            results = {name: {"peak_bytes": peak_extra_bytes(step, "cpu")} for name, step in steps.items()}
        if what != "memory":
            for name, values in _samples(what, steps, seconds).items():
                results[name]["median_ms"] = 1e3 * float(torch.tensor(values).median())
        rows += [{"objective": objective, "shape": shape, "provider": k, **v} for k, v in results.items()]
    return rows


def _samples(what: str, steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    if what == "slow":
        return {name: [seconds_per_call(step, 1, "cpu") for _ in range(3)] for name, step in steps.items()}
    return interleave(steps, seconds, "cpu")


def merge(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each objective, shape and provider, with its ratio to plain cross-entropy."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in (row for part in parts for row in part):
        key = (row["objective"], row["shape"], row["provider"])
        rows[key] = rows.get(key, {}) | row
    for objective, shape, _ in rows:
        own = [row for (o, s, _), row in rows.items() if (o, s) == (objective, shape)]
        for row in own:
            row["ratio"] = row["median_ms"] / rows[objective, shape, "plain"]["median_ms"]
    return list(rows.values())


def near_duplicates() -> dict[str, float]:
    """Largest error of the normalised variance where each row has a twin 1e-4 of its norm away, against float64."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(500, 512, generator=g)
    twin = weight + 1e-4 * weight.norm(dim=1, keepdim=True) / 512**0.5 * torch.randn(500, 512, generator=g)
    weight, cov = torch.cat([weight, twin]), torch.rand(1000, 512, generator=g) + 0.5
    label = torch.arange(1000)
    exact = classfair.pair_variance(weight.double(), cov.double(), normalize=True, backend="reference")
    found = classfair.pair_variance(weight, cov, normalize=True)
    return {
        "torch": float((ratio_rows(weight, cov, label) - exact).abs().max()),
        "classfair": float((found - exact).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child, options.seconds)))
        return
    rows = []
    for shape in options.shapes:
        child = ("benchmarks.feature_losses", "--seconds", str(options.seconds), "--child")
        parts = [in_process(*child, "time", shape), in_process(*child, "memory", shape, malloc="returned")]
        if shape != "C":
            parts.append(in_process(*child, "slow", shape, malloc="default"))
        for row in merge(parts):
            rows.append(row)
            print(
                f"{row['objective']:8} {shape} {row['provider']:38} {row['median_ms']:10.1f} ms {row['ratio']:8.2f}"
                f" {row['peak_bytes'] / 1e6:10.0f} MB",
                flush=True,
            )
    errors = near_duplicates()
    print("largest error of the normalised variance with near-duplicate rows:", errors)
    result = {**machine.describe("cpu"), "shapes": SHAPES, "results": rows, "near_duplicate_errors": errors}
    keep(result, "feature-losses")


if __name__ == "__main__":
    main()
