"""The Triton kernels compile for GPUs that are not here: what only the interpreter accepts is found on any machine."""

import pytest
import torch

from classfair import backends
from classfair._schema import Scalars, Tensors
from tests.support.conformance import by_id, cast
from tests.support.primitives import schema_arguments
from tests.support.softmax_cases import CASES

pytest.importorskip("triton", reason="triton is not installed")
if "kernels" in backends.load_errors:
    pytest.skip(backends.load_errors["kernels"], allow_module_level=True)

import triton
from classfair.kernels import class_moments, label_index, pair_terms, softmax_loss
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets in this run")


class _Device:
    """A GPU that can be compiled for, not run on."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return f"sm_{self.capability}"

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compiled(monkeypatch, request):
    """Kernels compiled so far; every launch compiles and does nothing else."""
    kernels, launch = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", _Device(request.param))
    return kernels


def _check(kernels, names):
    assert {k.metadata.name for k in kernels} >= names
    assert all(k.asm["cubin"] for k in kernels)


def _compile_case(case, dtype, kernels):
    """The launches of a forward and of a backward from every output, without autograd."""
    x = cast(case.build(), dtype, "cpu")
    tensors, scalars = schema_arguments(x)
    loss, lse, lse_raw, _, mass, hit, joint, _, weight, total = softmax_loss.softmax_loss_fwd(*tensors, *scalars)
    upstream = (loss, lse, mass, hit, joint, total) if x["stats"] == 2 else (total, None, None, None, None, None)
    wants = [x.get(n) is not None for n in ("offset", "margin", "pair")]
    softmax_loss.softmax_loss_bwd(*upstream, *tensors, lse, lse_raw, weight, *scalars, *wants)
    expected = {"_softmax_loss_fwd_kernel", "_softmax_loss_bwd_kernel"}
    _check(
        kernels,
        expected
        | ({"_probability_sums_kernel"} if case.stats else set())
        | ({"_gradient_sums_kernel"} if any(wants) else set()),
    )


def each_gpu(*capabilities, slow=()):
    values = [pytest.param(c, id=f"sm_{c}", marks=[pytest.mark.slow] * (c in slow)) for c in (*capabilities, *slow)]
    return pytest.mark.parametrize("compiled", values, indirect=True)


def each_dtype(*dtypes, slow=()):
    values = [pytest.param(d, id=str(d)[6:], marks=[pytest.mark.slow] * (d in slow)) for d in (*dtypes, *slow)]
    return pytest.mark.parametrize("dtype", values)


@each_gpu(90)
@each_dtype(torch.bfloat16)
@pytest.mark.parametrize("case", by_id(CASES, "all", "dense-all", "plain-2x21841"), ids=lambda c: c.id)
def test_softmax_loss(case, dtype, compiled):
    _compile_case(case, dtype, compiled)


@pytest.mark.slow  # a second or two a kernel
@each_gpu(90)
@each_dtype(torch.bfloat16)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_softmax_loss_in_training_precision(case, dtype, compiled):
    _compile_case(case, dtype, compiled)


@pytest.mark.slow
@pytest.mark.exhaustive  # a thousand of them
@each_gpu(80, 90)
@each_dtype(torch.float32, torch.float64, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_softmax_loss_of_every_case(case, dtype, compiled):
    _compile_case(case, dtype, compiled)


@each_gpu(80, 90)
@pytest.mark.parametrize("group", [None, torch.zeros(70, dtype=torch.int64)], ids=["labels", "cells"])
def test_label_index(group, compiled):
    label_index.label_index(torch.zeros(70, dtype=torch.int64), group, 5, 2, -100)
    _check(compiled, {"_key_kernel", "_first_kernel", "_slot_kernel"})


@each_gpu(90, slow=[80])
@each_dtype(torch.bfloat16, slow=[torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("shape", [(70, 37), (2000, 2048)])
def test_class_moments(shape, variance, dtype, compiled):
    rows = torch.zeros(shape[0], dtype=torch.int64)
    start = torch.zeros(5, dtype=torch.int64)
    count, mean, own, _ = class_moments.class_moments(torch.zeros(shape, dtype=dtype), rows, rows, start, variance)
    for momentum in (None, 0.1):
        spread = own if variance else None
        state = (count, mean, spread, mean, spread)
        class_moments.class_moments_merge(start[1:], mean, spread, rows[:4], *state, momentum)
    names = {"_finite_kernel", "_moments_kernel", "_merge_kernel"} | ({"_combine_kernel"} if shape[0] > 70 else set())
    _check(compiled, names)


@each_gpu(90, slow=[80])
@each_dtype(torch.float32, slow=[torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_pair_terms(normalize, dtype, compiled):
    weight, label, count = torch.zeros(70, 33, dtype=dtype), torch.arange(40), torch.tensor(40)
    variance, square = pair_terms.pair_terms_fwd(weight, weight, label, count, normalize, True)
    inputs = (weight, weight, label, count, variance, square, normalize)
    pair_terms.pair_terms_bwd(variance, square, *inputs, True)
    pair_terms.pair_terms_bwd(variance, None, *inputs, False)
    pair_terms.pair_terms_bwd(None, square, weight, None, *inputs[2:6], False, False)
    names = {"_pair_terms_fwd_kernel", "_coefficients_kernel", "_class_gradient_kernel", "_slot_gradient_kernel"}
    _check(compiled, names | ({"_normalize_kernel"} if normalize else set()))


@each_gpu(90)
def test_batch_sizes_share_one_compilation(compiled):
    hashes, scalars = set(), Scalars(stats=1)
    for rows in (2, 16, 31, 48, 1000):
        logits, target = torch.zeros(rows, 10), torch.zeros(rows, dtype=torch.int64)
        softmax_loss.softmax_loss_fwd(*Tensors(logits, target=target), *scalars)
        hashes |= {(k.metadata.name, k.hash) for k in compiled}
    assert len(hashes) == len({name for name, _ in hashes}) + 2  # sums of weights, of tables, of counts
