"""Inputs of ``dependence`` and ``iou_penalty`` for the conformance suite, in float64 on the CPU."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.conformance import Case, Inputs


class Rows(NamedTuple):
    """Tensors of ``dependence``."""

    rows: Tensor  # (M, C)
    count: Tensor  # (G, C)
    cell: Tensor | None = None  # (M,)
    num_cells: Tensor | None = None  # ()


class Overlap(NamedTuple):
    """Tensors of ``iou_penalty``."""

    mass: Tensor  # (G, C)
    hit: Tensor  # (G, C)
    count: Tensor  # (G, C)


def _generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(s * 101**i for i, s in enumerate(seed)))


def _means(rows: int, classes: int, g: torch.Generator) -> Tensor:
    """Mean predictions (rows, C), some of them of very small probability."""
    return torch.randn(rows, classes, generator=g, dtype=torch.float64).mul(3).softmax(1)


def _counts(groups: int, classes: int, g: torch.Generator, most: int = 20) -> Tensor:
    """Samples of each group and class, none in a third of them."""
    count = torch.randint(1, most + 1, (groups, classes), generator=g)
    return torch.where(torch.rand(groups, classes, generator=g) < 1 / 3, 0, count)


def groups(number: int, classes: int, most: int = 20, empty: int | None = None) -> Rows:
    """The rows are groups."""
    g = _generator(number, classes, most)
    count = _counts(number, classes, g, most)
    count[:, 0] += 1
    if empty is not None:
        count[empty] = 0
    return Rows(_means(number, classes, g) * count.sum(1, keepdim=True), count)


def cells(number: int, classes: int, most: int = 20, spare: int = 2) -> Rows:
    """The rows are the cells with a sample, and `spare` unused ones that hold anything."""
    g = _generator(number, classes, most, 1)
    count = _counts(number, classes, g, most)
    cell = count.T.reshape(-1).nonzero()[:, 0]
    n = count.T.reshape(-1)[cell, None]
    rows = torch.cat([_means(len(cell), classes, g) * n, torch.full((spare, classes), 3e5, dtype=torch.float64)])
    return Rows(rows, count, torch.cat([cell, cell.new_zeros(spare)]), torch.tensor(len(cell)))


def segments(rows: Tensor, count: Tensor, cell: Tensor | None, num_cells: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Numbers of the rows of each segment, those with samples, and samples behind every row."""
    if cell is None or num_cells is None:
        n = count.sum(1)
        return [(n > 0).nonzero()[:, 0]], n
    n = count[cell % len(count), cell // len(count)] * (torch.arange(len(cell)) < num_cells)
    label = torch.where(n > 0, cell // len(count), -1)
    return [(label == k).nonzero()[:, 0] for k in label.unique() if k >= 0], n


def _edited(build: Callable[[], Rows], edit: Callable[[Rows], Rows]) -> Callable[[], Rows]:
    return lambda: edit(build())


def _one_hot(x: Rows) -> Rows:
    """Every cell says its own label of all of its samples; of groups, every group the same class."""
    label = torch.zeros(len(x.rows), dtype=torch.int64) if x.cell is None else x.cell // len(x.count)
    n = x.count.sum(1) if x.cell is None else x.count[x.cell % len(x.count), label]
    used = len(x.rows) if x.num_cells is None else int(x.num_cells)
    rows = x.rows.clone()
    rows[:used] = torch.nn.functional.one_hot(label, x.rows.shape[1])[:used] * n[:used, None]
    return x._replace(rows=rows)


def _zeros(x: Rows) -> Rows:
    """A class nobody is predicted to be, one of almost no probability, and a row that is 0."""
    rows = x.rows.clone()
    rows[:, 1] = 0
    rows[::2, 2] = 1e-30
    rows[1] = 0
    return x._replace(rows=rows)


def _separate(x: Rows) -> Rows:
    """Every row predicts a class of its own: the largest mutual information."""
    n = x.count.sum(1) if x.cell is None else x.count[x.cell % len(x.count), x.cell // len(x.count)]
    own = torch.arange(len(x.rows)) % x.rows.shape[1]
    return x._replace(rows=torch.nn.functional.one_hot(own, x.rows.shape[1]) * n[:, None].double())


def _empty_cell(x: Rows) -> Rows:
    """A row whose cell has lost its samples, as a count of another batch would."""
    assert x.cell is not None
    count = x.count.clone()
    count[x.cell[1] % len(count), x.cell[1] // len(count)] = 0
    return x._replace(count=count)


def _only_shared(x: Rows) -> Rows:
    """As softmax_loss makes them: labels that one group has alone get no row, though they are counted."""
    assert x.cell is not None
    assert x.num_cells is not None
    label = x.cell // len(x.count)
    keep = ((x.count > 0).sum(0) > 1)[label] & (torch.arange(len(label)) < x.num_cells)
    order = torch.cat([keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]])
    return Rows(x.rows[order], x.count, torch.where(keep, x.cell, 0)[order], keep.sum())


def _unused(x: Rows) -> Rows:
    assert x.cell is not None
    return Rows(x.rows, torch.zeros_like(x.count), torch.zeros_like(x.cell), torch.tensor(0))


def _no_rows(x: Rows) -> Rows:
    assert x.cell is not None
    return Rows(x.rows[:0], x.count, x.cell[:0], torch.tensor(0))


def _few(x: Rows) -> Rows:
    """Most labels are of one group, as where classes are many."""
    assert x.cell is not None
    label = x.cell // len(x.count)
    keep = (x.cell % len(x.count) == 0) | (label % 7 == 0)
    keep[int(x.num_cells or 0) :] = False
    order = torch.cat([keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]])
    return Rows(x.rows[order], x.count, torch.where(keep, x.cell, 0)[order], keep.sum())


def _dependence_cases() -> list[Case]:
    sizes = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 31), (3, 5), (3, 33), (8, 2), (8, 31), (2, 1000), (8, 1100)]
    cell_sizes = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 20), (3, 5), (8, 7)]
    large = 1 << 33
    cases = [Case(f"groups-{g}x{c}", lambda g=g, c=c: groups(g, c), (g, c) == (3, 5)) for g, c in sizes]
    cases += [Case(f"cells-{g}x{c}", lambda g=g, c=c: cells(g, c), (g, c) == (3, 5)) for g, c in cell_sizes]
    few = _edited(lambda: cells(2, 60), _few)
    middle = {"groups": lambda: groups(3, 33), "cells": lambda: cells(3, 12)}
    for name, build in middle.items():
        cases += [
            Case(f"{name}-one-hot", _edited(build, _one_hot)),
            Case(f"{name}-zeros", _edited(build, _zeros)),
            Case(f"{name}-separate", _edited(build, _separate)),
        ]
    return [
        *cases,
        Case("groups-no-samples", lambda: Rows(torch.zeros(2, 5).double(), torch.zeros(2, 5, dtype=torch.int64))),
        *(Case(f"groups-empty-{e}", lambda e=e: groups(3, 33, empty=e)) for e in range(3)),
        Case("groups-one-of-two", lambda: groups(2, 31, empty=0)),
        Case("groups-large", lambda: groups(3, 31, large)),
        Case("groups-large-one-hot", _edited(lambda: groups(3, 31, large), _one_hot)),
        Case("cells-large", lambda: cells(3, 12, large)),
        Case("cells-full", lambda: cells(3, 12, spare=0)),
        Case("cells-empty-cell", _edited(middle["cells"], _empty_cell)),
        Case("cells-only-shared", _edited(middle["cells"], _only_shared)),
        Case("cells-mostly-alone", few),
        Case("cells-unused", _edited(middle["cells"], _unused)),
        Case("cells-none", _edited(lambda: cells(2, 5), _no_rows)),
    ]


