"""Every back-end against the float64 oracle, over case × back-end × device × dtype."""

import pytest
import torch

from classfair import backends
from classfair._schema import Scalars, Tensors
from classfair.ops import softmax_loss
from tests.support.cases import ALL_HARD, CASES, DIFFERENTIABLE, Case
from tests.support.conformance import GRADIENT_SOURCES, as_truth, cast, check_case, check_inputs, run, upstream
from tests.support.pairs import CHOOSES_ORDER_BY_LAYOUT, runnable

PAIRS = runnable("softmax_loss")
IDS = [f"{b}-{d}" for b, d in PAIRS]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL = [c for c in CASES if c.small]
ALL = next(c for c in CASES if c.id == "all-many-rows")

each_backend = pytest.mark.parametrize(("backend", "device"), PAIRS, ids=IDS)
# torch may sum a strided reference in another order; kernels may not.
KERNELS = [p for p in PAIRS if p[0] != "reference"]
each_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=["-".join(p) for p in KERNELS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@each_dtype
@each_backend
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_values_and_gradients(case, backend, device, dtype):
    if dtype == torch.float16 and case.id in ("huge", "shifted-1e4", "shifted-1e4-perturbed"):
        case = Case(case.id, case.shape, case.features, case.stats, 1e3, None)  # in the range of float16
    check_case(case, backend, device, dtype)


@each_backend
@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_one_gradient_at_a_time(wanted, backend, device):
    inputs = cast(ALL.build(), torch.float64, device)
    _, alone = run(inputs, backend, (wanted,))
    _, together = run(inputs, backend)
    # Sums over rows run in another order when rows are sorted for pair: equal up to rounding.
    torch.testing.assert_close(alone[wanted], together[wanted], rtol=1e-12, atol=1e-13)


@each_backend
@pytest.mark.parametrize("source", GRADIENT_SOURCES)
def test_one_output_at_a_time(source, backend, device):
    inputs = cast(ALL.build(), torch.float64, device)

    def gradient(values, name):
        leaf = values["logits"].detach().requires_grad_()
        out = softmax_loss(**{**values, "logits": leaf}, backend=name)
        g = upstream(out)[GRADIENT_SOURCES.index(source)]
        return torch.autograd.grad(getattr(out, source), leaf, g.to(leaf.device))[0].cpu()

    torch.testing.assert_close(
        gradient(inputs, backend), gradient(as_truth(inputs), "reference"), rtol=1e-12, atol=1e-13
    )


def _differentiable(case, device):
    inputs = cast(case.build(), torch.float64, device)
    leaves = {n: inputs[n].requires_grad_() for n in DIFFERENTIABLE if n in inputs}
    return inputs, leaves


@each_backend
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.id)
def test_gradcheck(case, backend, device):
    inputs, leaves = _differentiable(case, device)

    def function(*values):
        out = softmax_loss(**{**inputs, **dict(zip(leaves, values, strict=True))}, backend=backend)
        return tuple(o for o in (getattr(out, n) for n in GRADIENT_SOURCES) if o is not None and o.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@each_backend
@pytest.mark.parametrize("case", [c for c in SMALL if c.shape[0] > 0], ids=lambda c: c.id)
def test_gradgradcheck(case, backend, device):
    inputs, leaves = _differentiable(case, device)

    def function(*values):
        out = softmax_loss(**{**inputs, **dict(zip(leaves, values, strict=True))}, backend=backend)
        return tuple(o for o in (getattr(out, n) for n in GRADIENT_SOURCES) if o is not None and o.requires_grad)

    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "case", [c for c in SMALL if c.id in ("all", "weight-stats", "smoothing", "ignore")], ids=lambda c: c.id
)
def test_reduced_in_the_same_call(case, reduction, backend, device):
    inputs, leaves = _differentiable(case, device)

    def function(*values):
        given = {**inputs, **dict(zip(leaves, values, strict=True))}
        return softmax_loss(**given, reduction=reduction, backend=backend).loss

    rows = softmax_loss(**inputs, backend=backend)
    expected = rows.loss.sum() / (rows.total_weight if reduction == "mean" else 1)
    torch.testing.assert_close(function(*leaves.values()), expected, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@each_backend
def test_third_derivative(backend, device):
    def third(name, where):
        inputs = cast(Case("third", (5, 4), ("offset", "focal"), 2).build(), torch.float64, where)
        logits = inputs["logits"].requires_grad_()
        out = softmax_loss(**inputs, backend=name)
        value = out.loss.sum() + out.mass.square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
            value = gradient.square().sum()
        return value.cpu()

    torch.testing.assert_close(third(backend, device), third("reference", "cpu"), rtol=1e-10, atol=0)


LAYOUTS = (
    Case("layout", (67, 35), ("offset", "rows", "smoothing"), 2),
    Case("layout-narrow", (67, 3), ("group", "joint"), 2),
)


def _layouts(x):
    n, c = x.shape
    padded = torch.zeros(n, c + 3, dtype=x.dtype, device=x.device)
    padded[:, 1:-2] = x
    offset = torch.zeros(n * c + 1, dtype=x.dtype, device=x.device)
    offset[1:] = x.reshape(-1)
    return {
        "transposed": x.t().contiguous().t(),
        "column-slice": padded[:, 1:-2],
        "misaligned": offset[1:].view(n, c),
        "every-second-row": torch.stack([x, x], 1).view(2 * n, c)[::2],
        "flipped-storage": x.flip(0).flip(0),
    }


@each_dtype
@each_kernel
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: c.id)
@pytest.mark.parametrize("layout", ["transposed", "column-slice", "misaligned", "every-second-row", "flipped-storage"])
def test_layout_does_not_change_a_bit(layout, case, backend, device, dtype):
    inputs = cast(case.build(), dtype, device)
    strided = {**inputs, "logits": _layouts(inputs["logits"])[layout]}
    if (backend, device) == CHOOSES_ORDER_BY_LAYOUT:
        check_inputs(strided, backend, dtype)
        return
    expected, expected_gradients = run(inputs, backend)
    out, gradients = run(strided, backend)
    for name in expected._fields:
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@each_backend
def test_channels_last_and_expanded(backend, device):
    inputs = cast(Case("strided", (2, 7, 12), ("offset", "smoothing"), 2).build(), torch.float32, device)
    expected, expected_gradients = run(inputs, backend)
    last = inputs["logits"].movedim(1, -1).contiguous().movedim(-1, 1)
    out, gradients = run({**inputs, "logits": last}, backend)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(gradients["logits"], expected_gradients["logits"])
    row = inputs["logits"][:1].expand(2, -1, -1)
    out, gradients = run({**inputs, "logits": row}, backend)
    dense, dense_gradients = run({**inputs, "logits": row.contiguous()}, backend)
    assert torch.equal(out.loss, dense.loss)
    assert torch.equal(gradients["logits"], dense_gradients["logits"])


