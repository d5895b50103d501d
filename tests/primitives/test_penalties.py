"""The primitives ``dependence`` and ``iou_penalty``: every back-end against the float64 oracle."""

import pytest
import torch

from classfair import backends
from classfair.ops.penalties import dependence, iou_penalty
from tests.support.conformance import Corrupt
from tests.support.pairs import runnable
from tests.support.penalty_cases import DEPENDENCE, IOU, cells, groups, overlap

PAIRS = runnable("penalties")
KERNELS = [p for p in PAIRS if p[0] != "reference"]
DTYPES = (torch.float32, torch.float64)
BOTH = (False, True)

each_backend = pytest.mark.parametrize(("backend", "device"), PAIRS, ids=["-".join(p) for p in PAIRS])
each_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=["-".join(p) for p in KERNELS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_kind = pytest.mark.parametrize("kind", ["l2", "mi"])
each_weighted = pytest.mark.parametrize("weighted", BOTH, ids=["plain", "weighted"])
each_paired = pytest.mark.parametrize("paired", BOTH, ids=["overall", "paired"])
each_skip = pytest.mark.parametrize("skip", BOTH, ids=["every-class", "skip"])
native_only = pytest.mark.skipif(
    "native" not in backends.available("penalties", "cpu"), reason="no compiled CPU kernels"
)

NAMES = {dependence: ("value", "gradient of rows"), iou_penalty: ("value", "gradient of mass", "gradient of hit")}


def cast(inputs, dtype, device="cpu"):
    """Floats in ``dtype``, all on a device."""
    return [t if t is None else t.to(device, dtype if t.is_floating_point() else t.dtype) for t in inputs]


def run(operator, inputs, backend, **options):
    """Value, and gradients of what is differentiable."""
    leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    value = operator(*leaves, backend=backend, **options)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted)]


