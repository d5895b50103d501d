"""Every back-end of every primitive against the oracle, over case × back-end × device × dtype."""

import pytest
import torch

from classfair import backends
from tests.support.conformance import (
    LAYOUTS,
    Corrupt,
    assert_same_bits,
    check,
    check_case,
    laid_out,
    outputs,
    threads,
)
from tests.support.pairs import CHOOSES_ORDER_BY_LAYOUT, runnable
from tests.support.primitives import PRIMITIVES

NO_KERNELS = "no compiled CPU kernels"
native_only = pytest.mark.skipif("_C" in backends.load_errors, reason=NO_KERNELS)
INTERPRETED = ("triton", "cpu")


def slow(primitive, backend, device):
    """Here the oracle is compared with itself in another dtype."""
    return backend == "reference" and primitive.name != "penalties"


def over(cases, dtypes=lambda primitive: (torch.float32,), pairs=lambda primitive: runnable(primitive.name)):
    """One test for every primitive, case of it, pair of back-end and device, and dtype."""
    values = [
        pytest.param(
            p,
            case,
            *pair,
            dtype,
            id="-".join([p.operators[0], case.id, *pair, str(dtype).removeprefix("torch.")]),
            marks=[pytest.mark.slow] * slow(p, *pair),
        )
        for p in PRIMITIVES
        for case in cases(p)
        for pair in pairs(p)
        for dtype in dtypes(p)
    ]
    return pytest.mark.parametrize(("primitive", "case", "backend", "device", "dtype"), values)


def kernels(primitive):
    """Without the reference, whose sums may be of another order for another layout."""
    return [pair for pair in runnable(primitive.name) if pair[0] != "reference"]


def native(primitive):
    return [pair for pair in runnable(primitive.name) if pair == ("native", "cpu")]


def float64(primitive):
    return (torch.float64,)


@over(lambda p: p.cases, dtypes=lambda p: p.dtypes)
def test_values_and_gradients(primitive, case, backend, device, dtype):
    inputs = primitive.inputs(case, dtype, device)
    if (backend, device) == INTERPRETED and max(v.numel() for v in inputs.values() if torch.is_tensor(v)) > 45_000:
        pytest.skip("minutes in the interpreter")
    check(primitive, inputs, backend, dtype)


@over(lambda p: [c for c in p.cases if c.small], float64)
def test_gradcheck(primitive, case, backend, device, dtype):
    function, leaves = primitive.function(primitive.inputs(case, dtype, device), backend)
    assert torch.autograd.gradcheck(function, leaves, **primitive.gradcheck_options(backend)["first"])


@over(lambda p: [c for c in p.cases if c.small], float64)
def test_gradgradcheck(primitive, case, backend, device, dtype):
    function, leaves = primitive.function(primitive.inputs(case, dtype, device), backend)
    assert torch.autograd.gradgradcheck(function, leaves, **primitive.gradcheck_options(backend)["second"])


@over(lambda p: p.layouts, lambda p: p.dtypes, kernels)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_a_bit(primitive, case, backend, device, dtype, layout):
    inputs = primitive.inputs(case, dtype, device)
    strided = {n: laid_out(v, layout) if n in primitive.strided else v for n, v in inputs.items()}
    if (backend, device) == CHOOSES_ORDER_BY_LAYOUT:
        check(primitive, strided, backend, dtype)
    else:
        assert_same_bits(primitive.run(strided, backend), primitive.run(inputs, backend))


@over(lambda p: p.repeated)
def test_repeats_bitwise(primitive, case, backend, device, dtype):
    inputs = primitive.inputs(case, dtype, device)
    first = primitive.run(inputs, backend)
    for _ in range(3 if (backend, device) == INTERPRETED else 20):
        assert_same_bits(primitive.run(inputs, backend), first)


@over(lambda p: p.threaded, pairs=native)
def test_any_number_of_threads_gives_the_same_bits(primitive, case, backend, device, dtype):
    inputs, results = primitive.inputs(case, dtype, device), []
    for number in (1, 2, 3, 5):
        with threads(number):
            results.append(primitive.run(inputs, backend))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize(
    ("primitive", "backend", "device"),
    [pytest.param(p, *pair, id="-".join([p.operators[0], *pair])) for p in PRIMITIVES for pair in kernels(p)],
)
def test_opcheck(primitive, backend, device):
    namespace = backends.namespace(backend)
    for operator, arguments in primitive.calls(namespace, device):
        torch.library.opcheck(getattr(namespace, operator).default, arguments)


@native_only
@pytest.mark.parametrize("kind", ["slightly-off", "unwritten"])
@pytest.mark.parametrize(
    ("primitive", "operator", "output"),
    [
        pytest.param(p, operator, i, id=f"{operator}-{i}")
        for p in PRIMITIVES
        for operator in p.operators
        for i in outputs("native", operator)
    ],
)
def test_a_corrupted_output_is_caught(primitive, operator, output, kind, monkeypatch):
    """The suite can fail: the comparison above notices every output of every operator."""

    def wrong(value):
        if not value.is_floating_point():
            return value + (1 if kind == "slightly-off" else 10**9)
        return value + primitive.visible if kind == "slightly-off" else value * torch.nan

    def check_all():
        for case in primitive.witnesses:
            check_case(primitive, case, "native", "cpu", primitive.dtypes[0])

    check_all()
    real = backends.namespace
    monkeypatch.setattr(backends, "namespace", lambda name: Corrupt(real(name), operator, output, wrong))
    with pytest.raises(AssertionError):
        check_all()
