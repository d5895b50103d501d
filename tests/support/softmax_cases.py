"""Inputs of ``softmax_loss`` for the conformance suite: one row a case, built in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from classfair.ops import label_index
from tests.support.conformance import Inputs

Edit = Callable[[Inputs, torch.Generator], None]
DIFFERENTIABLE = ("logits", "offset", "margin", "pair")


@dataclass(frozen=True)
class Case:
    """``features`` name the extras below; ``edit`` breaks or bends the inputs afterwards."""

    id: str
    shape: tuple[int, ...]  # (N, C) or (N, C, L)
    features: tuple[str, ...] = ()
    stats: int = 0
    scale: float = 2.0  # standard deviation of the logits
    edit: Edit | None = None
    small: bool = False  # small enough for gradcheck

    def build(self) -> Inputs:
        """Keyword arguments of ``classfair.ops.softmax_loss`` on the CPU, floats in float64."""
        g = torch.Generator().manual_seed(sum(map(ord, self.id)))
        num_classes = self.shape[1]
        rows = self.shape[0] * (self.shape[2] if len(self.shape) == 3 else 1)
        inputs: Inputs = {
            "logits": self.scale * torch.randn(self.shape, generator=g, dtype=torch.float64),
            "stats": self.stats,
        }
        labels = torch.randint(0, num_classes, (rows,), generator=g)
        if "dense" not in self.features:
            inputs["target"] = labels
        for name in self.features:
            {**FEATURES, **REDUCTIONS}[name](inputs, g, rows, num_classes, labels)
        if self.edit is not None:
            self.edit(inputs, g)
        return inputs


def _uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def _offset(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["offset"] = 3 * _uniform(g, num_classes) - 2


def _margin(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["margin"] = 0.5 * _uniform(g, num_classes)


def _table(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["pair"] = 2 * _uniform(g, num_classes, num_classes)


def _rows(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    index = label_index(labels, num_classes, backend="reference")
    x["pair"] = 2 * _uniform(g, index.key_of_slot.shape[0], num_classes)
    x["slot"] = index.slot


def _weight(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["weight"] = 0.1 + 2 * _uniform(g, num_classes)


def _sample_weight(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["sample_weight"] = 2 * _uniform(g, rows)
    x["sample_weight"][3::8] = 0.0


def _smoothing(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["label_smoothing"] = 0.2


def _focal(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["gamma"] = 2.0


def _sharp_focal(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["gamma"] = 0.5


def _ignore(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["target"] = labels.clone()
    x["target"][::3] = -100


def _ignore_class(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["ignore_index"] = int(labels[0]) if rows else 0


def _mixed(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["target_b"] = torch.randint(0, num_classes, (rows,), generator=g)
    x["mix"] = _uniform(g, rows)
    if rows > 3:
        x["target_b"][1] = labels[1]  # both the same
        x["mix"][2], x["mix"][3] = 0.0, 1.0


def _mixed_ignore(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    _mixed(x, g, rows, num_classes, labels)
    x["target"] = labels.clone()
    x["target"][::4] = -100
    x["target_b"][::6] = -100


def _share(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["mix"] = 0.5 + 0.5 * _uniform(g, rows)


def _dense(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["soft_target"] = _uniform(g, *x["logits"].shape)
    x["soft_target"] /= x["soft_target"].sum(1, keepdim=True)
    if x["stats"]:
        x["target"] = labels


def _group(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["group"] = torch.randint(-1, 2, (rows,), generator=g)  # group 2 of 3 stays empty
    x["num_groups"] = 3


def _many_groups(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    x["group"] = torch.randint(-1, 59, (rows,), generator=g)  # the last stays empty
    x["num_groups"] = 60


def _joint(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
    group, groups = x.get("group"), x.get("num_groups", 1)
    index = label_index(labels, num_classes, group, groups, backend="reference")
    x["cell"], x["num_cells"] = index.slot, index.key_of_slot.shape[0]


def _reduced(reduction: str) -> Callable[[Inputs, torch.Generator, int, int, Tensor], None]:
    def feature(x: Inputs, g: torch.Generator, rows: int, num_classes: int, labels: Tensor) -> None:
        x["reduction"] = reduction

    return feature


FEATURES: dict[str, Callable[[Inputs, torch.Generator, int, int, Tensor], None]] = {
    "offset": _offset,
    "margin": _margin,
    "table": _table,
    "rows": _rows,
    "weight": _weight,
    "sample_weight": _sample_weight,
    "smoothing": _smoothing,
    "focal": _focal,
    "sharp_focal": _sharp_focal,
    "ignore": _ignore,
    "ignore_class": _ignore_class,
    "mixed": _mixed,
    "mixed_ignore": _mixed_ignore,
    "share": _share,
    "dense": _dense,
    "group": _group,
    "many_groups": _many_groups,
    "joint": _joint,
}
REDUCTIONS = {"mean": _reduced("mean"), "sum": _reduced("sum")}
ALL_HARD = ("offset", "margin", "rows", "weight", "smoothing", "focal", "group", "joint")


def _set(rows: slice, value: float, columns: slice = slice(None)) -> Edit:
    def edit(x: Inputs, g: torch.Generator) -> None:
        x["logits"][rows, columns] = value

    return edit


def _one_label(x: Inputs, g: torch.Generator) -> None:
    x["target"].fill_(3)
    if "slot" in x:
        x["slot"].fill_(0)


def _all_ignored(x: Inputs, g: torch.Generator) -> None:
    x["target"].fill_(-100)


def _confident(x: Inputs, g: torch.Generator) -> None:
    """Gaps of 5 to 200 between the true class and the rest: p - 1 must not cancel."""
    rows = x["logits"].shape[0]
    gap = torch.linspace(5, 200, rows, dtype=torch.float64)
    x["logits"][torch.arange(rows), x["target"]] += gap


def _shifted(x: Inputs, g: torch.Generator) -> None:
    """Logits near 1e4: a float32 log-sum-exp has no digits left for the loss."""
    x["logits"] += 1e4


def _masked(x: Inputs, g: torch.Generator) -> None:
    """-inf in a third of the columns, never at the true class."""
    x["logits"][:, ::3] = -torch.inf
    x["target"] = x["target"] // 3 * 3 + 1


def _true_class_masked(x: Inputs, g: torch.Generator) -> None:
    x["logits"][torch.arange(len(x["target"])), x["target"]] = -torch.inf


def _nan_row_ignored(x: Inputs, g: torch.Generator) -> None:
    x["logits"][1] = torch.nan
    x["target"][1] = -100


def _one_hot(x: Inputs, g: torch.Generator) -> None:
    x["soft_target"] = torch.nn.functional.one_hot(x["soft_target"].argmax(1), x["logits"].shape[1]).double()
    x["logits"][:, 0] = -torch.inf  # 0 * inf where the target is 0
    x["soft_target"][:, 0] = 0


def _broken_rows(x: Inputs, g: torch.Generator) -> None:
    """Among rows that share vectors: NaN, inf, -inf alone, -inf at the true class; masked classes."""
    logits, target = x["logits"], x["target"]
    logits[1, 0], logits[10, 1], logits[20] = torch.nan, torch.inf, -torch.inf
    logits[30, target[30].clamp_min(0)] = -torch.inf
    logits[32:40, 0] = -torch.inf


def _group_all_out(x: Inputs, g: torch.Generator) -> None:
    x["group"].fill_(-1)


def _cases() -> list[Case]:
    # Below, at and above one vector, one unrolled block, one chunk of rows; real class counts.
    sizes = [(0, 5), (1, 1), (1, 7), (2, 2), (3, 31), (3, 33), (31, 10), (32, 16), (33, 17), (129, 12), (9, 300)]
    wide = [(5, 1000), (3, 1023), (3, 1025), (2, 8142), (2, 21841)]
    cases = [Case(f"plain-{n}x{c}", (n, c), small=n * c <= 100) for n, c in sizes + wide]
    cases += [Case(f"stats-{n}x{c}", (n, c), ("offset", "rows"), 2) for n, c in sizes + wide]
    for name in FEATURES:
        cases.append(Case(name, (9, 6), (name,) if name != "joint" else (), small=True))
        features = (name,) if name in ("group", "joint") else (name, "group", "joint")
        if name != "group":
            features = tuple(dict.fromkeys(("group", *features)))
        cases.append(Case(f"{name}-stats", (9, 6), features, 2, small=True))
    # The sum of the losses is an output of the operator.
    for case in [c for c in cases if c.id in ("weight-stats", "smoothing", "ignore")]:
        cases += [replace(case, id=f"{case.id}-{r}", features=(*case.features, r)) for r in ("mean", "sum")]
    cases += [Case(f"all-{r}", (9, 6), (*ALL_HARD, r), 2, small=True) for r in ("mean", "sum")]
    # Rows of few classes share vectors, up to 16 classes; whole vectors of rows and a rest.
    narrow = ("weight", "group", "joint")
    cases += [
        Case(f"narrow-{n}x{c}", (n, c), narrow, 2) for n, c in ((37, 1), (16, 2), (300, 2), (65, 8), (37, 16), (37, 17))
    ]
    cases += [
        Case("narrow-broken", (67, 3), ("ignore", *narrow), 2, edit=_broken_rows),
        Case("narrow-3d", (3, 2, 21), ("ignore", *narrow), 2),
        Case("narrow-sample-weight", (67, 3), ("ignore", "sample_weight", *narrow), 2, edit=_broken_rows),
        Case("narrow-ties", (40, 4), ("group",), 2, scale=0.0),
        Case("narrow-confident", (40, 3), ("group",), 2, edit=_confident),
    ]
    cases += [
        Case("all", (9, 6), ALL_HARD, 2, small=True),
        Case("all-empty", (0, 6), ALL_HARD, 2),
        Case("all-wide", (40, 1003), ALL_HARD, 2),
        Case("all-many-rows", (300, 11), ALL_HARD, 2),
        Case("groups-wide", (150, 301), ("group", "joint"), 2),
        # Sums of 60 groups and 301 classes are too many for the cache: rows are visited by group.
        Case("groups-many", (70, 301), ("many_groups", "joint"), 2),
        Case("groups-many-dense", (70, 301), ("dense", "many_groups", "joint"), 2),
        Case("groups-many-mixed", (70, 301), ("mixed_ignore", "offset", "many_groups"), 2),
        Case(
            "groups-many-nan", (70, 301), ("ignore", "many_groups"), 2, edit=_set(slice(40, 44), torch.nan, slice(4, 5))
        ),
        Case("all-values-only", (40, 19), ALL_HARD, 1),
        Case("dense-all", (9, 6), ("dense", "offset", "weight", "smoothing", "group", "joint"), 2, small=True),
        Case("mixed-all", (40, 19), ("mixed_ignore", "offset", "weight", "smoothing", "focal", "group"), 2),
        Case("share-all", (40, 19), ("share", "offset", "margin", "table", "weight", "smoothing", "group"), 2),
        Case("sample-weight-all", (40, 19), ("sample_weight", *ALL_HARD), 2),
        Case("sample-weight-mixed", (40, 19), ("mixed_ignore", "sample_weight", "offset", "weight", "smoothing"), 2),
        Case("sample-weight-dense", (9, 6), ("dense", "sample_weight", "weight", "smoothing"), 2, small=True),
        Case("sample-weight-0-of-inf", (8, 9), ("sample_weight",), 2, edit=_true_class_masked),
        Case("strided-3d-sample-weight", (3, 5, 20), ("sample_weight", "offset", "group"), 2),
        Case("strided-3d", (3, 5, 4), ("offset", "margin", "rows", "weight", "smoothing", "group"), 2, small=True),
        Case("strided-3d-dense", (3, 5, 20), ("dense", "weight", "smoothing"), 2),
        Case("strided-3d-many", (4, 19, 50), ALL_HARD, 2),
        Case("one-label", (100, 9), ("rows", "group"), 2, edit=_one_label),
        Case("one-label-table", (100, 9), ("table",), 2, edit=_one_label),
        Case("all-ignored", (7, 9), ("offset", "table", "group"), 2, edit=_all_ignored),
        Case("group-all-out", (7, 9), ("group", "joint"), 2, edit=_group_all_out),
        Case("confident", (16, 9), ("offset",), 2, edit=_confident),
        Case("confident-focal", (16, 9), ("sharp_focal",), 0, edit=_confident),
        Case("shifted-1e4", (16, 33), (), 2, edit=_shifted),
        Case("shifted-1e4-perturbed", (16, 33), ("offset", "table", "smoothing"), 2, edit=_shifted),
        Case("huge", (16, 33), (), 2, scale=1e4),
        Case("masked", (16, 33), ("offset", "rows"), 2, edit=_masked),
        Case("true-class-masked", (8, 9), (), 2, edit=_true_class_masked),
        Case("true-class-masked-focal", (8, 9), ("focal",), 0, edit=_true_class_masked),
        Case("dead-row", (8, 33), ("offset", "smoothing"), 2, edit=_set(slice(2, 4), -torch.inf)),
        Case("nan", (8, 33), ("offset",), 2, edit=_set(slice(2, 3), torch.nan, slice(4, 5))),
        Case("inf", (8, 33), (), 2, edit=_set(slice(2, 3), torch.inf, slice(4, 5))),
        Case("nan-ignored", (8, 33), ("offset", "rows"), 2, edit=_nan_row_ignored),
        Case("one-hot-masked", (8, 9), ("dense",), 0, edit=_one_hot),
    ]
    return cases


CASES = _cases()
