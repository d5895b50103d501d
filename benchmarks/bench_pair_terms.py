"""ISDA and MetaLAD steps, from features and classifier weights to both gradients, beside plain cross-entropy.

``python -m benchmarks.bench_pair_terms [A B C]`` measures in a child process with malloc pinned, providers in turn;
``pytest benchmarks/bench_pair_terms.py --benchmark-enable`` looks at one case. Every provider passes the gate first:
its loss and gradients against the expansion in float64, which is exact enough where no two rows are close.

The rivals: the published formulation, which holds all differences, re-derived from the formula; and the expansion into
matrix products for the labels present, with the mean row subtracted, as a careful user would write it. The labels
present are given to it for free. It loses all digits where two rows are close; see ``tests/test_pair_terms.py``.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import classfair

from .measure import MALLOC, interleave

#: N, C, D: ImageNet with a large head, with a small head and a global batch, iNaturalist.
SHAPES = {"A": (256, 1000, 2048), "B": (1024, 1000, 768), "C": (256, 8142, 2048), "tiny": (16, 100, 64)}
YARDSTICK = "plain"
#: The published formulation keeps about six tensors of all differences.
PUBLISHED_BYTES = 8 << 30
TOLERANCE = {"native": 1e-5, "published": 1e-5}  # of the others: 1e-3
STRENGTH = 0.5

Step = Callable[[], tuple[Tensor, ...]]


class Inputs(NamedTuple):
    features: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    target: Tensor  # (N,)
    cov: Tensor  # (C, D)
    mean: Tensor  # (C, D)
    prior: Tensor  # (C,) log of class shares
    mean_distance: Tensor  # ()
    label: Tensor  # (U,) labels present
    slot: Tensor  # (N,)


@lru_cache(maxsize=1)
def make_inputs(shape: str) -> Inputs:
    rows, classes, features = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, classes, (rows,), generator=g)
    label, slot = target.unique(return_inverse=True)
    mean = torch.randn(classes, features, generator=g)
    return Inputs(
        torch.randn(rows, features, generator=g).requires_grad_(),
        (0.02 * torch.randn(classes, features, generator=g)).requires_grad_(),
        target,
        torch.rand(classes, features, generator=g) + 0.1,
        mean,
        torch.rand(classes, generator=g).log_softmax(0),
        classfair.mean_class_distance(mean),
        label,
        slot,
    )


def expanded(rows: Tensor, own: Tensor, scale: Tensor) -> Tensor:
    """sum_d scale_yd (rows_cd - own_yd)^2 for all (y, c) by matrix products."""
    return scale @ (rows * rows).T - 2 * (scale * own) @ rows.T + (scale * own * own).sum(1, keepdim=True)


def expansion(x: Inputs, metalad: bool) -> Tensor:
    w = x.weight - x.weight.mean(0)
    own, cov = w[x.label], x.cov[x.label]
    form = expanded(w, own, cov).clamp_min(0)
    if not metalad:
        delta = 0.5 * STRENGTH * form
    else:
        square = (own * own).sum(1, keepdim=True) - 2 * own @ w.T + (w * w).sum(1)
        other = torch.arange(len(w)) != x.label[:, None]  # the difference of equal products is not 0
        far = other & (square > 1e-10)
        delta = torch.where(far, form / torch.where(far, square, 1), 0)
        with torch.no_grad():
            mean = x.mean - x.mean.mean(0)
            near = mean[x.label]
            apart = (near * near).sum(1, keepdim=True) - 2 * near @ mean.T + (mean * mean).sum(1)
            margin = x.mean_distance.log() - 0.5 * apart.clamp_min(1e-12).log()
            margin = torch.where(other, margin, 0)
        delta = delta + margin + x.prior
    return F.cross_entropy(F.linear(x.features, x.weight) + delta[x.slot], x.target)


def published(x: Inputs, metalad: bool) -> Tensor:
    """All differences of samples' and other classes' rows, (N, C, D)."""
    difference = x.weight[None] - x.weight[x.target][:, None]
    delta = (x.cov[x.target][:, None] * difference.square()).sum(2)
    if not metalad:
        delta = 0.5 * STRENGTH * delta
    else:
        square = difference.square().sum(2)
        delta = torch.where(square > 0, delta / torch.where(square > 0, square, 1), 0)
        apart = (x.mean[None] - x.mean[x.target][:, None]).square().sum(2).sqrt()
        delta = delta + torch.where(apart > 0, (x.mean_distance / apart).log(), 0) + x.prior
    return F.cross_entropy(F.linear(x.features, x.weight) + delta, x.target)


def native(x: Inputs, metalad: bool) -> Tensor:
    logits = F.linear(x.features, x.weight)
    index = classfair.ops.label_index(x.target, x.weight.shape[0])
    variance = classfair.pair_variance(x.weight, x.cov, index, normalize=metalad)
    if not metalad:
        return classfair.cross_entropy(logits, x.target, pair=0.5 * STRENGTH * variance)
    margin = classfair.distance_margin(x.mean, index, mean_distance=x.mean_distance)
    return classfair.cross_entropy(logits, x.target, offset=x.prior, pair=variance + margin)


def plain(x: Inputs, metalad: bool) -> Tensor:
    return F.cross_entropy(F.linear(x.features, x.weight), x.target)


PROVIDERS = {
    YARDSTICK: plain,
    "native": native,
    "expansion": expansion,
    "expansion compiled": torch.compile(expansion, fullgraph=True),
    "published": published,
}
OBJECTIVES = {"isda": False, "metalad": True}
PARAMETERS = [pytest.param(s, o, p, id=f"{s}-{o}-{p}") for s in SHAPES for o in OBJECTIVES for p in PROVIDERS]


def runs(shape: str, provider: str) -> bool:
    rows, classes, features = SHAPES[shape]
    return provider != "published" or 6 * 4 * rows * classes * features < PUBLISHED_BYTES


def step(provider: str, shape: str, objective: str, x: Inputs | None = None) -> tuple[Tensor, ...]:
    """Loss and gradients of features and weight."""
    x = make_inputs(shape) if x is None else x
    loss = PROVIDERS[provider](x, OBJECTIVES[objective])
    return loss.detach(), *torch.autograd.grad(loss, (x.features, x.weight))


def verify(provider: str, shape: str, objective: str) -> None:
    """The gate: relative errors in Euclidean norm."""
    if provider == YARDSTICK:
        return
    x = make_inputs(shape)
    exact = Inputs(*(t.detach().double() if t.is_floating_point() else t for t in x))
    exact.features.requires_grad_()
    exact.weight.requires_grad_()
    truth = step("expansion", shape, objective, exact)
    for got, expected in zip(step(provider, shape, objective), truth, strict=True):
        error = ((got - expected).norm() / expected.norm()).item()
        assert error < TOLERANCE.get(provider, 1e-3), f"{provider} {shape} {objective}: relative error {error:.2g}"


@pytest.mark.parametrize(("shape", "objective", "provider"), PARAMETERS)
def test_step(shape, objective, provider, benchmark):
    if not runs(shape, provider):
        pytest.skip("more memory than a machine has")
    if benchmark.disabled and (shape != "tiny" or "compiled" in provider):
        pytest.skip("the gate runs at the small shape")
    verify(provider, shape, objective)
    benchmark.group = f"{shape}/{objective}"
    benchmark(lambda: step(provider, shape, objective))


def report(shape: str, seconds: float) -> None:
    for objective in OBJECTIVES:
        names = [p for p in PROVIDERS if runs(shape, p)]
        for name in names:
            verify(name, shape, objective)
        steps = {n: (lambda n=n, o=objective: step(n, shape, o)) for n in names}
        medians = {n: 1e3 * statistics.median(t) for n, t in interleave(steps, seconds, "cpu").items()}
        for name, value in medians.items():
            print(f"{shape} {objective:8} {name:20} {value:9.1f} ms {value / medians[YARDSTICK]:6.2f}", flush=True)


def main() -> None:
    shapes = sys.argv[1:] or ["A", "B", "C"]
    if any(k not in os.environ for k in MALLOC["pinned"]):  # glibc reads it once, at the start
        command = [sys.executable, "-m", "benchmarks.bench_pair_terms", *shapes]
        sys.exit(subprocess.run(command, env={**os.environ, **MALLOC["pinned"]}).returncode)
    for shape in shapes:
        report(shape, 20.0)


if __name__ == "__main__":
    main()
