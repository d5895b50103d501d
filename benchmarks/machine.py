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


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu() -> dict[str, Any]:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "name": match[1].strip() if match else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(),
        "libc": " ".join(platform.libc_ver()),
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
