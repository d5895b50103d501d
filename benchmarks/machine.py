"""Where and with what a result was measured."""

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from classfair import backends

_ROOT = Path(__file__).parents[1]


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date, for the head of a result."""
    return {
        "device": device,
        "machine": _gpu() if device == "cuda" else _cpu(),
        "versions": _versions(),
        "commit": _output("git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def slug(machine: dict[str, Any]) -> str:
    """A device as part of a file name: machines of one name may have processors of other families and models."""
    parts = (str(machine[key]) for key in ("name", "family", "model") if key in machine)
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _cpu() -> dict[str, Any]:
    return {
        **processor(Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(),
        "libc": " ".join(platform.libc_ver()),
    }


def processor(cpuinfo: str) -> dict[str, Any]:
    """What Linux tells of the first core. Clouds sell several generations under one name; the numbers differ."""
    said = dict(re.findall(r"^(.*?)\s*: (.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    numbers = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    vectors = [flag for flag in said.get("flags", "").split() if flag.startswith(("avx2", "avx512"))]
    return {
        "name": said.get("model name", platform.machine()),
        **({"vendor": said["vendor_id"]} if "vendor_id" in said else {}),
        **{name: int(said[key]) for name, key in numbers.items() if key in said},
        **({"vectors": " ".join(vectors)} if vectors else {}),
    }


def _instruction_set() -> str:
    if "_C" in backends.load_errors:
        return f"no compiled kernels ({backends.load_errors['_C']})"
    from classfair._C import build_info

    return build_info()["cpu_instruction_set"]


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "host": _cpu()["name"],
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "classfair"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _output(*command: str) -> str:
    """The first line that a program prints; "unknown" without the program or where it fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else "unknown"