def overlap(number: int, classes: int, most: int = 20, seed: int = 0) -> Overlap:
    g = _generator(number, classes, most, seed)
    count = _counts(number, classes, g, most)
    hit = torch.rand(count.shape, generator=g, dtype=torch.float64) * count
    return Overlap(hit + torch.rand(count.shape, generator=g, dtype=torch.float64) * 3, hit, count)


def _perfect(x: Overlap) -> Overlap:
    return Overlap(x.count.double(), x.count.double(), x.count)


def _without(x: Overlap, group: int | slice, label: int | slice, mass: float = 0.0) -> Overlap:
    """No samples of a group with a label, and hardly a prediction: the union is 0 where `mass` is."""
    new = [t.clone() for t in x]
    new[0][group, label], new[1][group, label], new[2][group, label] = mass, 0, 0
    return Overlap(*new)


def _iou_cases() -> list[Case]:
    sizes = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 4), (3, 5), (3, 33), (8, 31), (20, 7), (2, 1000), (3, 2100)]
    every = slice(None)
    return [
        *(Case(f"{g}x{c}", lambda g=g, c=c: overlap(g, c), (g, c) == (3, 4)) for g, c in sizes),
        Case("large", lambda: overlap(3, 31, 1 << 33)),
        Case("perfect", lambda: _perfect(overlap(3, 31))),
        Case("perfect-empty-group", lambda: _perfect(_without(overlap(3, 31), 1, every))),
        Case("no-union", lambda: _without(_without(overlap(3, 31), 1, 4), every, 7)),
        Case("absent-classes", lambda: _without(overlap(3, 31), every, slice(3, 9), 0.5)),
        Case("empty-group", lambda: _without(overlap(3, 31), 2, every)),
        Case("empty-group-with-mass", lambda: _without(overlap(3, 31), 0, every, 0.25)),
        Case("one-group-left", lambda: _without(overlap(2, 31), 0, every)),
        Case("no-samples", lambda: _without(overlap(2, 31), every, every)),
    ]


def _with_options(cases: list[Case], **choices: tuple[str, str]) -> list[Case]:
    """Every case with every combination of boolean options; ``choices`` are their words in the case's name."""
    result = []
    for case in cases:
        for values in itertools.product((False, True), repeat=len(choices)):
            words = [words[value] for words, value in zip(choices.values(), values, strict=True)]
            build = partial(_arguments, case, dict(zip(choices, values, strict=True)))
            result.append(Case("-".join([case.id, *words]), build, case.small))
    return result


def _arguments(case: Case, options: dict[str, bool]) -> Inputs:
    return {**case.build()._asdict(), **options}


DEPENDENCE = _dependence_cases()
IOU = _iou_cases()
KINDS = {"mutual_information": ("l2", "mi")}
WEIGHTED = {"weighted": ("plain", "weighted")}
PAIRED = {"paired": ("overall", "paired"), "skip": ("every-class", "skip")}


def dependence_cases(*cases: Case) -> list[Case]:
    return _with_options(list(cases), **KINDS, **WEIGHTED)


def iou_cases(*cases: Case) -> list[Case]:
    return _with_options(list(cases), **PAIRED)
