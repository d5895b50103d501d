"""Random calls of public functions, valid and not. A call depends on its seed alone, and so can be made again."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import classfair
from classfair import MixedTarget, PairTerms, ops
from classfair.statistics import ClassStatistics, class_moments

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Values that a call may hold anywhere in the place of a good one.
ODD = (None, True, "0.5", 2.5, -1, 0, math.nan, math.inf, 2**55, 2**70, torch.tensor(0.5), torch.tensor(3), [1, 2])


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, share: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < share

    def one(self, values: Sequence[Any]) -> Any:
        return values[self.integer(0, len(values) - 1)]

    def size(self) -> int:
        """Mostly small, at times past a vector, a chunk of rows or a block of columns."""
        return self.integer(0, 9) if self.chance(0.7) else self.integer(0, self.one((33, 130, 700)))

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def labels(self, classes: int, *shape: int, none: int = -100) -> Tensor:
        labels = torch.randint(0, max(classes, 1), shape, generator=self.generator)
        if self.chance(0.3):
            labels[torch.rand(shape, generator=self.generator) < self.one((0.2, 1.0))] = none
        if self.chance(0.03) and labels.numel():
            labels.view(-1)[self.integer(0, labels.numel() - 1)] = self.one((classes, -1, -(2**63), 2**32 + 1))
        return labels

    def layout(self, tensor: Tensor) -> Tensor:
        """The same values elsewhere in memory, or the same row again and again."""
        kind = self.integer(0, 9)
        if kind == 0 and tensor.dim() > 1:
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == 1 and tensor.dim() and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        if kind == 2:
            return torch.stack([tensor, tensor], -1)[..., 0]
        if kind == 3:
            return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
        return tensor

    def special(self, values: Tensor) -> Tensor:
        """With NaN, infinities, or numbers of extreme size in a few places."""
        if values.numel() and self.chance(0.15):
            for _ in range(self.integer(1, 3)):
                at = self.integer(0, values.numel() - 1)
                values.view(-1)[at] = self.one((math.nan, math.inf, -math.inf, 1e4, -1e4, 0.0, 1e-42))
        return values

    def spoiled(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Now and then one argument is not what it should be."""
        if self.chance(0.2) and arguments:
            name = self.one(sorted(arguments))
            value = arguments[name]
            if isinstance(value, Tensor) and self.chance(0.8):
                others = sum(isinstance(v, Tensor) for v in arguments.values()) > 1  # native has no kernels for meta
                changes = (_transposed, _shorter, _integers, _halved, _sparse) + (_on_meta,) * others
                value = self.one(changes)(value)
            else:
                value = self.one(ODD)
            arguments = {**arguments, name: value}
        return arguments


def _transposed(value: Tensor) -> Tensor:
    return value.movedim(0, -1) if value.dim() else value.reshape(1)


def _shorter(value: Tensor) -> Tensor:
    return value[: max(0, value.shape[0] - 1)] if value.dim() else value


def _integers(value: Tensor) -> Tensor:
    return value.to(torch.int32) if not value.is_floating_point() else value.nan_to_num(0, 0, 0).to(torch.uint8)


def _halved(value: Tensor) -> Tensor:
    return value.to(torch.float16)


def _sparse(value: Tensor) -> Tensor:
    return value.detach().to_sparse()


def _on_meta(value: Tensor) -> Tensor:
    return value.to("meta")


Call = tuple[Callable[..., Any], dict[str, Any]]


def _target(d: Draw, n: int, c: int, logits: Tensor) -> Any:
    kind = d.integer(0, 9)
    if kind < 6:
        labels = d.layout(d.labels(c, n))
        return labels.clamp_min(0).to(torch.uint8) if kind == 5 and c < 256 else labels
    if kind < 8:
        lam = d.one((0.3, 0.0, 1.0, torch.rand(n, generator=d.generator), torch.tensor(0.25), torch.tensor(5.0)))
        return MixedTarget(d.labels(c, n), d.labels(c, n), lam)
    return d.layout(d.floats(*logits.shape).softmax(1).to(d.one(FLOATS)))


def _terms(d: Draw, n: int, c: int) -> dict[str, Any]:
    """Keyword arguments of cross_entropy."""
    given: dict[str, Any] = {}
    for name in ("offset", "margin", "weight", "sample_weight"):
        if d.chance(0.25):
            size = n if name == "sample_weight" else c
            value = d.floats(size).abs() if "weight" in name else d.floats(size)
            given[name] = d.layout(value.to(d.one(FLOATS)))
    if d.chance(0.3):
        given["pair"] = d.floats(c, c).float()
        if d.chance(0.6):
            rows = d.integer(0, min(n, c))
            slot = d.labels(rows + 1, n, none=-1) - 1
            given["pair"] = PairTerms(d.floats(rows, c).float(), slot, torch.zeros(rows).long(), torch.tensor(rows))
    for name, values in (
        ("label_smoothing", (0.1, 1.0, torch.tensor(0.2))),
        ("gamma", (2.0, 0.5, torch.tensor(1.0))),
        ("ignore_index", (-1, 0, torch.tensor(1))),
        ("reduction", ("none", "sum", "mean")),
    ):
        if d.chance(0.2):
            given[name] = d.one(values)
    return given


