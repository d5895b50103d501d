"""Compiles the CUDA kernels for every released architecture, warnings as errors, and reports registers and spills.

``make cuda-check``; architectures as arguments narrow it down. Fails on a warning, and on a spill in any kernel that is
not float64: those are for checking gradients, not for training.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from setup import RELEASE_ARCHS, STABLE_ABI  # noqa: E402

FUNCTION = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILL = re.compile(r"(\d+) bytes spill stores")
REGISTERS = re.compile(r"Used (\d+) registers")


def compile_file(source: Path, archs: list[str]) -> str:
    """What ptxas tells about each kernel; SystemExit if it does not compile cleanly."""
    targets = [a.replace(".", "") for a in archs]
    command = ["nvcc", "-c", "-O3", "-std=c++17", "-DUSE_CUDA", STABLE_ABI, "-Werror", "all-warnings"]
    command += ["-Xcompiler=-Wall,-Werror,-fvisibility=hidden", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    command += [flag for path in include_paths() for flag in ("-isystem", path)]
    command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, str(source), "-o", f"{folder}/out.o"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.name} does not compile cleanly:\n{done.stderr}")
    return done.stderr


def spills(report: str) -> list[tuple[str, str, int, int]]:
    """(architecture, kernel, spilled bytes, registers) of every kernel of a ptxas report."""
    found, name, arch, spilled = [], "", "", 0
    for line in report.splitlines():
        if match := FUNCTION.search(line):
            name, arch = match.groups()
        elif match := SPILL.search(line):
            spilled = int(match[1])
        elif match := REGISTERS.search(line):
            found.append((arch, name, spilled, int(match[1])))
    return found


def main() -> int:
    archs = sys.argv[1:] or RELEASE_ARCHS
    failed = False
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        kernels = spills(compile_file(source, archs))
        for arch in sorted({k[0] for k in kernels}):
            own = [k for k in kernels if k[0] == arch]
            print(f"{source.name:22}{arch:8}{len(own):4} kernels, at most {max(k[3] for k in own)} registers")
        for arch, name, spilled, _ in kernels:
            if spilled:
                readable = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
                double = "double" in readable
                failed |= not double
                print(f"  {arch} spills {spilled} bytes{' (float64)' if double else ''}: {readable[:150]}")
    print("FAILED" if failed else "clean")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
