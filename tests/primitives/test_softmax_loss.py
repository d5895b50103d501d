"""What only ``softmax_loss`` promises; its conformance is in test_conformance.py."""

import pytest
import torch

from classfair import backends
from classfair._schema import Scalars, Tensors
from classfair.ops import softmax_loss
from tests.support.conformance import as_truth, assert_same_bits, cast, upstream
from tests.support.pairs import runnable
from tests.support.primitives import SOFTMAX_LOSS
from tests.support.softmax_cases import CASES, DIFFERENTIABLE, Case

PAIRS = runnable("softmax_loss")
KERNELS = [p for p in PAIRS if p[0] != "reference"]
ALL = next(c for c in CASES if c.id == "all-many-rows")

each_backend = pytest.mark.parametrize(("backend", "device"), PAIRS, ids=["-".join(p) for p in PAIRS])
each_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=["-".join(p) for p in KERNELS])
each_dtype = pytest.mark.parametrize("dtype", SOFTMAX_LOSS.dtypes, ids=lambda d: str(d).removeprefix("torch."))


@each_backend
@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_one_gradient_at_a_time(wanted, backend, device):
    inputs = cast(ALL.build(), torch.float64, device)
    alone, together = (SOFTMAX_LOSS.run(inputs, backend, names) for names in ((wanted,), DIFFERENTIABLE))
    name = f"gradient of {wanted}"
    # Sums over rows run in another order when rows are sorted for pair: equal up to rounding.
    torch.testing.assert_close(alone[name], together[name], rtol=1e-12, atol=1e-13)


@each_backend
@pytest.mark.parametrize("source", SOFTMAX_LOSS.sources)
def test_one_output_at_a_time(source, backend, device):
    inputs = cast(ALL.build(), torch.float64, device)

    def gradient(values, name):
        leaf = values["logits"].detach().requires_grad_()
        out = getattr(softmax_loss(**{**values, "logits": leaf}, backend=name), source)
        return torch.autograd.grad(out, leaf, upstream([out]))[0].cpu()

    torch.testing.assert_close(
        gradient(inputs, backend), gradient(as_truth(inputs), "reference"), rtol=1e-12, atol=1e-13
    )


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.id in ("all", "weight-stats", "smoothing", "ignore")], ids=lambda c: c.id
)
def test_reduced_in_the_same_call(case, reduction, backend, device):
    inputs = cast(case.build(), torch.float64, device)
    rows = softmax_loss(**inputs, backend=backend)
    expected = rows.loss.sum() / (rows.total_weight if reduction == "mean" else 1)
    torch.testing.assert_close(
        softmax_loss(**inputs, reduction=reduction, backend=backend).loss, expected, rtol=1e-13, atol=0
    )


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


@each_backend
def test_channels_last_and_expanded(backend, device):
    inputs = cast(Case("strided", (2, 7, 12), ("offset", "smoothing"), 2).build(), torch.float32, device)
    logits = inputs["logits"]
    row = logits[:1].expand(2, -1, -1)
    for strided in (logits.movedim(1, -1).contiguous().movedim(-1, 1), row):
        got, expected = (
            SOFTMAX_LOSS.run({**inputs, "logits": x}, backend, ("logits",)) for x in (strided, strided.contiguous())
        )
        names = ("loss", "gradient of logits")
        assert_same_bits({n: got[n] for n in names}, {n: expected[n] for n in names})


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


@each_backend
def test_a_label_without_a_share_has_no_part_in_its_row(backend, device):
    """Beside infinities and NaN its margin's gradient is 0, not 0 times those."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, generator=g, dtype=torch.float64)
    logits[0, 1], logits[1, 2], logits[2, 3], logits[3, 30] = torch.inf, torch.nan, -torch.inf, torch.inf
    labels, others = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([7, 8, 9, 10, 11, 12])
    shares = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    margin, results = torch.rand(40, generator=g, dtype=torch.float64), []
    for name, where in (("reference", "cpu"), (backend, device)):
        inputs = (t.to(where) for t in (labels, others, shares))
        leaves = [t.to(where, copy=True).requires_grad_() for t in (logits, margin)]
        target, target_b, mix = inputs
        out = softmax_loss(
            leaves[0], target=target, target_b=target_b, mix=mix, margin=leaves[1], stats=2, backend=name
        )
        values = (out.loss, out.hit, *torch.autograd.grad(out.loss.sum(), leaves))
        results.append([v.detach().cpu() for v in values])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14, equal_nan=True)
    assert results[1][-1][[5, 6]].all()
    assert int(results[1][-1].count_nonzero()) == 2


@each_backend
@pytest.mark.parametrize("classes", [629, 8142])
def test_dense_losses_are_sums_without_a_loss_of_digits(classes, backend, device):
    """Of thousands of terms; added up in float32, one after the other, they lose 1e-6 to 4e-6 of their sum."""
    g = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(20, classes, generator=g, dtype=torch.float64).float()
    soft = torch.rand(20, classes, generator=g, dtype=torch.float64)
    soft = (soft / soft.sum(1, keepdim=True)).float()
    exact = softmax_loss(logits.double(), soft_target=soft.double(), backend="reference").loss
    got = softmax_loss(logits.to(device), soft_target=soft.to(device), backend=backend).loss.cpu().double()
    torch.testing.assert_close(got, exact, rtol=4e-7, atol=0)  # of a float32 log-sum-exp, and of targets in float32
