"""What only a GPU can show of ``class_moments``: synchronisation, graphs, streams, batches of any size."""

import pytest
import torch

from classfair import ClassStatistics, class_moments
from tests.support.conformance import assert_same_bits, check_case
from tests.support.gpu import backend_fixture, captured, no_sync
from tests.support.moment_cases import Case
from tests.support.primitives import CLASS_MOMENTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Chunks of 32, 64 and 256 rows, classes that span many of them, one row a class, rows wider than a block of threads.
SIZES = [
    Case("many-rows", (5000, 33), 7),
    Case("one-class", (60_000, 5), 1),
    Case("imagenet", (256, 2048), 1000),
    Case("inaturalist", (512, 2048), 8142),
]
COVARIANCES = ("none", "diag", "full")


backend = backend_fixture("class_moments")


def _batches(count, rows=200, columns=48, classes=30):
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        features = torch.randn(rows, columns, generator=g)
        features[5, 3] = torch.nan
        yield features.cuda(), torch.randint(-1, classes, (rows,), generator=g).cuda()


def _statistics(covariance, backend):
    return ClassStatistics(30, 48, covariance, ignore_index=-1, backend=backend).cuda()


def _assert_same(a, b):
    assert_same_bits(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.id)
def test_sizes(case, backend, dtype):
    check_case(CLASS_MOMENTS, case, backend, "cuda", dtype)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_never_waits_for_the_device(covariance, backend):
    statistics, batches = _statistics(covariance, backend), list(_batches(2))
    statistics.update(*batches[0])  # compiles and loads
    class_moments(*batches[0], 30, covariance=covariance, ignore_index=-1, backend=backend)
    with no_sync():
        statistics.update(*batches[1])
        class_moments(*batches[1], 30, covariance=covariance, ignore_index=-1, backend=backend)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_graph_replays_with_new_data(covariance, backend):
    replayed, eager = _statistics(covariance, backend), _statistics(covariance, backend)
    batches = list(_batches(3))
    static = [t.clone() for t in batches[0]]
    graph, _ = captured(lambda: replayed.update(*static))
    replayed.reset()
    for batch in batches:
        for to, value in zip(static, batch, strict=True):
            to.copy_(value)
        graph.replay()
        eager.update(*batch)
    _assert_same(replayed, eager)


def test_runs_on_the_current_stream(backend):
    (features, target), *_ = _batches(1)
    expected, got = _statistics("diag", backend), _statistics("diag", backend)
    expected.update(features, target)
    late = torch.zeros_like(features)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on any other stream would see the zeros
        late.copy_(features)
        got.update(late, target)
    stream.synchronize()
    _assert_same(got, expected)


def test_bad_labels_are_left_out(backend):
    features = torch.ones(4, 5, device="cuda")
    target = torch.tensor([3, 2**32, -1, 30], device="cuda")
    got = class_moments(features, target, 30, backend=backend)
    assert got.count.nonzero().tolist() == [[3]]


def test_a_hundred_repeats_are_the_same_bits(backend):
    batches = list(_batches(3, rows=4000))
    first = _statistics("diag", backend)
    for batch in batches:
        first.update(*batch)
    for _ in range(100):
        again = _statistics("diag", backend)
        for batch in batches:
            again.update(*batch)
        _assert_same(again, first)
