"""``class_moments`` and ``ClassStatistics``: values, streaming, state, several processes, errors."""

import math

import numpy as np
import pytest
import torch

import classfair
from classfair import ClassStatistics, backends, class_moments
from classfair.statistics import COVARIANCES
from tests.support.processes import run_processes

CLASSES, DIM = 6, 7
BACKENDS = backends.available("class_moments", "cpu")


def data(rows=120, seed=0, dtype=torch.float32):
    """Correlated features; class 5 never occurs, some labels are ignored, one row is not finite."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES - 1, (rows,), generator=g)
    mix = torch.randn(DIM, DIM, generator=g, dtype=dtype)
    features = torch.randn(rows, DIM, generator=g, dtype=dtype) @ mix + target[:, None]
    target[::7] = -100
    if rows > 3:
        features[3, 2] = math.nan
    return features, target


def by_definition(features, target, covariance):
    """(count, mean, cov) in float64, by NumPy."""
    keep = features.isfinite().all(1)
    x, y = features[keep].double().numpy(), target[keep].numpy()
    count = np.array([(y == c).sum() for c in range(CLASSES)])
    mean, cov = np.zeros((CLASSES, DIM)), np.zeros((CLASSES, DIM, DIM))
    for c in range(CLASSES):
        if count[c]:
            mean[c], cov[c] = x[y == c].mean(0), np.cov(x[y == c].T, bias=True)
    return count, mean, cov if covariance == "full" else np.diagonal(cov, axis1=1, axis2=2)


def assert_moments(got, expected, rtol):
    np.testing.assert_array_equal(got.count, expected[0])
    np.testing.assert_allclose(got.mean, expected[1], rtol=rtol, atol=rtol)
    if got.cov is not None:
        np.testing.assert_allclose(got.cov, expected[2], rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_class_moments_by_definition(covariance, dtype, rtol, backend):
    features, target = data(dtype=dtype)
    got = class_moments(features.requires_grad_(), target, CLASSES, covariance=covariance, backend=backend)
    assert (got.mean.dtype, got.count.dtype, got.nonfinite.item()) == (dtype, torch.int64, 1)
    assert (got.cov is None) == (covariance == "none")
    assert not got.mean.requires_grad
    assert_moments(got, by_definition(features.detach(), target, covariance), rtol)


@pytest.mark.parametrize("rows", [0, 1, 3, 500])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_class_moments_of_other_sizes(rows, covariance):
    features, target = data(rows, dtype=torch.float64)
    got = class_moments(features, target, CLASSES, covariance=covariance)
    assert_moments(got, by_definition(features, target, covariance), 1e-11)


def test_full_covariance_of_one_class_and_of_more_classes_than_samples():
    features, _ = data(50, dtype=torch.float64)
    features[3, 2] = 0
    target = torch.full((50,), 4)
    got = class_moments(features, target, 10_000 // 5, covariance="full")
    np.testing.assert_allclose(got.cov[4], np.cov(features.T, bias=True), rtol=1e-12)
    assert int(got.cov.count_nonzero()) == DIM * DIM


SPLITS = [(0, 1), (1, 40), (40, 40), (40, 97), (97, 120)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_batches_give_the_moments_of_all(covariance, backend):
    features, target = data()
    statistics = ClassStatistics(CLASSES, DIM, covariance, backend=backend)
    for begin, end in SPLITS:
        statistics.update(features[begin:end].requires_grad_(), target[begin:end])
    assert_moments(statistics, by_definition(features.detach(), target, covariance), 1e-5)
    assert statistics.nonfinite.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_exponential_moments_are_those_of_the_mixture(covariance, backend):
    """Weight (1 - a)^k a of the batch k updates ago, 1 - a to the number of updates of the first one."""
    rate = 0.3
    features, target = data(dtype=torch.float64)
    features[3] = 0
    statistics = ClassStatistics(CLASSES, DIM, covariance, rate, backend=backend).double()
    weight = torch.zeros(120, dtype=torch.float64)
    for begin, end in SPLITS:
        statistics.update(features[begin:end], target[begin:end])
        for c in range(CLASSES):
            own = target[begin:end] == c
            if own.any():
                share = rate if weight[target == c].any() else 1.0
                weight[target == c] *= 1 - share
                weight[begin:end][own] = share / own.sum()
    for c in range(CLASSES - 1):
        x, w = features[target == c], weight[target == c]
        mean = w @ x
        cov = (x - mean).T @ (w[:, None] * (x - mean))
        torch.testing.assert_close(statistics.mean[c], mean)
        torch.testing.assert_close(statistics.cov[c], cov if covariance == "full" else cov.diagonal())
    assert statistics.count.tolist() == [int((target == c).sum()) for c in range(CLASSES)]


@pytest.mark.parametrize("momentum", [None, 0.05])
@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_covariances_where_means_are_a_million_deviations(covariance, momentum):
    """Float32 state and batches of one; the last state is loaded half-way, as by a resumed run."""
    g = torch.Generator().manual_seed(0)
    samples = (1e6 + torch.randn(500, DIM, generator=g, dtype=torch.float64)).float()
    whole, exact, resumed = (ClassStatistics(1, DIM, covariance, momentum) for _ in range(3))
    exact.double()
    for i, row in enumerate(samples.split(1)):
        if i == 250:
            resumed.load_state_dict(whole.state_dict())
        for statistics in (whole, exact, resumed):
            statistics.update(row.to(statistics.mean.dtype), torch.zeros(1, dtype=torch.int64))
    # Products of different features are not compensated: each of their sums is off by its own rounding.
    torch.testing.assert_close(whole.cov.double(), exact.cov, rtol=1e-6, atol=0 if covariance == "diag" else 1e-5)
    diagonals = (c.cov[0] if covariance == "diag" else c.cov[0].diagonal() for c in (whole, exact))
    torch.testing.assert_close(*(d.double() for d in diagonals), rtol=1e-6, atol=0)
    assert torch.equal(resumed.mean, whole.mean)
    if momentum is None:
        assert_moments(exact, _by_numpy(samples, covariance), 1e-7)


def _by_numpy(samples, covariance):
    x = samples.double().numpy()
    cov = np.cov(x.T, bias=True)[None]
    return np.array([len(x)]), x.mean(0)[None], cov if covariance == "full" else cov.diagonal(axis1=1, axis2=2)


def test_a_state_without_rounding_errors_loads():
    """As older versions saved it."""
    features, target = data()
    first, second = ClassStatistics(CLASSES, DIM), ClassStatistics(CLASSES, DIM)
    for statistics in (first, second):
        statistics.update(features + 1e5, target)
    state = {name: value for name, value in first.state_dict().items() if not name.endswith("_error")}
    second.load_state_dict(state)
    assert torch.equal(second.mean, first.mean)
    assert not second.mean_error.any()
    assert not second.cov_error.any()


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_state_round_trip_and_reset(covariance):
    features, target = data()
    first = ClassStatistics(CLASSES, DIM, covariance)
    first.update(features[:60], target[:60])
    second = ClassStatistics(CLASSES, DIM, covariance)
    assert not _equal(first, second)
    second.load_state_dict(first.state_dict())
    for statistics in (first, second):
        statistics.update(features[60:], target[60:])
    assert _equal(first, second)
    first.reset()
    assert _equal(first, ClassStatistics(CLASSES, DIM, covariance))
    assert list(first.parameters()) == []


def test_state_of_a_newer_version_is_refused():
    statistics = ClassStatistics(CLASSES, DIM)
    state = statistics.state_dict()
    assert state._metadata[""]["version"] == 1
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="expected state of version 1 or older, got version 2"):
        statistics.load_state_dict(state)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_state_keeps_its_precision(change):
    features, target = data()
    statistics = ClassStatistics(CLASSES, DIM)
    statistics.update(features, target)
    before = {k: v.clone() for k, v in statistics.state_dict().items()}
    change(torch.nn.Sequential(statistics))
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in statistics.state_dict().items())
    statistics.update(features.half(), target)


def test_absent_classes_and_useless_batches_leave_the_state_alone():
    features, target = data()
    statistics = ClassStatistics(CLASSES, DIM)
    statistics.update(features, target)
    before = {k: v.clone() for k, v in statistics.state_dict().items()}
    statistics.update(features[:0], target[:0])
    statistics.update(features, torch.full_like(target, -100))
    assert all(torch.equal(v, before[k]) for k, v in statistics.state_dict().items())
    statistics.update(torch.full((2, DIM), math.inf), torch.tensor([1, 5]))
    assert statistics.nonfinite.item() == before["nonfinite"].item() + 2
    assert torch.equal(statistics.mean, before["mean"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_huge_feature_leaves_its_row_out(dtype, covariance, backend):
    """Finite, but its square is not; nor may a float64 feature be too large for a float32 state."""
    features, target = data(dtype=dtype)
    clean, given = (ClassStatistics(CLASSES, DIM, covariance, backend=backend) for _ in range(2))
    rows = (torch.arange(120) != 8) & (target >= 0)
    features[8, 4], target[8] = 3e19, 1
    for begin, end in SPLITS:
        given.update(features[begin:end], target[begin:end])
        clean.update(features[begin:end][rows[begin:end]], target[begin:end][rows[begin:end]])
    assert given.nonfinite.item() == clean.nonfinite.item() + 1 == 2
    for name in ("count", "mean", "cov"):
        if (value := getattr(given, name)) is not None:
            assert bool(value.isfinite().all())
            torch.testing.assert_close(value, getattr(clean, name))
    got = class_moments(features, target, CLASSES, covariance=covariance, backend=backend)
    assert got.nonfinite.item() == (2 if dtype == torch.float32 else 1)


@pytest.mark.parametrize(
    ("covariance", "dynamic"),
    [("diag", True), *(pytest.param(c, False, marks=pytest.mark.slow) for c in ("diag", "full"))],
)
def test_compile_fullgraph(covariance, dynamic):
    eager, compiled = (ClassStatistics(CLASSES, DIM, covariance) for _ in range(2))
    torch._dynamo.reset()
    update = torch.compile(compiled.update, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (30, 41):
        features, target = data(rows)
        eager.update(features, target)
        update(features, target)
    for a, b in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    whole = torch.compile(class_moments, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, expected = (f(features, target, CLASSES, covariance=covariance) for f in (whole, class_moments))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# Unequal and empty batches, classes that one process alone has.
STEPS = {
    1: [[(0, 50)], [(50, 120)]],
    2: [[(0, 17), (17, 50)], [(50, 50), (50, 119)], [(119, 120), (0, 0)]],
    3: [[(0, 20), (20, 20), (20, 50)], [(50, 53), (53, 100), (100, 120)]],
}
# covariance, momentum, max_batch
OPTIONS = [("diag", None, None), ("diag", 0.2, 90), ("full", 0.2, None), ("none", None, 120)]
FAR = 1e6  # a mean of so many deviations


def _rank(rank, world):
    results = {}
    features, target = data()
    for covariance, momentum, max_batch in OPTIONS:
        together, alone = (ClassStatistics(CLASSES, DIM, covariance, momentum) for _ in range(2))
        for step in STEPS[world]:
            part = slice(*step[rank])
            together.update(features[part], target[part], max_batch=max_batch)
            alone.update(features[part], target[part], sync=False)
        results[covariance, momentum] = (together.state_dict(), alone.count)
    far = ClassStatistics(CLASSES, DIM)
    for i in range(rank, 120, world):  # one sample of each process at a time
        far.update((FAR + features[i : i + 1].double()).float(), target[i : i + 1], max_batch=1)
    results["far"] = far.cov
    return results


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_processes_equal_one(world, tmp_path):
    results = run_processes(_rank, world, tmp_path, world)
    features, target = data()
    for covariance, momentum, _ in OPTIONS:
        expected = ClassStatistics(CLASSES, DIM, covariance, momentum)
        for step in STEPS[world]:
            rows = torch.cat([torch.arange(*part) for part in step])
            expected.update(features[rows], target[rows])
        ranks = [result[covariance, momentum] for result in results]
        for state, _ in ranks:
            for name, value in expected.state_dict().items():
                assert torch.equal(state[name], ranks[0][0][name]), f"{name} differs between processes"
                torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5, msg=f"{covariance}: {name}")
        assert torch.equal(sum(count for _, count in ranks), expected.count)
    _, _, cov = by_definition((FAR + features.double()).float(), target, "diag")
    for result in results:
        assert torch.equal(result["far"], results[0]["far"])
        np.testing.assert_allclose(result["far"], cov, rtol=1e-6)


def test_full_covariance_of_many_features_is_refused_with_its_memory():
    message = r"expected covariance 'diag' or 'none' above 640 features, got 'full', which would take 16.8 GB"
    with pytest.raises(ValueError, match=message):
        ClassStatistics(1000, 2048, "full")
    with pytest.raises(ValueError, match=message):
        class_moments(torch.zeros(2, 2048), torch.zeros(2, dtype=torch.int64), 1000, covariance="full")


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "features as a floating tensor, got list", lambda f, t: class_moments([1.0], t, 6)),
        (TypeError, "features as a floating tensor, got torch.int64", lambda f, t: class_moments(f.long(), t, 6)),
        (
            ValueError,
            r"features of shape \(N, D\) with D >= 1, got \(840,\)",
            lambda f, t: class_moments(f.flatten(), t, 6),
        ),
        (ValueError, r"with D >= 1, got \(120, 0\)", lambda f, t: class_moments(f[:, :0], t, 6)),
        (ValueError, r"target of shape \(120,\), got \(5,\)", lambda f, t: class_moments(f, t[:5], 6)),
        (
            TypeError,
            "target of dtype torch.int64 or torch.uint8, got torch.int32",
            lambda f, t: class_moments(f, t.int(), 6),
        ),
        (ValueError, "num_classes >= 1, got 0", lambda f, t: class_moments(f, t, 0)),
        (ValueError, "covariance 'diag', 'full' or 'none'", lambda f, t: class_moments(f, t, 6, covariance="x")),
        (ValueError, "expected backend 'native'", lambda f, t: class_moments(f, t, 6, backend="x")),
        (IndexError, r"expected label in \[0, 2\)", lambda f, t: class_moments(f, t, 2)),
        (ValueError, r"momentum None or in \(0, 1\], got 0", lambda f, t: ClassStatistics(6, 7, momentum=0)),
        (TypeError, "momentum as a number, got str", lambda f, t: ClassStatistics(6, 7, momentum="0.1")),
        (ValueError, "feature_dim >= 1, got 0", lambda f, t: ClassStatistics(6, 0)),
        (TypeError, "feature_dim as an int, got float", lambda f, t: ClassStatistics(6, 7.0)),
        (ValueError, r"of shape \(N, 8\), got \(120, 7\)", lambda f, t: ClassStatistics(6, 8).update(f, t)),
        (ValueError, "the statistics, meta, got cpu", lambda f, t: ClassStatistics(6, 7).to("meta").update(f, t)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(*data())


def test_names_are_public():
    assert {"ClassMoments", "ClassStatistics", "class_moments"} <= set(classfair.__all__)


@pytest.mark.parametrize(
    "updates",
    [
        1000,
        pytest.param(10_000, marks=pytest.mark.slow),
        pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.exhaustive]),  # nine minutes
    ],
)
def test_single_samples_do_not_wear_out_a_full_covariance(updates):
    """Float32 state against float64, for means of 10 and deviations of 1; without `cov_error` it is 1e-5 and 2e-4."""
    g = torch.Generator().manual_seed(0)
    statistics, target = ClassStatistics(1, 16, "full"), torch.zeros(1, dtype=torch.int64)
    count, total, products = 0, torch.zeros(16, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)
    while count < updates:
        rows = 10 + torch.randn(1000, 16, generator=g)
        count, total = count + 1000, total + (rows.double() - 10).sum(0)
        products += (rows.double() - 10).T @ (rows.double() - 10)
        for row in rows.split(1):
            statistics.update(row, target)
    off = total / count
    expected = products / count - off[:, None] * off
    assert (statistics.mean[0].double() - 10 - off).abs().max().item() < 1e-3  # 1e-4 of the mean
    assert (statistics.cov[0].double() - expected).abs().max().item() < 4e-6
