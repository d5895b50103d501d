"""``classfair.cross_entropy`` with all extras off is ``torch.nn.functional.cross_entropy``."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from classfair import MixedTarget, PairTerms, cross_entropy, cross_entropy_with_stats
from classfair.ops import label_index
from tests.support.pairs import runnable

BACKENDS = [b for b, d in runnable("softmax_loss") if d == "cpu"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
REDUCTIONS = ("mean", "sum", "none")


def assert_same(logits, target, backend, **keywords):
    """Value and gradient equal torch's, NaN included."""
    ours = logits.detach().clone().requires_grad_()
    theirs = logits.detach().clone().requires_grad_()
    got = cross_entropy(ours, target, backend=backend, **keywords)
    expected = F.cross_entropy(theirs, target, **keywords)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if logits.dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)
    g = torch.rand(expected.shape, generator=torch.Generator().manual_seed(0), dtype=expected.dtype)
    got.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, **tolerance)


def opinfo_samples(dtype):
    """PyTorch's own sample inputs for cross_entropy."""
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = (o for o in op_db if o.name == "nn.functional.cross_entropy")
    return list(op.sample_inputs("cpu", dtype, requires_grad=True))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opinfo_samples(backend, dtype):
    samples = opinfo_samples(dtype)
    assert len(samples) >= 20
    for sample in samples:
        assert_same(sample.input, *sample.args, backend=backend, **sample.kwargs)


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("weighted", "smoothing", "ignore"), list(itertools.product([False, True], [0.0, 0.3, 1.0], [-100, 2, 255]))
)
def test_every_shared_keyword(weighted, smoothing, ignore, reduction, backend):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(13, 5, generator=g, dtype=torch.float64)
    target = torch.randint(0, 5, (13,), generator=g)
    target[::4] = ignore
    weight = torch.rand(5, generator=g, dtype=torch.float64) if weighted else None
    assert_same(
        logits,
        target,
        backend,
        weight=weight,
        label_smoothing=smoothing,
        ignore_index=ignore,
        reduction=reduction,
    )


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3), (2, 5, 3, 2), (2, 5, 0), (0, 5), (0, 5, 3)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_every_shape(shape, probabilities, reduction, backend):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(shape, generator=g, dtype=torch.float64)
    rows = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    target = torch.randint(0, 5, rows, generator=g)
    if probabilities:
        target = torch.rand(shape, generator=g, dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        assert_same(logits, target, backend, label_smoothing=smoothing, reduction=reduction)


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["all ignored", "zero total weight", "half ignored, zero weight"])
def test_corner_cases(kind, smoothing, reduction, backend):
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    weight, target = None, torch.full((3,), -100)
    if kind != "all ignored":
        weight, target = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 1, 0])
    if kind.startswith("half"):
        target[1] = -100
    assert_same(logits, target, backend, weight=weight, label_smoothing=smoothing, reduction=reduction)


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probability_targets_receive_their_gradient(reduction, backend):
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 5, 2, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 5, 2, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, generator=g, dtype=torch.float64)

    def gradients(function, **extra):
        loss = function(logits, target, weight=weight, label_smoothing=0.1, reduction=reduction, **extra)
        first = torch.autograd.grad(loss.square().sum(), (logits, target), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (logits, target))
        return (*first, *second)

    for got, expected in zip(gradients(cross_entropy, backend=backend), gradients(F.cross_entropy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@each_backend
def test_second_derivative_equals_torch(backend):
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 4, (6,), generator=g)

    def second(function, **extra):
        (first,) = torch.autograd.grad(function(logits, target, **extra), logits, create_graph=True)
        return torch.autograd.grad(first.pow(3).sum(), logits)[0]

    torch.testing.assert_close(second(cross_entropy, backend=backend), second(F.cross_entropy), rtol=1e-12, atol=1e-14)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_a_float32_loss(dtype, backend):
    g = torch.Generator().manual_seed(6)
    logits = (3 * torch.randn(64, 100, generator=g)).to(dtype).requires_grad_()
    target = torch.randint(0, 100, (64,), generator=g)
    loss = cross_entropy(logits, target, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target), rtol=1e-6, atol=1e-6)
    loss.backward()
    assert logits.grad.dtype == dtype


@each_backend
def test_a_row_of_minus_infinity_has_no_nan(backend):
    logits = torch.zeros(2, 3)
    logits[0] = -torch.inf
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([1, 1]), reduction="none", backend=backend)
    assert loss[0] == torch.inf
    assert loss[1].item() == pytest.approx(1.0986123)
    loss.sum().backward()
    assert torch.equal(logits.grad[0], torch.zeros(3))
    assert bool(logits.grad[1].isfinite().all())


