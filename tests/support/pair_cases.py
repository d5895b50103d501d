"""Inputs of ``pair_terms`` and of ``label_index`` for the conformance suite."""

from functools import partial

import torch
from torch import Tensor

from tests.support.conformance import Case, Inputs

# (C, D, labels): one pair, below, at and above a vector, a tile, a panel, a block of rows, of classes, of features.
SHAPES = [
    (1, 1, 1),
    (2, 3, 2),
    (5, 4, 3),
    (3, 7, 2),
    (9, 8, 5),
    (17, 17, 16),
    (20, 33, 1),
    (130, 31, 66),
    (131, 70, 131),
    (7, 513, 6),
    (7, 1030, 5),
    (530, 40, 133),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(
    classes: int, features: int, labels: int, *, spare: int = 2, normalize: bool = False, square: bool = True
) -> Inputs:
    """Arguments of ``classfair.ops.pair_terms``, with some slots unused."""
    label = torch.randperm(classes, generator=torch.Generator().manual_seed(2))[:labels].sort()[0]
    return {
        "weight": draw(classes, features),
        "cov": draw(classes, features, seed=1).square() + 0.1,
        "label": torch.cat([label, label.new_zeros(spare)]),
        "num_slots": torch.tensor(labels),
        "normalize": normalize,
        "want_square": square,
    }


def _case(shape: tuple[int, int, int], normalize: bool, name: str = "", **options: int) -> Case:
    kind = "ratio" if normalize else "variance"
    build = partial(pairs, *shape, normalize=normalize, **options)
    return Case(f"{name or 'x'.join(map(str, shape))}-{kind}", build, small=name == "small")


BOTH = (False, True)
CASES = [_case(shape, normalize) for shape in SHAPES for normalize in BOTH]
CASES += [_case((5, 3, 3), normalize, "small", spare=1) for normalize in BOTH]
REPEATED = [_case((33, 40, 20), True)]
THREADED = [_case((530, 130, 140), normalize) for normalize in BOTH]
WITNESSES = [_case((9, 8, 9), False)]


def labels(rows: int, classes: int, groups: int) -> Inputs:
    """Arguments of ``classfair.ops.label_index``, a tenth of the labels ignored, some rows in no group."""
    g = torch.Generator().manual_seed(rows)
    target, group = torch.randint(classes, (rows,), generator=g), torch.randint(-1, groups, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < 0.1] = -100
    return {"target": target, "group": group, "num_classes": classes, "num_groups": groups}


def _label_case(*shape: int) -> Case:
    return Case("x".join(map(str, shape)), partial(labels, *shape))


LABELS = [
    _label_case(*shape) for shape in [(0, 4, 1), (1, 1, 1), (50, 7, 1), (50, 300, 3), (5, 70_000, 2), (400, 3, 2)]
]
MANY_LABELS = [_label_case(9000, 500, 2)]
