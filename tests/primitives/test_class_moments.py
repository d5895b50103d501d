"""What only ``class_moments`` promises; its conformance is in test_conformance.py."""

import numpy as np
import pytest
import torch

from classfair import backends
from classfair.ops import class_moments, class_moments_merge, label_index
from tests.support.moment_cases import CASES, Case, zero_state
from tests.support.pairs import runnable

PAIRS = runnable("class_moments")
KERNELS = [p for p in PAIRS if p[0] != "reference"]

each_backend = pytest.mark.parametrize(("backend", "device"), PAIRS, ids=["-".join(p) for p in PAIRS])
each_kernel = pytest.mark.parametrize(("backend", "device"), KERNELS, ids=["-".join(p) for p in KERNELS])
native_only = pytest.mark.skipif("_C" in backends.load_errors, reason="no compiled CPU kernels")
MIDDLE = next(c for c in CASES if c.id == "nonfinite")


@each_backend
def test_against_numpy(backend, device):
    case = Case("numpy", (60, 11), 5)
    features, target = case.batch()
    index = label_index(target.to(device), 5, ignore_index=-1, backend="reference")
    got = class_moments(features.to(device), index, backend=backend)
    for s in range(int(index.num_slots)):
        rows = features[target == int(index.key_of_slot[s])].numpy()
        assert int(got.count[s]) == len(rows)
        np.testing.assert_allclose(got.mean[s].cpu(), rows.mean(0), rtol=1e-13)
        np.testing.assert_allclose(got.variance[s].cpu(), np.var(rows, axis=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(got.variance[s].cpu(), np.cov(rows.T, bias=True).diagonal(), rtol=1e-12, atol=1e-14)


@each_backend
def test_without_variance(backend, device):
    features, target = (t.to(device) for t in MIDDLE.batch())
    index = label_index(target, 4, ignore_index=-1, backend="reference")
    both, alone = (class_moments(features, index, variance=v, backend=backend) for v in (True, False))
    assert alone.variance is None
    assert torch.equal(alone.mean, both.mean)
    state = zero_state((4, 37), torch.float64, device)
    class_moments_merge(alone, index.key_of_slot, *state[:2], backend=backend)
    present = both.count > 0
    assert torch.equal(state[1][index.key_of_slot[present]], both.mean[present])


@each_backend
def test_absent_classes_are_not_touched(backend, device):
    case = Case("absent", (6, 9), 50)
    features, target = (t.to(device) for t in case.batch())
    state = [t + 7 if i else t + 3 for i, t in enumerate(zero_state((50, 9), torch.float64, device))]
    before = [t.clone() for t in state]
    index = label_index(target, 50, ignore_index=-1, backend="reference")
    class_moments_merge(class_moments(features, index, backend=backend), index.key_of_slot, *state, backend=backend)
    absent = torch.ones(50, dtype=torch.bool, device=device)
    absent[target[target >= 0]] = False
    for old, new in zip(before, state, strict=True):
        assert torch.equal(old[absent], new[absent])
        assert not torch.equal(old[~absent], new[~absent])


@each_kernel
def test_expanded_rows(backend, device):
    row = torch.arange(5.0, device=device)
    index = label_index(torch.zeros(70, dtype=torch.int64, device=device), 2, backend="reference")
    got = class_moments(row.expand(70, 5), index, backend=backend)
    assert got.count.tolist() == [70, 0]
    assert torch.equal(got.mean[0], row)
    assert not got.variance.any()


LIMITS = {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float64: 1e150}


@each_backend
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_rows_whose_squares_may_overflow_stay_out(rows, dtype, backend, device):
    """Rows just above the limit, far above it, and with all of a vector, a strip and a tail above it."""
    limit, g = LIMITS[dtype], torch.Generator().manual_seed(rows)
    good = torch.randn(rows, 40, generator=g, dtype=torch.float64).to(device, dtype)
    huge = good[:1].repeat(5, 1)
    huge[0, 7], huge[1, 39], huge[2, 0], huge[3] = 1.01 * limit, -1.01 * limit, 3e3 * limit * limit**0.3, -2 * limit
    huge[4, 38] = 1.01 * limit
    index = label_index(torch.zeros(rows + 5, dtype=torch.int64, device=device), 1, backend="reference")
    got = class_moments(torch.cat([huge[:2], good, huge[2:]]), index, backend=backend)
    assert (got.count.item(), got.nonfinite.item()) == (rows, 5)
    index = label_index(torch.zeros(rows, dtype=torch.int64, device=device), 1, backend="reference")
    alone = class_moments(good, index, backend=backend)
    torch.testing.assert_close(got.mean, alone.mean)
    torch.testing.assert_close(got.variance, alone.variance)
    only = class_moments(huge, label_index(torch.zeros(5, dtype=torch.int64, device=device), 1), backend=backend)
    assert (only.count.item(), only.nonfinite.item(), int(only.mean.count_nonzero())) == (0, 5, 0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_features_below_the_limit_enter_and_stay_finite(dtype, backend, device):
    features = torch.full((4000, 37), 0.99 * LIMITS[dtype], dtype=dtype, device=device)
    features[::2] *= -1
    index = label_index(torch.zeros(4000, dtype=torch.int64, device=device), 1, backend="reference")
    state = zero_state((1, 37), dtype, device)
    for _ in range(2):
        batch = class_moments(features, index, backend=backend)
        assert (batch.count.item(), batch.nonfinite.item()) == (4000, 0)
        class_moments_merge(batch, index.key_of_slot, *state, backend=backend)
    # 4000 squares of the same size are added, one after the other on some back-ends.
    torch.testing.assert_close(state[2][0], features[0].square(), rtol=1e-4, atol=0)


@each_backend
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_a_first_batch_counts_whole_whatever_its_size(momentum, backend, device):
    features = torch.full((1, 9), 9e14, device=device)  # the largest there may be
    index = label_index(torch.tensor([1], device=device), 3, backend="reference")
    state = zero_state((3, 9), torch.float32, device)
    batch = class_moments(features, index, backend=backend)
    class_moments_merge(
        batch, index.key_of_slot, *(state if momentum is None else state[:4]), momentum=momentum, backend=backend
    )
    assert torch.equal(state[1][1], features[0])
    assert not state[2].any()


@each_backend
def test_million_samples_one_at_a_time(backend, device):
    _check_small_updates(backend, device, 200 if (backend, device) != ("native", "cpu") else 30_000)


@each_backend
@pytest.mark.parametrize("momentum", [None, 0.01])
def test_means_far_larger_than_deviations(momentum, backend, device):
    """At 1e6 a float32 has sixteen values per deviation, more than a step of the mean: without the error of the mean,
    variances are 2 % off after a hundred single samples, and 60 % with momentum."""
    g = torch.Generator().manual_seed(0)
    samples = (1e6 + torch.randn(100, 9, generator=g, dtype=torch.float64)).float()
    states = [zero_state((2, 9), dtype, device) for dtype in (torch.float32, torch.float64)]
    index = label_index(torch.ones(1, dtype=torch.int64, device=device), 2, backend="reference")
    for row in samples.to(device).split(1):
        for state in states:
            batch = class_moments(row.to(state[1].dtype), index, backend=backend)
            used = state if momentum is None else state[:4]
            class_moments_merge(batch, index.key_of_slot, *used, momentum=momentum, backend=backend)
    (_, mean, variance, error, _), (_, exact_mean, exact, _, _) = states
    torch.testing.assert_close(variance.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double() + error, exact_mean, rtol=0, atol=1e-6)
    if momentum is None:
        mine = torch.from_numpy(np.var(samples.double().numpy(), axis=0)).to(device)
        torch.testing.assert_close(exact[1], mine, rtol=1e-8, atol=0)


@pytest.mark.slow
@native_only
def test_a_million_small_updates():
    _check_small_updates("native", "cpu", 1_000_000)


def _check_small_updates(backend, device, updates):
    """Float32 state within 1e-4 of float64, for means of 10 and deviations of 1."""
    columns = 64
    operator = class_moments_merge if backend == "reference" else None
    merge = operator or backends.namespace(backend).class_moments_merge
    g = torch.Generator().manual_seed(0)
    one = torch.ones(1, dtype=torch.int64, device=device)
    nothing = torch.zeros(1, columns, device=device)
    state, count = zero_state((1, columns), torch.float32, device), torch.zeros((), dtype=torch.float64)
    mean = torch.zeros(columns, dtype=torch.float64)
    squares = mean.clone()
    for begin in range(0, updates, 1000):
        rows = 10 + torch.randn(min(1000, updates - begin), columns, generator=g)
        mean, squares = mean + rows.double().sum(0), squares + (rows.double() - 10).square().sum(0)
        count += rows.shape[0]
        for row in rows.to(device).split(1):
            if operator is None:
                merge(one, row, nothing, one - 1, *state, None)
            else:
                batch = class_moments(row, label_index(one - 1, 1), backend=backend)
                merge(batch, one - 1, *state, backend=backend)
    mean = mean / count
    variance = squares / count - (mean - 10).square()
    assert state[0].item() == updates
    assert ((state[1].double().cpu() - mean) / mean).abs().max().item() < 1e-4
    assert ((state[2].double().cpu() - variance) / variance).abs().max().item() < (1e-5 if updates < 1e6 else 1e-4)


@each_backend
def test_moments_do_not_need_gradients(backend, device):
    features, target = (t.to(device) for t in MIDDLE.batch())
    index = label_index(target, 4, ignore_index=-1, backend="reference")
    got = class_moments(features.requires_grad_(), index, backend=backend)
    assert not any(t.requires_grad for t in got)


@each_backend
def test_a_backward_that_saved_the_state_fails(backend, device):
    features, target = (t.to(device) for t in MIDDLE.batch())
    index = label_index(target, 4, ignore_index=-1, backend="reference")
    state = zero_state((4, 37), torch.float64, device)
    weight = torch.ones_like(state[2], requires_grad=True)
    loss = (weight * state[2]).sum()
    batch = class_moments(features, index, backend=backend)
    class_moments_merge(batch, index.key_of_slot, *state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
