"""Builds the compiled parts: ``classfair._C`` (CPU kernels) and, where nvcc is found, ``classfair._cuda``.

Build-time settings: ``CLASSFAIR_CUDA=auto|0|1`` (auto: build CUDA kernels where nvcc is found; 1: fail without),
``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``CXX``, ``CLASSFAIR_CXXFLAGS`` (the last flags of the CPU kernels). All other
metadata is static, in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
RELEASE_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0"]
# One binary serves every torch from 2.10 on: only the stable ABI of that version may be used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def sources(*patterns: str) -> list[str]:
    # Relative to setup.py: setuptools refuses absolute source paths.
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def toolkit_home(nvcc: str) -> Path:
    """nvcc is often a wrapper script, so it is asked for its home; its path is no evidence."""
    dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    home = re.search(r"TOP=(\S+)", dryrun)
    return Path(home.group(1)).resolve() if home else Path(nvcc).resolve().parents[1]


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def cuda_archs(nvcc: str) -> str:
    """The visible GPUs' architectures, else a pair that runs on every data-centre GPU since Ampere."""
    import torch

    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed == "all":
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        archs = [a for a in RELEASE_ARCHS if f"compute_{a.replace('.', '')}" in known]
        return ";".join(archs) + "+PTX"
    if listed:
        return listed
    if torch.cuda.is_available():
        visible = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(visible)) + "+PTX"
    return "8.0;9.0+PTX"


def cpp_flags() -> list[str]:
    # GCC's own AVX-512 headers trip the two "uninitialized" warnings; clang does not know all of these names.
    quiet = ["-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    quiet += ["-Wno-unknown-warning-option"]
    return ["-O3", "-g0", "-fvisibility=hidden", "-Wall", *quiet, STABLE_ABI]


def build_facts(nvcc: str | None) -> list[str]:
    """What ``build_info()`` tells about the CUDA part."""
    version, archs = (nvcc_version(nvcc), cuda_archs(nvcc)) if nvcc else ("none", "none")
    return [f'-DCLASSFAIR_CUDA_VERSION="{version}"', f'-DCLASSFAIR_CUDA_ARCHS="{archs}"']


def cpu_extension(nvcc: str | None):
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "classfair._C",
        sources("csrc/*.cpp", "csrc/cpu/**/*.cpp"),
        # First, because the pybind11 inside torch refuses to compile under the stable ABI.
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": [
                *cpp_flags(),
                *build_facts(nvcc),
                "-ffp-contract=fast",
                *os.environ.get("CLASSFAIR_CXXFLAGS", "").split(),
            ]
        },
    )


def cuda_extension(nvcc: str):
    """A C++ extension whose .cu files go to nvcc, so that it also links against the CPU-only torch."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    home, version, archs = toolkit_home(nvcc), nvcc_version(nvcc), cuda_archs(nvcc)
    if torch.version.cuda and torch.version.cuda.split(".")[0] != version.split(".")[0]:
        raise SystemExit(
            f"classfair: expected nvcc of CUDA {torch.version.cuda.split('.')[0]} as torch was built with, got "
            f"{version}; install a matching toolkit or set CLASSFAIR_CUDA=0"
        )
    cpp_extension.CUDA_HOME = str(home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    return cpp_extension.CppExtension(
        "classfair._cuda",
        sources("csrc/*.cpp", "csrc/cuda/*.cu"),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc"), str(home / "include")],
        library_dirs=[str(home / "lib64")],
        extra_compile_args={
            "cxx": [*cpp_flags(), *build_facts(nvcc), "-DCLASSFAIR_CUDA_MODULE"],
            "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI],
        },
        # The runtime is linked statically: no second libcudart to find. libtorch brings libtorch_cuda, whose
        # stream function the kernels need, into scope at import.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
    )


def extensions() -> list:
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
        print(
            "classfair: no C++ compiler found; installing pure Python (backends 'reference' and 'triton')",
            file=sys.stderr,
        )
        return []
    wanted = os.environ.get("CLASSFAIR_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"classfair: expected CLASSFAIR_CUDA=auto|0|1, got {wanted!r}")
    nvcc = shutil.which("nvcc") if wanted != "0" else None
    if wanted == "1" and not nvcc:
        raise SystemExit("classfair: expected nvcc on PATH because CLASSFAIR_CUDA=1, got none")
    return [cpu_extension(nvcc), *([cuda_extension(nvcc)] if nvcc else [])]


def build_command() -> dict:
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)}


if __name__ == "__main__":
    # sdist and metadata need no compiled part, and so no torch.
    compiling = {"build_ext", "bdist_wheel", "editable_wheel", "install", "develop", "build"} & set(sys.argv)
    ext_modules = extensions() if compiling else []
    setup(ext_modules=ext_modules, cmdclass=build_command() if ext_modules else {})
