"""``pair_terms``: every back-end against the float64 oracle, and where it hurts."""

import pytest
import torch

import classfair
from classfair import backends, distance_margin, ops, pair_variance, reference
from tests.support.conformance import Corrupt, assert_as_accurate
from tests.support.pairs import runnable

PAIRS = runnable("pair_terms")
IDS = ["-".join(p) for p in PAIRS]
KERNELS = [p for p in PAIRS if p[0] != "reference"]
CPU = [b for b, d in PAIRS if d == "cpu" and b != "triton"]
each_backend = pytest.mark.parametrize(("backend", "device"), PAIRS, ids=IDS)
each_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=["-".join(p) for p in KERNELS])
each_normalize = pytest.mark.parametrize("normalize", [False, True], ids=["variance", "ratio"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def inputs(classes, features, labels, device="cpu", dtype=torch.float64, spare=2):
    """weight, cov, label and num_slots, with some slots unused."""
    weight, cov = draw(classes, features), draw(classes, features, seed=1).square() + 0.1
    label = torch.randperm(classes, generator=generator(2))[:labels].sort()[0]
    label = torch.cat([label, label.new_zeros(spare)])
    return weight.to(device, dtype), cov.to(device, dtype), label.to(device), torch.tensor(labels, device=device)


def run(arguments, normalize, backend, *, with_cov=True, want_square=True):
    """Outputs and gradients of weight and cov from both outputs together."""
    weight, cov, label, count = arguments
    leaves = [weight.detach().requires_grad_()] + ([cov.detach().requires_grad_()] if with_cov else [])
    given = leaves[1] if with_cov else None
    out = ops.pair_terms(leaves[0], given, label, count, normalize=normalize, want_square=want_square, backend=backend)
    values = [t for t in out if t is not None]
    upstream = [draw(*v.shape, seed=5 + i).to(v.device, v.dtype) for i, v in enumerate(values)]
    return values, torch.autograd.grad(values, leaves, upstream)


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


@each_dtype
@each_backend
@each_normalize
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_and_gradients(shape, normalize, backend, device, dtype):
    if backend == "triton" and device == "cpu" and shape[0] * shape[1] > 10_000:
        pytest.skip("minutes in the interpreter")
    arguments = inputs(*shape, device, dtype)
    got = run(arguments, normalize, backend)
    given = [a.cpu().double() if a.is_floating_point() else a.cpu() for a in arguments]
    truth = run(given, normalize, "reference")
    same = run([a.cpu() for a in arguments], normalize, "reference")
    names = (("variance", "square"), ("gradient of weight", "gradient of cov"))
    for group, *results in zip(names, got, truth, same, strict=True):
        for name, *values in zip(group, *results, strict=True):
            # A gradient adds up pairs; a value adds up features, a vector of them at a time.
            terms = shape[0] * shape[1] if name.startswith("gradient") else 1 + shape[1] // 64
            assert_as_accurate(name, *values, acc=dtype, terms=terms)


@each_backend
@pytest.mark.parametrize("wanted", ["square", "variance", "variance-only-weight"])
def test_one_output_at_a_time(wanted, backend, device):
    arguments = inputs(19, 21, 9, device)
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
        (alone,) = torch.autograd.grad(out, leaf, draw(*out.shape, seed=5).to(device))
        torch.testing.assert_close(alone, got[1][0], rtol=1e-12, atol=1e-12)


@each_backend
@each_normalize
def test_exact_zeros(normalize, backend, device):
    """At c = y, in unused slots, and at no label at all."""
    weight, cov, label, _ = inputs(9, 5, 4, device, torch.float32)
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
    weight, cov, label, count = inputs(30, 65, 30, device, dtype, spare=0)
    cov[:3] = 0.3  # any other value is a rounding error
    ratio = ops.pair_terms(weight, cov, label, count, normalize=True, backend=backend).variance
    other = ~torch.eye(30, dtype=torch.bool, device=device)
    low, high = cov.amin(1, keepdim=True).expand(30, 30), cov.amax(1, keepdim=True).expand(30, 30)
    assert bool((ratio >= low)[other].all())
    assert bool((ratio <= high)[other].all())


def _function(arguments, normalize, backend):
    _, _, label, count = arguments

    def function(weight, cov):
        return tuple(ops.pair_terms(weight, cov, label, count, normalize=normalize, want_square=True, backend=backend))

    return function


@each_backend
@each_normalize
def test_gradients_of_every_order_and_forward_mode(normalize, backend, device):
    arguments = inputs(5, 3, 3, device, spare=1)
    leaves = tuple(a.requires_grad_() for a in arguments[:2])
    function = _function(arguments, normalize, backend)
    batched = {} if backend == "triton" else {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, **batched)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=backend == "triton")


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


@each_kernel
@each_normalize
def test_opcheck(normalize, backend, device):
    operators = backends.namespace(backend)
    weight, cov, label, count = inputs(9, 5, 4, device, torch.float32)
    out = operators.pair_terms_fwd(weight, cov, label, count, normalize, normalize)
    torch.library.opcheck(operators.pair_terms_fwd.default, (weight, cov, label, count, normalize, normalize))
    torch.library.opcheck(operators.pair_terms_fwd.default, (weight, None, label, count, False, True))
    g = torch.rand_like(out[0])
    for upstream, want_cov in (((g, None), False), ((g, g), True)):
        arguments = (*upstream, weight, cov, label, count, *out, normalize, want_cov)
        torch.library.opcheck(operators.pair_terms_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", CPU)
def test_compile_without_graph_breaks(backend, dynamic):
    def step(weight, cov, mean, target, logits):
        index = ops.label_index(target, weight.shape[0])
        pair = 0.5 * pair_variance(weight, cov, index, normalize=True, backend=backend) + distance_margin(
            mean, index, mean_distance=mean.new_tensor(1.0), backend=backend
        )
        return classfair.cross_entropy(logits, target, pair=pair)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (8, 5):
        weight, cov, mean = (
            draw(6, 4).requires_grad_(),
            draw(6, 4, seed=1).square().requires_grad_(),
            draw(6, 4, seed=2),
        )
        target = torch.randint(0, 6, (rows,), generator=generator(rows))
        logits = draw(rows, 6, seed=4)
        values = [f(weight, cov, mean, target, logits) for f in (compiled, step)]
        gradients = [torch.autograd.grad(v, (weight, cov)) for v in values]
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(gradients[0], gradients[1])


@each_kernel
def test_repeats_bitwise_and_writes_no_input(backend, device):
    arguments = inputs(33, 40, 20, device, torch.float32)
    before = [a.clone() for a in arguments]
    first = run(arguments, True, backend)
    for _ in range(5):
        again = run(arguments, True, backend)
        assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


@pytest.mark.skipif("native" not in CPU, reason="no compiled CPU kernels")
@each_normalize
def test_any_number_of_threads_gives_the_same_bits(normalize):
    arguments = inputs(530, 130, 140, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            values, gradients = run(arguments, normalize, "native")
            results.append([*values, *gradients])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif("native" not in CPU, reason="no compiled CPU kernels")
def test_a_pair_does_not_depend_on_its_place():
    """The same two rows give the same bits among few classes and among many."""
    weight, cov, _, _ = inputs(300, 100, 1, dtype=torch.float32)
    few = ops.pair_terms(weight[:3], cov[:3], torch.arange(3), torch.tensor(3), want_square=True, backend="native")
    many = ops.pair_terms(weight, cov, torch.arange(300), torch.tensor(300), want_square=True, backend="native")
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a, b[:3, :3])


@pytest.mark.skipif("native" not in CPU, reason="no compiled CPU kernels")
@pytest.mark.parametrize(("operator", "output"), [(f"pair_terms_{way}", i) for way in ("fwd", "bwd") for i in (0, 1)])
def test_a_corrupted_output_is_caught(operator, output, monkeypatch):
    """By the comparison above."""
    real = backends.namespace
    monkeypatch.setattr(backends, "namespace", lambda name: Corrupt(real(name), operator, output, lambda v: v + 1e-3))
    with pytest.raises(AssertionError):
        test_values_and_gradients((9, 8, 9), False, "native", "cpu", torch.float32)
