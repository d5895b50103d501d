"""The emulator finds every kind of fault in kernels that have it, and none in the same kernels without it; it counts."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.cuda_emulator import HERE, ROOT

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")

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
for kernel in range(int(sys.argv[1])):
    for broken in (False, True):
        try:
            torch.ops.classfair_broken.run(x, kernel, broken)
            said.append("")
        except RuntimeError as error:
            said.append(str(error).splitlines()[0])
print(json.dumps(said))
"""


@pytest.fixture(scope="module", params=range(3), ids=lambda seed: f"seed{seed}")
def said(request):
    """Of each kernel, without and with its fault."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(len(FAULTS))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_EMULATOR_SEED": str(request.param)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)
    return dict(zip(FAULTS, zip(words[::2], words[1::2], strict=True), strict=True))


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_found(kernel, said):
    whole, broken = said[kernel]
    assert whole == ""
    assert re.search(FAULTS[kernel], broken), broken


def test_every_broken_kernel_is_tried():
    source = (HERE / "broken.cu").read_text()
    table = re.search(r"kKernels\[\]\)\(Arguments\) = \{(.*?)\}", source, re.DOTALL)[1]
    assert re.findall(r"\w+", table) == list(FAULTS)
