"""What only ``pair_terms`` promises, and where it hurts; its conformance is in test_conformance.py."""

import pytest
import torch

from classfair import backends, ops, reference
from tests.support.conformance import upstream
from tests.support.pair_cases import draw, pairs
from tests.support.pairs import runnable

PAIRS = runnable("pair_terms")
CPU = [b for b, d in PAIRS if d == "cpu" and b != "triton"]
each_backend = pytest.mark.parametrize(("backend", "device"), PAIRS, ids=["-".join(p) for p in PAIRS])
each_normalize = pytest.mark.parametrize("normalize", [False, True], ids=["variance", "ratio"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def inputs(*shape, device="cpu", dtype=torch.float64, spare=2):
    """weight, cov, label and num_slots, with some slots unused."""
    weight, cov, label, count, *_ = pairs(*shape, spare=spare).values()
    return weight.to(device, dtype), cov.to(device, dtype), label.to(device), count.to(device)


def run(arguments, normalize, backend, *, with_cov=True, want_square=True):
    """Outputs and gradients of weight and cov from both outputs together."""
    weight, cov, label, count = arguments
    leaves = [weight.detach().requires_grad_()] + ([cov.detach().requires_grad_()] if with_cov else [])
    given = leaves[1] if with_cov else None
    out = ops.pair_terms(leaves[0], given, label, count, normalize=normalize, want_square=want_square, backend=backend)
    values = [t for t in out if t is not None]
    return values, torch.autograd.grad(values, leaves, upstream(values, seed=5))


def published(weight, cov, label, normalize):
    """The formula as the papers print it, on M x C x D differences."""
    difference = weight[None] - weight[label][:, None]
    form = (cov[label][:, None] * difference**2).sum(-1)
    square = (difference**2).sum(-1)
    return torch.where(square > 0, form / torch.where(square > 0, square, 1), 0) if normalize else form


@each_normalize
def test_the_oracle_is_the_published_formula(normalize):
    weight, cov, label, count = inputs(6, 4, 5, spare=0)
    weight.requires_grad_()
    cov.requires_grad_()
    got = reference.pair_terms(weight, cov, label, count, normalize, True)
    expected = published(weight, cov, label, normalize)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], torch.cdist(weight, weight)[label].square())
    for a, b in zip(*(torch.autograd.grad(v.square().sum(), (weight, cov)) for v in (got[0], expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_is_the_written_out_one():
    """dW = 2[(G'V)W - G'(VW) + rVW - V(GW)], dV = rWW - 2W(GW) + G(WW), with r the row sums of G."""
    weight, cov, label, count = inputs(6, 4, 6, spare=0)
    g = draw(6, 6)
    r = g.sum(1, keepdim=True)
    by_hand = 2 * ((g.T @ cov) * weight - g.T @ (cov * weight) + r * cov * weight - cov * (g @ weight))
    cov_by_hand = r * weight**2 - 2 * weight * (g @ weight) + g @ weight**2
    got = reference.pair_terms_backward((g, None), (weight, cov, label, count), False, True)
    torch.testing.assert_close(got, (by_hand, cov_by_hand))


@each_backend
@pytest.mark.parametrize("wanted", ["square", "variance", "variance-only-weight"])
def test_one_output_at_a_time(wanted, backend, device):
    arguments = inputs(19, 21, 9, device=device)
    with_cov, square = wanted != "square", wanted == "square"
    got = run(arguments, False, backend, with_cov=with_cov, want_square=square)
    given = [a.cpu() for a in arguments]
    expected = run(given, False, "reference", with_cov=with_cov, want_square=square)
    assert len(got[0]) == 1
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)
    if wanted == "variance-only-weight":
        leaf = arguments[0].requires_grad_()
        out = ops.pair_terms(leaf, *arguments[1:], backend=backend).variance
        (alone,) = torch.autograd.grad(out, leaf, *upstream([out], seed=5))
        torch.testing.assert_close(alone, got[1][0], rtol=1e-12, atol=1e-12)


@each_backend
@each_normalize
def test_exact_zeros(normalize, backend, device):
    """At c = y, in unused slots, and at no label at all."""
    weight, cov, label, _ = inputs(9, 5, 4, device=device, dtype=torch.float32)
    for used in (4, 1, 0):
        (variance, square), gradients = run((weight, cov, label, torch.tensor(used, device=device)), normalize, backend)
        own = torch.arange(used, device=device)
        assert bool((variance[own, label[:used]] == 0).all())
        assert bool((square[own, label[:used]] == 0).all())
        assert not variance[used:].any()
        assert not square[used:].any()
        if used == 0:
            assert not any(g.any() for g in gradients)
    assert ops.pair_terms(weight, cov, label[:0], torch.tensor(0, device=device), backend=backend).variance.shape == (
        0,
        9,
    )


@each_backend
def test_the_ratio_at_coinciding_rows(backend, device):
    """A head that starts at zero, equal rows among others, and rows closer than the threshold: 0 with zero gradient."""
    cov = (draw(6, 5).square() + 0.1).to(device, torch.float32)
    heads = {"zero": torch.zeros(6, 5), "equal": torch.ones(6, 5), "tiny": 1e-8 * torch.eye(6, 5)}
    label, count = torch.arange(6, device=device), torch.tensor(6, device=device)
    for name, weight in heads.items():
        (variance, _), gradients = run((weight.to(device), cov, label, count), True, backend, want_square=False)
        assert not variance.any(), name
        if name != "tiny":
            assert not any(g.any() for g in gradients), name
    mixed = draw(6, 5).float()
    mixed[3] = mixed[1]
    (ratio, _), gradients = run((mixed.to(device), cov, label, count), True, backend)
    assert ratio[1, 3] == ratio[3, 1] == 0
    assert int((ratio == 0).sum()) == 8
    assert all(bool(g.isfinite().all()) for g in gradients)


@each_backend
@pytest.mark.parametrize("relative", [1e-3, 1e-4, 1e-5])
def test_nearly_equal_rows_are_as_accurate_as_others(relative, backend, device):
    """Rows that differ by 1e-4 of their norm. The expansion into matrix products fails here, centred or not."""
    weight, cov = draw(40, 200).float(), (draw(40, 200, seed=1).square() + 0.1).float()
    weight[1] = weight[0] + relative * draw(200, seed=3).float()
    truth = published(weight.double(), cov.double(), torch.arange(2), True)[0, 1]
    index = torch.arange(40, device=device), torch.tensor(40, device=device)
    (ratio, _), (gradient, _) = run((weight.to(device), cov.to(device), *index), True, backend)
    assert abs(ratio[0, 1].item() / truth.item() - 1) < 1e-6
    (_, _), (expected, _) = run((weight.double(), cov.double(), *(i.cpu() for i in index)), True, "reference")
    assert (gradient.cpu() - expected).abs().max() < 2e-6 * expected.abs().max()
    if relative <= 1e-4:
        w = weight - weight.mean(0)
        form = cov @ (w * w).T - 2 * (cov * w) @ w.T + (cov * w * w).sum(1, keepdim=True)
        square = (w * w).sum(1) - 2 * w @ w.T + (w * w).sum(1, keepdim=True)
        assert not abs((form / square)[0, 1].item() / truth.item() - 1) < 1e-2


@each_backend
@each_dtype
def test_the_ratio_lies_between_the_extremes_of_the_diagonal(backend, device, dtype):
    weight, cov, label, count = inputs(30, 65, 30, device=device, dtype=dtype, spare=0)
    cov[:3] = 0.3  # any other value is a rounding error
    ratio = ops.pair_terms(weight, cov, label, count, normalize=True, backend=backend).variance
    other = ~torch.eye(30, dtype=torch.bool, device=device)
    low, high = cov.amin(1, keepdim=True).expand(30, 30), cov.amax(1, keepdim=True).expand(30, 30)
    assert bool((ratio >= low)[other].all())
    assert bool((ratio <= high)[other].all())


@pytest.mark.parametrize("backend", CPU)
def test_function_transforms(backend):
    weight, cov, label, count = inputs(4, 3, 3)

    def energy(w):
        return ops.pair_terms(w, cov, label, count, normalize=True, backend=backend).variance.square().sum()

    def published_energy(w):
        return published(w, cov, label[:3], True).square().sum()

    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(transform(energy)(weight), transform(published_energy)(weight))
    third = torch.func.grad(lambda w: torch.func.grad(lambda x: torch.func.grad(energy)(x).square().sum())(w).sum())
    expected = torch.func.grad(
        lambda w: torch.func.grad(lambda x: torch.func.grad(published_energy)(x).square().sum())(w).sum()
    )
    torch.testing.assert_close(third(weight), expected(weight))
    batch = torch.stack([weight, 2 * weight])
    stacked = torch.func.vmap(torch.func.grad(energy))(batch)
    torch.testing.assert_close(stacked, torch.stack([torch.func.grad(energy)(w) for w in batch]))


@pytest.mark.skipif("_C" in backends.load_errors, reason="no compiled CPU kernels")
def test_a_pair_does_not_depend_on_its_place():
    """The same two rows give the same bits among few classes and among many."""
    weight, cov, _, _ = inputs(300, 100, 1, dtype=torch.float32)
    few = ops.pair_terms(weight[:3], cov[:3], torch.arange(3), torch.tensor(3), want_square=True, backend="native")
    many = ops.pair_terms(weight, cov, torch.arange(300), torch.tensor(300), want_square=True, backend="native")
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a, b[:3, :3])
