"""The CUDA kernels on the CPU: ``load()`` makes them serve as back-end ``native`` for tensors on the CPU. See README.md."""

import ctypes
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from classfair import backends

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "cuda_emulator"
#: Every access of a kernel becomes a call of the emulator. Loops stay as they are written.
INSTRUMENTED = (
    "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -fno-tree-vectorize -fno-strict-aliasing"
    " -x c++ -DTORCH_TARGET_VERSION=0x020a000000000000 -Wno-unknown-pragmas"
).split()


def _flags() -> list[str]:
    own = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    return ["-std=c++20", "-O2", "-fPIC", "-Wall", *own, f"-isystem{Path(torch.__file__).parent / 'include'}"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-3:])} failed:\n{done.stderr[-4000:]}")


def _compile(source: Path, headers: bytes) -> Path:
    flags = [*_flags(), *(INSTRUMENTED if source.suffix == ".cu" else ())]
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
    patterns = (ROOT / "csrc").rglob("*.[hc]*"), HERE.rglob("*.[hc]*")
    headers = b"".join(p.read_bytes() for ps in patterns for p in sorted(ps) if p.suffix in (".h", ".cuh"))
    headers += torch.__version__.encode()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(lambda source: _compile(source, headers), sources)]
    key = hashlib.sha256("".join(objects).encode()).hexdigest()[:16]
    target = BUILT / f"lib{name}-{key}.so"
    if not target.exists():
        torch_folder = Path(torch.__file__).parent / "lib"
        link = ["-shared", *objects, *map(str, libraries), f"-Wl,-rpath,{BUILT}", f"-L{torch_folder}"]
        part = target.with_suffix(f".{os.getpid()}")
        _run(["g++", *link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(part)])
        part.rename(target)
    return target


def load(*kernels: Path) -> ctypes.CDLL:
    """Serve these .cu files on the CPU, by default all of csrc/cuda, in place of the CPU's own kernels."""
    emulator = build("emulator", sorted(HERE.glob("*.cpp")))
    # Whether a driver is new enough is no question here.
    sources = list(kernels) or sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem != "probe")
    library = ctypes.CDLL(str(emulator), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(build("kernels" if not kernels else kernels[0].stem, sources, emulator)))
    backends.discover()
    return library
