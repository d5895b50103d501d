"""The CUDA kernels on the CPU: ``load()`` makes them the back-end ``native`` for tensors on the CPU. See README.md."""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair import backends

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "cuda_emulator"
#: Every access of a kernel becomes a call of the emulator. Loops stay as they are written.
INSTRUMENTED = (
    *("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-tree-vectorize"),
    *("-fno-strict-aliasing", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-xc++"),
)
#: Of the C++ language, in all code of the kernels' files: such as an overflow of an integer.
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover") if os.environ.get("CUDA_EMULATOR_UBSAN") else ()


def _flags() -> list[str]:
    own = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    return ["-std=c++20", "-O2", "-fPIC", "-Wall", *own, f"-isystem{Path(torch.__file__).parent / 'include'}"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-3:])} failed:\n{done.stderr[-4000:]}")


def _compile(source: Path, headers: bytes) -> Path:
    flags = [*_flags(), *((*INSTRUMENTED, *UNDEFINED) if source.suffix == ".cu" else ())]
    key = hashlib.sha256(headers + source.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    target = BUILT / f"{source.stem}-{key}.o"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        _run(["g++", *flags, "-c", str(source), "-o", str(part)])
        part.rename(target)
    return target


def build(name: str, sources: list[Path], *libraries: Path) -> Path:
    """A shared library of these sources; compiled again where one of them or a header has changed."""
    BUILT.mkdir(parents=True, exist_ok=True)
    folders = (ROOT / "csrc", ROOT / "csrc/cuda", HERE, HERE / "include", HERE / "include/cuda")
    headers = b"".join(p.read_bytes() for folder in folders for p in sorted(folder.glob("*.*h")))
    headers += torch.__version__.encode()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(lambda source: _compile(source, headers), sources)]
    key = hashlib.sha256("".join(objects).encode()).hexdigest()[:16]
    target = BUILT / f"lib{name}-{key}.so"
    if not target.exists():
        torch_folder = Path(torch.__file__).parent / "lib"
        link = ["-shared", *UNDEFINED, *objects, *map(str, libraries), f"-Wl,-rpath,{BUILT}", f"-L{torch_folder}"]
        part = target.with_suffix(f".{os.getpid()}")
        _run(["g++", *link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(part)])
        part.rename(target)
    return target


@functools.cache
def _machine() -> ctypes.CDLL:
    """Makes torch's CPU memory known from here on."""
    library = ctypes.CDLL(str(build("emulator", sorted(HERE.glob("*.cpp")))), mode=ctypes.RTLD_GLOBAL)
    library.emulator_stop.restype = ctypes.c_char_p
    library.emulator_seed(int(os.environ.get("CUDA_EMULATOR_SEED", "0")))
    return library


def seed(number: int) -> None:
    """Choose another order of blocks and threads."""
    _machine().emulator_seed(number)


def load(*kernels: Path) -> None:
    """Serve these .cu files on the CPU, by default all of csrc/cuda, in place of the CPU's own kernels."""
    emulator = Path(_machine()._name)
    # Whether a driver is new enough is no question here.
    sources = list(kernels) or sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem != "probe")
    name = kernels[0].stem if kernels else "kernels"
    library = build(name, sources, emulator)
    torch.ops.load_library(str(library))
    _libraries.append(library)
    backends.discover()


_libraries: list[Path] = []
_TRAFFIC = ("read", "written", "requests", "sectors")


class Launch(NamedTuple):
    """One kernel's launch. ``touched`` has, of each tensor, the bytes that its threads read and wrote, the requests of
    warps, and the 32-byte sectors that these take: where lanes read the same address, fewer bytes than threads read."""

    kernel: str
    blocks: int
    threads: int
    touched: dict[int, dict[str, int]]  # by address


class Counts(NamedTuple):
    """What a call does on the device."""

    launches: list[Launch]
    memsets: int
    allocations: int

    def of(self, tensor: Tensor) -> dict[str, int]:
        """Sums over the launches of one tensor."""
        found = [launch.touched.get(tensor.data_ptr(), {}) for launch in self.launches]
        return {name: sum(f.get(name, 0) for f in found) for name in _TRAFFIC}


@functools.cache
def _kernel_names(library: Path) -> dict[int, str]:
    lines = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    matches = (re.match(r"(\w+) \w .*?(\w+_kernel)\b", line) for line in lines)
    return {int(m[1], 16): m[2] for m in matches if m}


def count(function: Callable[[], Any]) -> tuple[Any, Counts]:
    """What a function returns, and what its kernels do."""
    _machine().emulator_start()
    result = function()
    head, *lines = _machine().emulator_stop().decode().splitlines()
    launches: list[Launch] = []
    for line in lines:
        numbers = [int(n) for n in line.split()]
        if len(numbers) == 3:
            name = next((n[numbers[0]] for n in map(_kernel_names, _libraries) if numbers[0] in n), "unknown")
            launches.append(Launch(name, *numbers[1:], {}))
        else:
            launches[-1].touched[numbers[0]] = dict(zip(_TRAFFIC, numbers[1:], strict=True))
    return result, Counts(launches, *map(int, head.split()))
