"""What only a GPU can show of the group penalties: synchronisation, graphs, streams, thousands of classes."""

import pytest
import torch

import classfair
from classfair.ops.penalties import dependence, iou_penalty
from tests.primitives.test_penalties import cast, check, run
from tests.support.gpu import backend_fixture, captured, no_sync
from tests.support.penalty_cases import cells, groups, overlap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


backend = backend_fixture("softmax_loss")


@each_dtype
@pytest.mark.parametrize("build", [lambda: groups(8, 21841), lambda: cells(2, 2000), lambda: cells(16, 40)])
@pytest.mark.parametrize("kind", ["l2", "mi"])
def test_dependence_sizes(build, kind, backend, dtype):
    for weighted in (False, True):
        check(dependence, build(), backend, "cuda", dtype, mutual_information=kind == "mi", weighted=weighted)


@each_dtype
@pytest.mark.parametrize("shape", [(8, 21841), (300, 2)], ids=str)
@pytest.mark.parametrize("paired", [False, True])
def test_iou_sizes(shape, paired, backend, dtype):
    for skip in (False, True):
        check(iou_penalty, overlap(*shape), backend, "cuda", dtype, paired=paired, skip=skip)


def _samples(seed):
    g = torch.Generator().manual_seed(seed)
    target, group = torch.randint(30, (200,), generator=g), torch.randint(-1, 3, (200,), generator=g)
    return [t.cuda() for t in (torch.randn(200, 30, generator=g), target, group)]


def _step(logits, target, group, backend):
    """Every penalty and its gradient in the logits."""
    leaf = logits.detach().requires_grad_()
    _, stats = classfair.cross_entropy_with_stats(leaf, target, group=group, num_groups=3, joint=True, backend=backend)
    values = [
        classfair.demographic_parity_loss(stats, kind="mi", backend=backend),
        classfair.demographic_parity_loss(stats, backend=backend),
        classfair.equalized_odds_loss(stats, weighted=True, backend=backend),
        classfair.equalized_odds_loss(stats, kind="mi", backend=backend),
        classfair.iou_loss(stats, backend=backend),
        classfair.iou_loss(stats, paired=True, backend=backend),
    ]
    total = torch.stack(values)
    return total.detach(), *torch.autograd.grad(total.sum(), leaf)


def _assert_same(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_never_waits_for_the_device(backend):
    _step(*_samples(0), backend)  # compiles and loads
    again = _samples(1)
    with no_sync():
        _step(*again, backend)


def test_graph_replays_with_new_data(backend):
    batches = [_samples(seed) for seed in range(3)]
    static = [t.clone() for t in batches[0]]
    graph, result = captured(lambda: _step(*static, backend))
    for batch in batches[1:]:
        for to, value in zip(static, batch, strict=True):
            to.copy_(value)
        graph.replay()
        _assert_same(result, _step(*batch, backend))


def test_runs_on_the_current_stream(backend):
    inputs = cast(cells(2, 40), torch.float32, "cuda")
    expected = run(dependence, inputs, backend)
    late = torch.zeros_like(inputs[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on any other stream would see the zeros
        late.copy_(inputs[0])
        got = run(dependence, [late, *inputs[1:]], backend)
    stream.synchronize()
    _assert_same(got, expected)


def test_a_hundred_repeats_are_the_same_bits(backend):
    batch = _samples(0)
    first = _step(*batch, backend)
    for _ in range(100):
        _assert_same(_step(*batch, backend), first)