def loss(d: Draw) -> Call:
    n, c = d.size(), max(1, d.size())
    logits = d.layout(d.special(d.floats(n, c, scale=d.one((1.0, 30.0, 0.0))).to(d.one(FLOATS))))
    given = {"logits": logits, "target": _target(d, n, c, logits), **_terms(d, n, c)}
    if d.chance(0.5):
        return classfair.cross_entropy, d.spoiled(given)
    if d.chance(0.6):
        groups = d.integer(1, 4)
        given |= {"group": d.labels(groups, n, none=-1), "num_groups": groups}
        given["joint"] = d.one((False, True, "contested"))
        if given.get("reduction") != "none" and d.chance(0.5):
            penalties = [classfair.fairness.demographic_parity_loss, classfair.fairness.iou_loss]
            if given["joint"]:
                penalties.append(classfair.fairness.equalized_odds_loss)
            given["penalty"] = d.one(penalties)
    if isinstance(given["target"], Tensor) and given["target"].is_floating_point():
        given["label"] = d.labels(c, n)
    given["differentiable"] = d.chance(0.7)
    return classfair.cross_entropy_with_stats, d.spoiled(given)


def pairs(d: Draw) -> Call:
    c, features, n = max(1, d.size()), d.integer(0, 40), d.size()
    weight = d.special(d.floats(c, features).to(d.one(FLOATS)))
    if c > 1 and d.chance(0.2):
        weight[1] = weight[0]
    weight = d.layout(weight)
    given = {"linear_weight": weight, "cov": d.layout(d.floats(c, features).square().to(d.one(FLOATS)))}
    target: Any = d.labels(c, n) if d.chance(0.7) else None
    if target is not None and d.chance(0.3) and not ((target >= c) | (target < 0)).any():
        target = ops.label_index(target, c if d.chance(0.6) else c + d.integer(1, 50))
    return classfair.pair_variance, d.spoiled({**given, "target": target, "normalize": d.chance(0.5)})


def moments(d: Draw) -> Call:
    n, c, features = d.size(), max(1, d.size()), max(1, d.size())
    x = d.layout(d.special((3 + 2 * d.floats(n, features)).to(d.one(FLOATS))))
    given = {"features": x, "target": d.layout(d.labels(c, n)), "num_classes": c}
    return class_moments, d.spoiled(given | {"covariance": d.one(("diag", "none"))})


def index(d: Draw) -> Call:
    n, c, groups = d.size(), max(1, d.size()), d.integer(1, 4)
    given = {"target": d.layout(d.labels(c, n)), "num_classes": d.one((c, c, c, 2**55, 2**60))}
    if d.chance(0.5):
        given |= {"group": d.labels(groups, n, none=-1), "num_groups": groups}
    return ops.label_index, d.spoiled(given)


def _updated(features: list[Tensor], targets: list[Any], classes: int, backend: str, **options: Any) -> tuple:
    statistics = ClassStatistics(classes, features[0].shape[1], backend=backend, **options)
    for x, y in zip(features, targets, strict=True):
        statistics.update(x, y)
    return statistics.count, statistics.mean, statistics.cov


def statistics(d: Draw) -> Call:
    c, features, batches = max(1, d.integer(1, 12)), d.integer(1, 40), d.integer(1, 4)
    xs, ys = [], []
    for _ in range(batches):
        n = d.integer(0, 40)
        xs.append(3 + 2 * d.floats(n, features).float())
        y: Any = d.labels(c, n)
        if d.chance(0.2) and not ((y >= c) | (y < 0)).any():
            y = ops.label_index(y, c if d.chance(0.5) else c + 5)
        ys.append(y)
    options = {"momentum": 0.3} if d.chance(0.4) else {}
    return _updated, {"features": xs, "targets": ys, "classes": c, **options}


def _penalised(
    penalty: Any, stats: Any, change: Callable[[Tensor], Tensor], backend: str, **options: Any
) -> tuple[Tensor, ...]:
    mapped = torch.utils._pytree.tree_map(change, stats)
    table = mapped.mass.requires_grad_() if mapped.joint is None else mapped.joint.rows.requires_grad_()
    value = penalty(mapped, backend=backend, **options)
    (gradient,) = torch.autograd.grad(value, table, allow_unused=True)
    return value, torch.zeros(()) if gradient is None else gradient


def penalties(d: Draw) -> Call:
    n, c, groups = d.size(), max(1, d.size()), d.integer(1, 5)
    logits = d.floats(n, c, scale=d.one((1.0, 60.0))).to(d.one((torch.float32, torch.float64)))
    group, target = d.labels(groups, n, none=-1).clamp(-1, groups - 1), d.labels(c, n).clamp(-100, c - 1)
    target[target < 0] = -100
    joint = d.one((True, "contested")) if d.chance(0.5) else False
    _, stats = classfair.cross_entropy_with_stats(
        logits, target, group=group, num_groups=groups, joint=joint, backend="reference"
    )
    penalty = classfair.fairness.equalized_odds_loss if joint else classfair.fairness.demographic_parity_loss
    change = d.one((torch.clone,) * 6 + (torch.Tensor.double, torch.Tensor.half, _first_row, _tiny))
    return _penalised, {"penalty": penalty, "stats": stats, "change": change, "kind": d.one(("l2", "mi"))}


def _first_row(value: Tensor) -> Tensor:
    return value[:1].clone() if value.dim() == 2 else value


def _tiny(value: Tensor) -> Tensor:
    """Sums of probabilities of the size of a subnormal number."""
    return value * 1e-40 if value.dtype == torch.float32 else value


KINDS = (loss, loss, loss, pairs, moments, index, statistics, penalties)
