"""What only a GPU can show: synchronisation, graphs, streams, devices, memory, and batches too large for a CPU test."""

import copy

import pytest
import torch

import classfair
from classfair import backends
from classfair.ops import label_index, softmax_loss
from tests.support.conformance import as_truth, assert_same_bits, by_id, cast, check_case, upstream
from tests.support.gpu import backend_fixture, captured, no_sync
from tests.support.primitives import SOFTMAX_LOSS
from tests.support.softmax_cases import ALL_HARD, CASES, DIFFERENTIABLE, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FEATURED = by_id(
    CASES, "plain-3x31", "all-many-rows", "all-wide", "mixed-all", "dense-all", "share-all", "strided-3d-many"
)
ALL = next(c for c in FEATURED if c.id == "all-many-rows")
MANY = Case("many-rows", (6000, 7), ALL_HARD, 2)  # more rows than are ranked in one launch
# A team of two warps, one and two batches of columns, few classes and many rows, two labels a row.
SIZES = [
    MANY,
    Case("two-warps", (9, 300), ALL_HARD, 2),
    Case("one-batch", (5, 2048), ALL_HARD, 2),
    Case("two-batches", (5, 2049), ALL_HARD, 2),
    Case("binary", (70001, 2), ("group", "weight"), 2),
    Case("many-mixed", (3000, 5), ("mixed_ignore", "weight", "smoothing", "group"), 2),
    Case("many-pixels", (2, 21, 3000), ("weight", "smoothing", "ignore"), 2),
]

each_case = pytest.mark.parametrize("case", FEATURED, ids=lambda c: c.id)


def test_both_back_ends_run_here():
    """All others skip what cannot run."""
    if backends.load_errors.get("_cuda") == "not built":
        pytest.skip("built without CUDA kernels")
    assert backends.usable("softmax_loss", torch.device("cuda"))[:2] == ("native", "triton")


backend = backend_fixture("softmax_loss")


def _device_upstream(inputs, backend):
    """Gradients of the differentiable outputs, already on the device."""
    out = softmax_loss(**inputs, backend=backend)
    wanted = SOFTMAX_LOSS.sources if inputs["stats"] == 2 else ("loss", "lse")
    values = {n: v for n in wanted if (v := getattr(out, n)) is not None and v.numel()}
    return dict(zip(values, upstream(list(values.values())), strict=True))


