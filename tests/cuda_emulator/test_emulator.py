"""The emulator finds every kind of fault in kernels that have it and none in the same kernels without it; it counts."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.cuda_emulator import HERE, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++")]

#: What is said of each kernel of broken.cu, in its order.
FAULTS = {
    "missing_barrier": "race|shared memory is read",
    "missing_second_barrier": "race",
    "missing_warp_barrier": "race|shared memory is read",
    "divergent_barrier": "divergent barrier: .* 40 threads wait at __syncthreads, 0 .*, and 24 have returned",
    "missing_lane": "divergent barrier: .* 31 for lanes",
    "lane_outside_its_mask": "mask leaves it out",
    "unwritten_shared": "shared memory is read that the block has not written",
    "read_out_of_bounds": "out of bounds: 4 bytes at byte 768 of a tensor of 768",
    "write_out_of_bounds": "out of bounds: 4 bytes at",
    "misaligned": "misaligned address: 8 bytes at once",
    "race_of_threads": "race",
    "race_of_blocks": "race: what thread 0 of block",
    "last_block_without_fence": "race: what thread",
    "last_block_without_atomic": "race: what thread",
}
RUN = """
import json, sys, torch
from tests import cuda_emulator

cuda_emulator.load(cuda_emulator.HERE / "broken.cu")
x, said = torch.arange(192.0), []
for seed in range(3):
    cuda_emulator.seed(seed)
    for kernel in range(int(sys.argv[1])):
        for broken in (False, True):
            try:
                torch.ops.classfair_broken.run(x, kernel, broken)
                said.append("")
            except RuntimeError as error:
                said.append(str(error).splitlines()[0])
print(json.dumps(said))
"""


def run(code, *arguments):
    """What a program prints, in a process that loads the emulator."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def said():
    """Of each kernel in three orders, without and with its fault."""
    words = iter(run(RUN, len(FAULTS)))
    rounds = [{kernel: (next(words), next(words)) for kernel in FAULTS} for _ in range(3)]
    return {kernel: [words[kernel] for words in rounds] for kernel in FAULTS}


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_found(kernel, said):
    for whole, broken in said[kernel]:
        assert whole == ""
        assert re.search(FAULTS[kernel], broken), broken


def test_every_broken_kernel_is_tried():
    source = (HERE / "broken.cu").read_text()
    table = re.search(r"kKernels\[\]\)\(Arguments\) = \{(.*?)\}", source, re.DOTALL)[1]
    assert re.findall(r"\w+", table) == list(FAULTS)


@pytest.mark.parametrize("ubsan", ["", pytest.param("1", marks=pytest.mark.slow)], ids=["plain", "ubsan"])
def test_the_kernels_pass_chosen_cases(ubsan):
    """``make test-cuda-emulated`` runs them all."""
    chosen = "all-many-rows or mixed-all or dense-all or strided-3d or plain-3x1025 or skewed or nonfinite or 17x17"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_emulator.plugin"]
    command += ["tests/primitives/test_conformance.py"]
    command += ["-k", f"native-cpu and values_and and (float32 or bfloat16) and ({chosen})"]
    environment = {**os.environ, "CUDA_EMULATOR_UBSAN": ubsan}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


COUNT = """
import json, torch
from tests import cuda_emulator
cuda_emulator.load()
from classfair._schema import Scalars, Tensors

N, C = 64, 1000
target = torch.arange(N)
said = {}
for dtype in (torch.float32, torch.bfloat16):
    for stats in (0, 2):
        t, s = Tensors(torch.zeros(N, C, dtype=dtype), target=target), Scalars(stats=stats)
        out, forward = cuda_emulator.count(lambda: torch.ops.classfair_native.softmax_loss_fwd(*t, *s))
        upstream = (out[0], None, out[4] if stats else None, None, None, None)
        arguments = (*upstream, *t, out[1], out[2], out[8], *s, False, False, False)
        gradients, backward = cuda_emulator.count(lambda: torch.ops.classfair_native.softmax_loss_bwd(*arguments))
        bytes = t.logits.nbytes
        said[f"{dtype} {stats}"] = {
            "forward": [launch.kernel for launch in forward.launches],
            "backward": [launch.kernel for launch in backward.launches],
            "memsets": forward.memsets,
            "read": forward.of(t.logits)["read"] / bytes,
            "sectors": forward.of(t.logits)["sectors"] * 32 / bytes,
            "read again": backward.of(t.logits)["sectors"] * 32 / bytes,
            "written": backward.of(gradients[0])["sectors"] * 32 / bytes,
        }
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def counted():
    return run(COUNT)


@pytest.mark.parametrize("stats", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_writes_and_launches(dtype, stats, counted):
    """Upper bounds: g++ keeps other values in registers than nvcc."""
    said = counted[f"torch.{dtype} {stats}"]
    passes = 2 if stats else 1
    kernels = ["softmax_loss_fwd_kernel", "totals_kernel"]
    assert said["forward"][:2] == kernels
    assert len(said["forward"]) <= (7 if stats else 2)
    assert said["backward"] == ["softmax_loss_bwd_kernel"]
    assert said["memsets"] == passes - 1
    # Every row, and once more its label's value; at least once, or nothing was counted.
    assert passes <= said["read"] <= passes * 1.001
    # Every second row of bfloat16 begins in the middle of a sector: its requests take three instead of two. Backward,
    # each of a row's four warps reads the label's value besides.
    unaligned = 1 if dtype == "float32" else 1.25
    assert passes <= said["sectors"] <= passes * unaligned * 1.1
    assert passes <= said["read again"] <= passes * unaligned * 1.2
    assert 1 <= said["written"] <= unaligned * 1.1
