"""How the group penalties run, and how large the rounding errors of their results may be."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from classfair import ops, reference
from tests.support import penalty_cases
from tests.support.conformance import Case, Inputs, Primitive, Results, Rule, assert_within, by_id, cast
from tests.support.penalty_cases import cells, dependence_cases, groups, iou_cases, overlap, segments


class Penalty(Primitive):
    """A penalty of batch statistics; back-end "reference" is its closed form in torch, the oracle its formula."""

    name = "penalties"
    leaves: tuple[str, ...]
    operator: Callable
    formula: Callable

    def run(self, inputs: Inputs, backend: str) -> Results:
        return self._results(partial(self.operator, backend=backend), inputs)

    def oracle(self, inputs: Inputs) -> Results:
        return self._results(self.formula, inputs)

    def _results(self, function: Callable, inputs: Inputs) -> Results:
        leaves = {n: inputs[n].detach().requires_grad_() for n in self.leaves}
        value = function(**{**inputs, **leaves})
        gradients = torch.autograd.grad(value, list(leaves.values()))
        return {"value": value, **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}}

    def sizes(self, inputs: Inputs) -> Results:
        """What the results would be if no difference cancelled."""
        raise NotImplementedError

    def rule(self, exact: Inputs, truth: Results, dtype: torch.dtype) -> Rule:
        """|got - truth| <= 2 |same - truth| + 8 eps * size.

        Everything here is a difference of nearly equal numbers, so the error that rounding must leave is relative to
        their sum, the size; the rows hold up to 2^33 samples and the gradients are as small as their inverse, so
        nothing absolute would do.
        """
        sizes, eps = self.sizes(exact), torch.finfo(dtype).eps

        def compare(name: str, got: Tensor, truth: Tensor, same: Tensor) -> None:
            assert_within(name, got.double(), truth, 2 * (same.double() - truth).abs() + 8 * eps * sizes[name])

        return compare

    def calls(self, namespace: Any, device: str) -> Iterator[tuple[str, tuple]]:
        for case in self.witnesses:
            yield self.operators[0], (*cast(case.build(), torch.float32, device).values(),)


class Dependence(Penalty):
    operators = ("dependence",)
    cases = dependence_cases(*penalty_cases.DEPENDENCE)
    strided = ("rows", "count")
    layouts = dependence_cases(
        Case("groups-layout", lambda: groups(3, 5)),
        Case("cells-layout", lambda: cells(3, 5)),
    )
    repeated = dependence_cases(
        Case("groups-repeated", lambda: groups(3, 700)),
        Case("cells-repeated", lambda: cells(3, 40)),
    )
    threaded = dependence_cases(
        Case("groups-threads", lambda: groups(3, 9000)),
        Case("cells-threads", lambda: cells(3, 300)),
    )
    witnesses = by_id(cases, "groups-3x33-mi-weighted", "cells-3x5-l2-weighted", "groups-3x5-l2-weighted")
    leaves = ("rows",)
    operator = staticmethod(ops.dependence)
    formula = staticmethod(reference.dependence)

    def sizes(self, inputs: Inputs) -> Results:
        """Sums for differences, 1 + |log| for a logarithm."""
        rows, count, cell, num_cells, mutual_information, weighted = inputs.values()
        value, gradient = rows.new_zeros(()), torch.zeros_like(rows)
        members, n = segments(rows, count, cell, num_cells)
        for own in members:
            r, k = rows[own], n[own, None].double()
            if len(own) < 2:
                continue
            weight = k.sum() / count.sum() if weighted else 1.0
            if mutual_information:
                ratio = torch.where(r > 0, r * k.sum() / (r.sum(0) * k).clamp_min(1e-300), 1)
                term = torch.where(r > 0, 1 + ratio.log().abs(), 0) / k.sum()
                value, gradient[own] = value + weight * (r * term).sum(), weight * term
            else:
                d = r / k + r.sum(0) / k.sum()
                value, gradient[own] = value + weight * d.square().sum(), weight * 2 * (d / k + d.sum(0) / k.sum())
        return {"value": value, "gradient of rows": gradient}

    def function(self, inputs: Inputs, backend: str) -> tuple[Callable, tuple[Tensor, ...]]:
        rows, num_cells = inputs["rows"], inputs["num_cells"]
        used = len(rows) if num_cells is None else int(num_cells)

        def function(leaf: Tensor) -> Tensor:
            return ops.dependence(**{**inputs, "rows": torch.cat([leaf, rows[used:]])}, backend=backend)

        return function, ((rows[:used] + 0.1).requires_grad_(),)


class IoU(Penalty):
    operators = ("iou_penalty",)
    cases = iou_cases(*penalty_cases.IOU)
    strided = ("mass", "hit", "count")
    layouts = iou_cases(Case("layout", lambda: overlap(3, 5)))
    repeated = iou_cases(Case("repeated", lambda: overlap(3, 700)))
    threaded = iou_cases(Case("threads", lambda: overlap(3, 9000)))
    witnesses = by_id(cases, "3x33-paired-skip", "3x5-overall-skip")
    leaves = ("mass", "hit")
    operator = staticmethod(ops.iou_penalty)
    formula = staticmethod(reference.iou_penalty)

    def sizes(self, inputs: Inputs) -> Results:
        mass, hit, count, paired, skip = inputs.values()
        there = count.sum(1) > 0

        def means(mass: Tensor, hit: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
            union = mass + count - hit
            valid = (count > 0) if skip else torch.ones_like(count, dtype=torch.bool)
            some = valid & (union > 0)
            inverse = torch.where(some, 1 / torch.where(some, union, 1), 0)
            iou, number = hit * inverse, valid.sum(-1, keepdim=True).clamp_min(1)
            return iou.sum(-1) / number[..., 0], (inverse + iou * inverse) / number

        by_group, slope = means(mass, hit, count)
        overall, all_slope = means(mass.sum(0), hit.sum(0), count.sum(0))
        if paired:
            pairs = (there[:, None] & there).fill_diagonal_(False)
            gaps = torch.where(pairs, by_group[:, None] + by_group, 0)
            gradient, value = 2 * gaps.sum(1)[:, None] * slope, gaps.square().sum() / 2
        else:
            gaps = torch.where(there, by_group + overall, 0)
            gradient, value = 2 * gaps[:, None] * slope + 2 * gaps.sum() * all_slope, gaps.square().sum()
        return {"value": value, "gradient of mass": gradient, "gradient of hit": gradient}

    def function(self, inputs: Inputs, backend: str) -> tuple[Callable, tuple[Tensor, ...]]:
        def function(mass: Tensor, hit: Tensor) -> Tensor:
            return ops.iou_penalty(**{**inputs, "mass": mass, "hit": hit}, backend=backend)

        return function, ((inputs["mass"] + 0.1).requires_grad_(), inputs["hit"].requires_grad_())