def _step(inputs, backend, gradients):
    """Outputs and gradients by name, forward and backward without a word to the host."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in DIFFERENTIABLE if inputs.get(n) is not None}
    out = softmax_loss(**{**inputs, **leaves}, backend=backend)
    pulled = torch.autograd.grad([getattr(out, n) for n in gradients], list(leaves.values()), list(gradients.values()))
    result = {n: value.detach() for n, value in out._asdict().items() if value is not None}
    return result | {f"gradient of {n}": g for n, g in zip(leaves, pulled, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.id)
def test_sizes(case, backend, dtype):
    check_case(SOFTMAX_LOSS, case, backend, "cuda", dtype)


@pytest.mark.parametrize("rows", [0, 1, 4096, 4097, 100_003])
@pytest.mark.parametrize(("num_classes", "num_groups"), [(1, 1), (1000, 2), (100_000, 3)])
def test_label_index_sizes(rows, num_classes, num_groups, backend):
    target = torch.randint(-1, num_classes, (rows,))
    group = torch.randint(-1, num_groups, (rows,))
    expected = label_index(target, num_classes, group, num_groups, ignore_index=-1, backend="reference")
    got = label_index(target.cuda(), num_classes, group.cuda(), num_groups, ignore_index=-1, backend=backend)
    for name, a, b in zip(expected._fields, got, expected, strict=True):
        assert torch.equal(a.cpu(), b), name


@each_case
def test_never_waits_for_the_device(case, backend):
    inputs = cast(case.build(), torch.float32, "cuda")
    gradients = _device_upstream(inputs, backend)
    target = inputs.get("target", torch.zeros(9, dtype=torch.int64, device="cuda"))
    _step(inputs, backend, gradients)  # compiles and loads
    label_index(target, inputs["logits"].shape[1], backend=backend)
    with no_sync():
        _step(inputs, backend, gradients)
        label_index(target, inputs["logits"].shape[1], backend=backend)


@pytest.mark.parametrize("case", [*FEATURED, MANY], ids=lambda c: c.id)
def test_graph_replays_with_new_data(case, backend):
    first = cast(case.build(), torch.float32, "cuda")
    second = cast(Case(case.id + "-again", case.shape, case.features, case.stats).build(), torch.float32, "cuda")
    gradients = _device_upstream(first, backend)
    expected = [_step(inputs, backend, gradients) for inputs in (first, second)]
    static = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.items()}
    graph, result = captured(lambda: _step(static, backend, gradients))
    for inputs, wanted in zip((second, first), reversed(expected), strict=True):
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
        graph.replay()
        assert_same_bits(result, wanted)


def test_label_index_in_a_graph(backend):
    targets = [torch.randint(0, 50, (n,), device="cuda") for n in (5000, 5000)]
    static = targets[0].clone()
    graph, result = captured(lambda: label_index(static, 50, backend=backend))
    static.copy_(targets[1])
    graph.replay()
    assert_same_bits(result._asdict(), label_index(targets[1], 50, backend=backend)._asdict())


@each_case
def test_runs_on_the_current_stream(case, backend):
    inputs = cast(case.build(), torch.float32, "cuda")
    gradients = _device_upstream(inputs, backend)
    expected = _step(inputs, backend, gradients)
    late = {**inputs, "logits": torch.zeros_like(inputs["logits"])}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on any other stream would see the zeros
        late["logits"].copy_(inputs["logits"])
        got = _step(late, backend, gradients)
    stream.synchronize()
    assert_same_bits(got, expected)


def test_runs_on_the_tensors_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    there, here = (cast(ALL.build(), torch.float32, device) for device in ("cuda:1", "cuda:0"))
    gradients = _device_upstream(there, backend)
    got = _step(there, backend, gradients)
    assert all(t.device == torch.device("cuda:1") for t in got.values())
    assert torch.cuda.current_device() == 0
    expected = _step(here, backend, {n: g.to("cuda:0") for n, g in gradients.items()})
    assert_same_bits({n: t.to("cuda:0") for n, t in got.items()}, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, backend):
    def function(logits, offset, target, group):
        loss, stats = classfair.cross_entropy_with_stats(
            logits, target, offset=offset, label_smoothing=0.1, group=group, num_groups=3, backend=backend
        )
        return loss + stats.mass.square().sum() + stats.hit.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (33, 65):
        x = cast(Case("compiled", (rows, 12), ("offset", "group"), 2).build(), torch.float32, "cuda")
        results = []
        for f in (function, compiled):
            logits, offset = (x[n].detach().requires_grad_() for n in ("logits", "offset"))
            value = f(logits, offset, x["target"], x["group"])
            results.append([value.detach(), *torch.autograd.grad(value, [logits, offset])])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_autocast_and_grad_scaler(backend):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 37, device="cuda")
    truth = copy.deepcopy(model).double()
    features, target = torch.randn(50, 64, device="cuda"), torch.randint(0, 37, (50,), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    with torch.autocast("cuda", dtype=torch.float16):
        logits = model(features)
        loss = classfair.cross_entropy(logits, target, backend=backend)
    assert (logits.dtype, loss.dtype) == (torch.float16, torch.float32)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.functional.cross_entropy(truth(features.double()), target).backward()
    for got, expected in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=2e-2, atol=2e-4)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16  # no infinity was found


@pytest.mark.parametrize("case", [c for c in FEATURED if c.id not in ("dense-all", "mixed-all")], ids=lambda c: c.id)
def test_bad_labels_are_flagged_not_fatal(case, backend):
    """Like ignored rows, but for a loss of NaN and their count."""
    x = case.build()
    rows, num_classes = x["target"].shape[0], x["logits"].shape[1]
    x["target"][:3] = torch.tensor([num_classes, -1, 2**32 + 1])
    bad = torch.arange(rows) < 3
    if "group" in x:
        x["group"][-2:] = torch.tensor([3, -2])
        bad[-2:] = True
    broken = cast(x, torch.float32, "cuda")
    good = {**broken, "target": torch.where(bad.cuda(), -100, broken["target"])}
    gradients = _device_upstream(good, backend)
    expected, got = _step(good, backend, gradients), _step(broken, backend, gradients)
    assert got["loss"].isnan().cpu().equal(bad)
    expected["loss"][bad.cuda()] = torch.nan
    if case.stats:
        assert int(got["counts"][-2]) == int(bad.sum())
        expected["counts"][-2] = got["counts"][-2]
    assert_same_bits(got, expected)
    gradient = got["gradient of logits"].movedim(1, -1).reshape(rows, num_classes)
    assert bool((gradient[bad.cuda()] == 0).all())
    torch.cuda.synchronize()
    assert_same_bits(_step(broken, backend, gradients), expected)  # the device still works


def test_bad_labels_in_label_index(backend):
    target = torch.tensor([3, 5, 3, -1, 2**32, 0, -100], device="cuda")
    group = torch.tensor([0, 0, 2, 0, 0, 1, 0], device="cuda")
    index = label_index(target, 5, group, 2, backend=backend)
    assert index.slot.tolist() == [1, -1, -1, -1, -1, 0, -1]
    assert index.order.tolist() == [5, 0, 1, 2, 3, 4, 6]
    assert index.num_slots.item() == 2


def test_more_than_two_to_the_31_logits(backend):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free GPU memory")
    num_classes, last = 21841, 5
    rows = 2**31 // num_classes + 20
    g = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, num_classes, dtype=torch.bfloat16, device="cuda", generator=g).requires_grad_()
    target = torch.randint(0, num_classes, (rows,), device="cuda", generator=g)
    offset = torch.randn(num_classes, device="cuda", generator=g)
    out = softmax_loss(logits, target=target, offset=offset, stats=2, backend=backend)
    gradients = [torch.randn(rows, device="cuda", generator=g), torch.randn(1, num_classes, device="cuda", generator=g)]
    (got,) = torch.autograd.grad([out.loss, out.mass], logits, gradients)
    assert int(out.counts[:num_classes].sum()) == rows
    torch.testing.assert_close(out.mass.double().sum().item(), float(rows), rtol=1e-5, atol=0)
    inputs = as_truth({"logits": logits.detach()[-last:], "target": target[-last:], "offset": offset, "stats": 2})
    leaf = inputs["logits"].requires_grad_()
    truth = softmax_loss(**inputs)
    wanted = [gradients[0][-last:].double().cpu(), gradients[1].double().cpu()]
    (expected,) = torch.autograd.grad([truth.loss, truth.mass], leaf, wanted)
    torch.testing.assert_close(out.loss[-last:].double().cpu(), truth.loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[-last:].double().cpu(), expected, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(out.prediction[-last:].cpu(), truth.prediction)


@pytest.mark.parametrize(
    "features", [(), ("offset", "weight", "smoothing"), ("offset", "margin", "group", "focal")], ids=str
)
@pytest.mark.parametrize("stats", [0, 2])
def test_no_temporary_of_the_size_of_the_logits(stats, features, backend):
    inputs = cast(Case("memory", (2048, 8142), features, stats).build(), torch.bfloat16, "cuda")
    gradients = _device_upstream(inputs, backend)
    _step(inputs, backend, gradients)  # loads
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = _step(inputs, backend, gradients)
    peak = torch.cuda.max_memory_allocated() - before
    size = inputs["logits"].numel() * inputs["logits"].element_size()
    assert size <= peak < 1.25 * size, f"{peak / size:.2f} times the logits"
    del result


@pytest.mark.parametrize("case", [MANY, *FEATURED], ids=lambda c: c.id)
def test_a_hundred_repeats_are_the_same_bits(case, backend):
    inputs = cast(case.build(), torch.float32, "cuda")
    gradients = _device_upstream(inputs, backend)
    first = _step(inputs, backend, gradients)
    for _ in range(100):
        assert_same_bits(_step(inputs, backend, gradients), first)