@each_backend
def test_mixed_target_is_the_mixture_of_both_losses(backend):
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(8, 5, generator=g, dtype=torch.float64)
    y_a, y_b = torch.randint(0, 5, (2, 8), generator=g)
    lam = torch.rand(8, generator=g, dtype=torch.float64)
    offset, margin = torch.randn(5, generator=g).double(), torch.rand(5, generator=g).double()
    table = torch.rand(5, 5, generator=g).double()
    for keywords in (
        {},
        {"offset": offset},
        {"label_smoothing": 0.1, "gamma": 2.0},
        {"margin": margin},
        {"pair": table},
    ):
        mixed = cross_entropy(logits, MixedTarget(y_a, y_b, lam), reduction="none", backend=backend, **keywords)
        a = cross_entropy(logits, y_a, reduction="none", backend=backend, **keywords)
        b = cross_entropy(logits, y_b, reduction="none", backend=backend, **keywords)
        torch.testing.assert_close(mixed, lam * a + (1 - lam) * b, rtol=1e-12, atol=1e-12)


@each_backend
def test_mixed_target_equals_dense_mixing_of_torch(backend):
    g = torch.Generator().manual_seed(8)
    logits = torch.randn(8, 5, 3, generator=g, dtype=torch.float64)
    y_a, y_b = torch.randint(0, 5, (2, 8, 3), generator=g)
    dense = 0.3 * F.one_hot(y_a, 5) + 0.7 * F.one_hot(y_b, 5)
    expected = F.cross_entropy(logits, dense.movedim(-1, 1), label_smoothing=0.1)
    got = cross_entropy(logits, MixedTarget(y_a, y_b, 0.3), label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@each_backend
def test_mixed_denominator_counts_the_shares_that_are_not_ignored(backend):
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    target = MixedTarget(torch.tensor([0, -100]), torch.tensor([1, 2]), torch.tensor([0.25, 0.5]).double())
    nll = -logits.log_softmax(1)
    total = 0.25 * nll[0, 0] + 0.75 * 2 * nll[0, 1] + 0.5 * 4 * nll[1, 2]
    expected = total / (0.25 + 0.75 * 2 + 0.5 * 4)
    got = cross_entropy(logits, target, weight=weight, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_backend
def test_two_passes_give_the_statistics_of_one(backend):
    g = torch.Generator().manual_seed(10)
    logits = torch.randn(9, 5, generator=g, dtype=torch.float64)
    y_a, y_b = torch.randint(0, 5, (2, 9), generator=g)
    target = MixedTarget(y_a, y_b, torch.rand(9, generator=g, dtype=torch.float64))
    _, one = cross_entropy_with_stats(logits, target, backend=backend)
    _, two = cross_entropy_with_stats(logits, target, pair=torch.zeros(5, 5).double(), backend=backend)
    for name in ("mass", "hit"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-12, atol=1e-14)
    for name in ("count", "correct", "predicted", "prediction"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@each_backend
def test_pair_rows_equal_the_table(backend):
    g = torch.Generator().manual_seed(11)
    logits = torch.randn(20, 6, generator=g, dtype=torch.float64)
    target = torch.randint(0, 6, (20,), generator=g)
    target[3] = -100
    table = torch.rand(6, 6, generator=g, dtype=torch.float64, requires_grad=True)
    index = label_index(target, 6)
    pair = PairTerms(table[index.key_of_slot], index.slot, index.key_of_slot, index.num_slots)
    losses = [cross_entropy(logits, target, pair=p, backend=backend) for p in (table, pair)]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(loss, table, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@each_backend
def test_constant_per_row_does_not_matter(backend):
    """Menon et al.: offset tau log pi_c equals the pair table tau log(pi_c / pi_y), whose diagonal is 0."""
    g = torch.Generator().manual_seed(12)
    logits = torch.randn(20, 6, generator=g, dtype=torch.float64)
    target = torch.randint(0, 6, (20,), generator=g)
    log_prior = torch.rand(6, generator=g, dtype=torch.float64).log()
    as_offset = cross_entropy(logits, target, offset=log_prior, backend=backend)
    as_table = cross_entropy(logits, target, pair=log_prior - log_prior[:, None], backend=backend)
    torch.testing.assert_close(as_offset, as_table, rtol=1e-12, atol=0)
