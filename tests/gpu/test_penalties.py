"""What only a GPU can show of the group penalties: synchronisation, graphs, streams, thousands of classes."""

import pytest
import torch

import classfair
from tests.support.conformance import Case, assert_same_bits, cast, check_case
from tests.support.gpu import backend_fixture, captured, no_sync
from tests.support.penalty_cases import cells, dependence_cases, groups, iou_cases, overlap
from tests.support.primitives import DEPENDENCE, IOU

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
TABLES = dependence_cases(
    Case("groups-8x21841", lambda: groups(8, 21841)),
    Case("cells-2x2000", lambda: cells(2, 2000)),
    Case("cells-16x40", lambda: cells(16, 40)),
)
OVERLAPS = iou_cases(Case("8x21841", lambda: overlap(8, 21841)), Case("300x2", lambda: overlap(300, 2)))

# Of the loss that makes the statistics; a penalty itself is torch operators here.
backend = backend_fixture("softmax_loss")


@each_dtype
@pytest.mark.parametrize(
    ("primitive", "case"),
    [*((DEPENDENCE, c) for c in TABLES), *((IOU, c) for c in OVERLAPS)],
    ids=lambda x: getattr(x, "id", ""),
)
def test_sizes(primitive, case, dtype):
    check_case(primitive, case, "reference", "cuda", dtype)


def _samples(seed):
    g = torch.Generator().manual_seed(seed)
    target, group = torch.randint(30, (200,), generator=g), torch.randint(-1, 3, (200,), generator=g)
    return [t.cuda() for t in (torch.randn(200, 30, generator=g), target, group)]


def _step(logits, target, group, backend):
    """Every penalty and its gradient in the logits."""
    leaf = logits.detach().requires_grad_()
    _, stats = classfair.cross_entropy_with_stats(leaf, target, group=group, num_groups=3, joint=True, backend=backend)
    values = [
        classfair.demographic_parity_loss(stats, kind="mi"),
        classfair.demographic_parity_loss(stats),
        classfair.equalized_odds_loss(stats, weighted=True),
        classfair.equalized_odds_loss(stats, kind="mi"),
        classfair.iou_loss(stats),
        classfair.iou_loss(stats, paired=True),
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


def test_runs_on_the_current_stream():
    inputs = cast(dependence_cases(Case("cells-2x40", lambda: cells(2, 40)))[0].build(), torch.float32, "cuda")
    expected = DEPENDENCE.run(inputs, "reference")
    late = torch.zeros_like(inputs["rows"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on any other stream would see the zeros
        late.copy_(inputs["rows"])
        got = DEPENDENCE.run({**inputs, "rows": late}, "reference")
    stream.synchronize()
    assert_same_bits(got, expected)


def test_a_hundred_repeats_are_the_same_bits(backend):
    batch = _samples(0)
    first = _step(*batch, backend)
    for _ in range(100):
        _assert_same(_step(*batch, backend), first)
