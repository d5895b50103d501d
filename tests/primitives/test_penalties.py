"""What only ``dependence`` and ``iou_penalty`` promise; their conformance is in test_conformance.py."""

import pytest
import torch

from classfair import ops, reference
from tests.support.conformance import cast
from tests.support.pairs import runnable
from tests.support.penalty_cases import DEPENDENCE as DEPENDENCE_CASES
from tests.support.penalty_cases import IOU as IOU_CASES
from tests.support.penalty_cases import cells, dependence_cases, groups, iou_cases, segments
from tests.support.primitives import DEPENDENCE, IOU

PAIRS = runnable("penalties")

each_backend = pytest.mark.parametrize(("backend", "device"), PAIRS, ids=["-".join(p) for p in PAIRS])
each_dtype = pytest.mark.parametrize("dtype", DEPENDENCE.dtypes, ids=lambda d: str(d).removeprefix("torch."))
each_kind = pytest.mark.parametrize("kind", ["l2", "mi"])
each_weighted = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def _published_dependence(case, kind, weighted):
    """The formulas as the paper prints them, segment by segment."""
    rows, count, cell, num_cells = case.build()
    own_rows, n = segments(rows, count, cell, num_cells)
    value = 0.0
    for own in own_rows:
        size = n[own].double().sum()
        joint, k = rows[own] / size, n[own, None] / size
        if kind == "l2":
            term = (rows[own] / n[own, None] - joint.sum(0)).square()
        else:
            term = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, joint.sum(0) * k)
        value += term.sum().item() * (size.item() / max(1, count.sum().item()) if weighted else 1)
    return value


@each_weighted
@each_kind
@pytest.mark.parametrize("case", DEPENDENCE_CASES, ids=lambda c: c.id)
def test_the_oracle_is_the_published_formula(case, kind, weighted):
    expected = pytest.approx(_published_dependence(case, kind, weighted), rel=1e-12, abs=1e-12)
    for function in (reference.dependence, ops.dependence):
        assert function(*case.build(), mutual_information=kind == "mi", weighted=weighted).item() == expected


EXACT = ("cells-one-hot", "groups-one-hot", "groups-1x5", "cells-1x5", "groups-one-of-two", "groups-no-samples")


@each_dtype
@each_backend
@pytest.mark.parametrize("case", dependence_cases(*(c for c in DEPENDENCE_CASES if c.id in EXACT)), ids=lambda c: c.id)
def test_what_does_not_depend_on_the_group_is_exactly_zero(case, backend, device, dtype):
    assert not any(t.any() for t in DEPENDENCE.run(cast(case.build(), dtype, device), backend).values())


#: An absent class, where it counts, is one that nobody finds.
PERFECT = [c for c in iou_cases(*(c for c in IOU_CASES if c.id.startswith("perfect"))) if c.id.endswith("-skip")]


@each_dtype
@each_backend
@pytest.mark.parametrize("case", PERFECT, ids=lambda c: c.id)
def test_a_perfect_classifier_has_no_iou_penalty(case, backend, device, dtype):
    assert not any(t.any() for t in IOU.run(cast(case.build(), dtype, device), backend).values())


@each_backend
def test_unused_rows_and_groups_without_samples_have_no_gradient(backend, device):
    def run(rows):
        return DEPENDENCE.run(cast(rows._asdict(), torch.float32, device), backend).values()

    unused = cells(3, 31)
    _, gradient = run(unused)
    assert not gradient[-2:].any()
    unused.rows[-2:] = torch.tensor([[torch.nan], [torch.inf]], dtype=torch.float64)
    value, again = run(unused)
    assert bool(value.isfinite())
    assert torch.equal(gradient, again)
    _, gradient = run(groups(3, 33, empty=1))
    assert not gradient[1].any()