def _segments(rows, count, cell=None, num_cells=None):
    """Numbers of the rows of each segment, those with samples, and samples behind every row."""
    if cell is None:
        n = count.sum(1)
        return [(n > 0).nonzero()[:, 0]], n
    n = count[cell % len(count), cell // len(count)] * (torch.arange(len(cell)) < num_cells)
    label = torch.where(n > 0, cell // len(count), -1)
    return [(label == k).nonzero()[:, 0] for k in label.unique() if k >= 0], n


def dependence_size(inputs, *, mutual_information, weighted):
    """What value and gradient would be if no difference cancelled: sums for differences, 1 + |log| for a logarithm."""
    rows = inputs[0]
    value, gradient = rows.new_zeros(()), torch.zeros_like(rows)
    segments, n = _segments(*inputs)
    for own in segments:
        r, k = rows[own], n[own, None].double()
        if len(own) < 2:
            continue
        weight = k.sum() / inputs[1].sum() if weighted else 1.0
        if mutual_information:
            ratio = torch.where(r > 0, r * k.sum() / (r.sum(0) * k).clamp_min(1e-300), 1)
            term = torch.where(r > 0, 1 + ratio.log().abs(), 0) / k.sum()
            value, gradient[own] = value + weight * (r * term).sum(), weight * term
        else:
            d = r / k + r.sum(0) / k.sum()
            value, gradient[own] = value + weight * d.square().sum(), weight * 2 * (d / k + d.sum(0) / k.sum())
    return [value, gradient]


def iou_size(inputs, *, paired, skip):
    """As dependence_size."""
    mass, hit, count = inputs
    there = count.sum(1) > 0

    def means(mass, hit, count):
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
        gradient = 2 * gaps.sum(1)[:, None] * slope
        return [gaps.square().sum() / 2, gradient, gradient]
    gaps = torch.where(there, by_group + overall, 0)
    gradient = 2 * gaps[:, None] * slope + 2 * gaps.sum() * all_slope
    return [gaps.square().sum(), gradient, gradient]


def check(operator, inputs, backend, device, dtype, **options):
    """|got - truth| <= 2 |same - truth| + 8 eps * size, element by element.

    ``truth`` is the reference in float64, ``same`` in the tested dtype, both of the same numbers. Everything here is a
    difference of nearly equal numbers, so the error that rounding must leave is relative to their sum, the size; the
    rows hold up to 2^33 samples and the gradients are as small as their inverse, so nothing absolute would do.
    """
    given = cast(inputs, dtype, device)
    before = [t if t is None else t.clone() for t in given]
    exact = cast(cast(inputs, dtype), torch.float64)
    got = run(operator, given, backend, **options)
    truth, same = (
        run(operator, exact, "reference", **options),
        run(operator, cast(inputs, dtype), "reference", **options),
    )
    sizes = (dependence_size if operator is dependence else iou_size)(exact, **options)
    for name, a, t, s, size in zip(NAMES[operator], got, truth, same, sizes, strict=True):
        assert (a.dtype, a.shape) == (dtype, t.shape), f"{name}: {a.dtype} {tuple(a.shape)}"
        bound = 2 * (s.double() - t).abs() + 8 * torch.finfo(dtype).eps * size
        wrong = ~((a.cpu().double() - t).abs() <= bound)
        assert not wrong.any(), (
            f"{name}: {a[wrong][:5].tolist()} instead of {t[wrong][:5].tolist()}, bound {bound[wrong][:5].tolist()}"
            f" at {wrong.nonzero()[:5].tolist()}"
        )
    for old, new in zip(before, given, strict=True):
        assert old is None or torch.equal(old, new), "an input was written"


@each_kernel
@pytest.mark.parametrize(("operator", "build"), [(dependence, groups), (dependence, cells), (iou_penalty, overlap)])
def test_tables_of_any_layout(operator, build, backend, device):
    inputs = cast(build(3, 5), torch.float64, device)
    strided = [t if t is None or t.dim() != 2 else t.t().contiguous().t() for t in inputs]
    for got, expected in zip(run(operator, strided, backend), run(operator, inputs, backend), strict=True):
        assert torch.equal(got, expected)


@each_dtype
@each_backend
@each_weighted
@each_kind
@pytest.mark.parametrize("case", DEPENDENCE, ids=lambda c: c.id)
def test_dependence_values_and_gradients(case, kind, weighted, backend, device, dtype):
    check(dependence, case.build(), backend, device, dtype, mutual_information=kind == "mi", weighted=weighted)


@each_dtype
@each_backend
@each_skip
@each_paired
@pytest.mark.parametrize("case", IOU, ids=lambda c: c.id)
def test_iou_values_and_gradients(case, paired, skip, backend, device, dtype):
    check(iou_penalty, case.build(), backend, device, dtype, paired=paired, skip=skip)


def _published_dependence(case, kind, weighted):
    """The formulas as the paper prints them, segment by segment."""
    rows, count, *_ = inputs = case.build()
    segments, n = _segments(*inputs)
    value = 0.0
    for own in segments:
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
@pytest.mark.parametrize("case", DEPENDENCE, ids=lambda c: c.id)
def test_the_oracle_is_the_published_formula(case, kind, weighted):
    got = dependence(*case.build(), mutual_information=kind == "mi", weighted=weighted)
    assert got.item() == pytest.approx(_published_dependence(case, kind, weighted), rel=1e-12, abs=1e-12)


EXACT = ("cells-one-hot", "groups-one-hot", "groups-1x5", "cells-1x5", "groups-one-of-two", "groups-no-samples")


@each_dtype
@each_backend
@each_kind
@pytest.mark.parametrize("case", [c for c in DEPENDENCE if c.id in EXACT], ids=lambda c: c.id)
def test_what_does_not_depend_on_the_group_is_exactly_zero(case, kind, backend, device, dtype):
    value, gradient = run(dependence, cast(case.build(), dtype, device), backend, mutual_information=kind == "mi")
    assert value.item() == 0
    if backend != "reference":  # autograd subtracts two derivatives of the logarithm
        assert not gradient.any()


@each_dtype
@each_backend
@each_paired
@pytest.mark.parametrize("case", [c for c in IOU if c.id.startswith("perfect")], ids=lambda c: c.id)
def test_a_perfect_classifier_has_no_iou_penalty(case, paired, backend, device, dtype):
    assert not any(t.any() for t in run(iou_penalty, cast(case.build(), dtype, device), backend, paired=paired))


@each_backend
def test_unused_rows_and_groups_without_samples_have_no_gradient(backend, device):
    unused = cast(cells(3, 31), torch.float32, device)
    _, gradient = run(dependence, unused, backend)
    assert not gradient[-2:].any()
    unused[0][-2:] = torch.tensor([[torch.nan], [torch.inf]])
    value, again = run(dependence, unused, backend)
    assert bool(value.isfinite())
    assert torch.equal(gradient, again)
    _, gradient = run(dependence, cast(groups(3, 33, empty=1), torch.float32, device), backend)
    assert not gradient[1].any()


@each_kernel
@each_kind
@each_weighted
@pytest.mark.parametrize("build", [groups, cells])
def test_dependence_gradcheck(build, kind, weighted, backend, device):
    rows, *rest = cast(build(3, 5, spare=1) if build is cells else build(3, 5), torch.float64, device)
    used = len(rows) - (build is cells)

    def value(leaf):
        whole = torch.cat([leaf, rows[used:]])
        return dependence(whole, *rest, mutual_information=kind == "mi", weighted=weighted, backend=backend)

    leaf = (rows[:used] + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(value, leaf)
    assert torch.autograd.gradgradcheck(value, leaf)


@each_kernel
@each_skip
@each_paired
def test_iou_gradcheck(paired, skip, backend, device):
    mass, hit, count = cast(overlap(3, 4), torch.float64, device)

    def value(mass, hit):
        return iou_penalty(mass, hit, count, paired=paired, skip=skip, backend=backend)

    leaves = (mass + 0.1).requires_grad_(), hit.requires_grad_()
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


@each_kernel
@each_kind
def test_dependence_opcheck(kind, backend, device):
    operator = backends.namespace(backend).dependence.default
    for inputs in (groups(3, 5), cells(3, 5), cells(2, 5, spare=0)):
        given = [*cast(inputs, torch.float32, device), kind == "mi", True]
        torch.library.opcheck(operator, given)


@each_kernel
@each_paired
def test_iou_opcheck(paired, backend, device):
    given = [*cast(overlap(3, 5), torch.float32, device), paired, True]
    torch.library.opcheck(backends.namespace(backend).iou_penalty.default, given)


@each_kernel
def test_repeats_bitwise(backend, device):
    of_groups, of_cells = (cast(x, torch.float32, device) for x in (groups(3, 700), cells(3, 40)))
    of_iou = cast(overlap(3, 700), torch.float32, device)

    def results():
        return [
            *run(dependence, of_groups, backend, mutual_information=True),
            *run(dependence, of_cells, backend, weighted=True),
            *run(iou_penalty, of_iou, backend),
        ]

    first = results()
    for _ in range(20 if backend == "native" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@native_only
def test_any_number_of_threads_gives_the_same_bits():
    of_groups, of_cells = (cast(x, torch.float32) for x in (groups(3, 9000), cells(3, 300)))
    of_iou = cast(overlap(3, 9000), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            found.append(
                [
                    *run(dependence, of_groups, "native", mutual_information=True),
                    *run(dependence, of_cells, "native"),
                    *run(iou_penalty, of_iou, "native"),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@native_only
@pytest.mark.parametrize(
    ("operator", "output"), [(dependence, 0), (dependence, 1), *((iou_penalty, i) for i in range(3))]
)
def test_a_corrupted_result_is_caught(operator, output, monkeypatch):
    inputs = groups(3, 33) if operator is dependence else overlap(3, 33)
    named = {"mutual_information": True, "weighted": True} if operator is dependence else {"paired": True, "skip": True}
    check(operator, inputs, "native", "cpu", torch.float32, **named)
    real = backends.namespace
    monkeypatch.setattr(
        backends, "namespace", lambda name: Corrupt(real(name), operator.__name__, output, lambda v: v + 1e-4)
    )
    with pytest.raises(AssertionError):
        check(operator, inputs, "native", "cpu", torch.float32, **named)
