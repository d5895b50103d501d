"""The compiled CPU kernels themselves: instruction sets, exponential, thread safety of errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from classfair import backends
from classfair._schema import Scalars, Tensors

pytestmark = pytest.mark.skipif("_C" in backends.load_errors, reason="no compiled CPU kernels")


def test_build_info():
    from classfair import _C

    info = _C.build_info()
    assert {"compiler", "cuda", "cuda_archs", "cpu_instruction_sets", "cpu_instruction_set"} <= info.keys()
    assert info["cpu_instruction_set"] in info["cpu_instruction_sets"]
    assert info["cpu_instruction_set"] == {
        "AVX512": "avx512",
        "AVX2": "avx2",
    }.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def exponential(x):
    """exp as the kernels compute it: with an upstream gradient of lse only and lse = 0, the gradient is exp(z)."""
    rows = x.shape[0]
    tensors = Tensors(x, target=torch.zeros(rows, dtype=torch.int64))
    zero, one = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    upstream = (None, one, None, None, None, None)
    return torch.ops.classfair_native.softmax_loss_bwd(
        *upstream, *tensors, zero, zero[:0], one[0], *Scalars(), False, False, False
    )[0]


def test_exponential_is_within_its_stated_error():
    x = torch.cat([torch.linspace(-87.33, 0, 2_000_000), -torch.logspace(-30, 0, 48_000)]).view(-1, 1000)
    error = (exponential(x).double() / x.double().exp() - 1).abs()
    assert error.max().item() < 2e-7


@pytest.mark.parametrize("shape", [(1, 24), (24, 1)], ids=["wide", "narrow"])
def test_exponential_at_the_ends(shape):
    x = torch.tensor([0.0, -0.0, -88.5, -200.0, -torch.inf, torch.nan, 1.0, -1.0]).repeat(3).view(shape)
    y = exponential(x).flatten()
    assert y[:2].tolist() == pytest.approx([1.0, 1.0], rel=2e-7)
    assert y[2:5].tolist() == [0.0, 0.0, 0.0]
    assert bool(y[5].isnan())


@pytest.mark.parametrize(
    ("capability", "tests"),
    [
        ("default", "native-cpu-float32 and (plain or all)"),
        pytest.param("default", "native-cpu", marks=pytest.mark.slow),
        pytest.param("avx2", "native-cpu", marks=pytest.mark.slow),
    ],
)
def test_lower_instruction_sets_pass_the_suite(capability, tests):
    """ATEN_CPU_CAPABILITY limits our kernels as it limits torch's. The best set of this machine ran already."""
    from classfair import _C

    name = {"default": "baseline"}.get(capability, capability)
    if name not in _C.build_info()["cpu_instruction_sets"]:
        pytest.skip(f"built without {name}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTEST_ADDOPTS": ""}
    root = Path(__file__).parents[2]

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=root)

    code = "from classfair import _C; print(_C.build_info()['cpu_instruction_set'])"
    assert run("-c", code).stdout.strip() == name
    result = run("-m", "pytest", "tests/primitives/test_conformance.py", "-q", "-k", f"values_and and {tests}")
    assert result.returncode == 0, result.stdout[-2000:]
    assert " passed" in result.stdout