@each_backend
def test_repeats_bitwise(backend, device):
    inputs = cast(ALL.build(), torch.float32, device)
    first, first_gradients = run(inputs, backend)
    for _ in range(20):
        again, gradients = run(inputs, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(first_gradients[n], g) for n, g in gradients.items())


@pytest.mark.skipif("native" not in backends.available("softmax_loss", "cpu"), reason="no compiled CPU kernels")
def test_any_number_of_threads_gives_the_same_bits():
    cases = [ALL, Case("threads", (301, 77), ALL_HARD, 2), Case("threads-wide", (150, 301), ("group", "joint"), 2)]
    cases.append(Case("threads-by-group", (150, 301), ("many_groups", "joint"), 2))
    cases.append(Case("threads-narrow", (3000, 2), ("ignore", "group", "joint"), 2))
    threads = torch.get_num_threads()
    try:
        for case in cases:
            inputs = cast(case.build(), torch.float32, "cpu")
            results = []
            for n in (1, 2, 3, 5):
                torch.set_num_threads(n)
                out, gradients = run(inputs, "native")
                results.append([*out, *gradients.values()])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@each_dtype
@each_backend
@pytest.mark.parametrize("classes", [1, 3, 40])
def test_a_certain_row_costs_exactly_nothing(classes, backend, device, dtype):
    target = torch.arange(50) % classes
    logits = (1000 * torch.nn.functional.one_hot(target, classes)).to(device, dtype)
    out = softmax_loss(logits, target=target.to(device), stats=2, backend=backend)
    assert not out.loss.any()
    assert torch.equal(out.hit.sum(), torch.tensor(50.0, dtype=out.hit.dtype, device=device))


@each_backend
def test_values_only_statistics_cost_no_gradient(backend, device):
    inputs = cast(Case("values", (9, 6), ("group",), 1).build(), torch.float32, device)
    inputs["logits"].requires_grad_()
    out = softmax_loss(**inputs, backend=backend)
    assert out.loss.requires_grad
    assert not any(getattr(out, n).requires_grad for n in ("mass", "hit", "joint"))


@each_kernel
def test_unwanted_outputs_are_empty_and_do_not_alias(backend, device):
    x = cast(Case("bare", (9, 6)).build(), torch.float32, device)
    operator = backends.namespace(backend).softmax_loss_fwd
    out = operator(*Tensors(x["logits"], target=x["target"]), *Scalars())
    assert [t.numel() for t in out] == [9, 9, 0, 0, 0, 0, 0, 0, 1, 1]
    storages = [t.untyped_storage()._cdata for t in out]
    assert len(set(storages)) == len(storages)
