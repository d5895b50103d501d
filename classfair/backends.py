"""Which implementation of a primitive runs.

``native``
    C++ on the CPU (``classfair._C``), CUDA C++ on GPUs (``classfair._cuda``).
``triton``
    Triton kernels (``classfair.kernels``).
``reference``
    Plain torch (:mod:`classfair.reference`), on every device.

``backend=None`` takes the first of these that has the primitive on the tensor's device and can run there. On the CPU
the order is that of measured speed; on GPUs nobody has measured it yet. A back-end given by name is used or refused
with an error, never replaced. What ``torch.export`` records is always ``reference``.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("native", "triton", "reference")
PRIMITIVES = {
    "softmax_loss": "softmax_loss_fwd",
    "label_index": "label_index",
    "class_moments": "class_moments",
    "pair_terms": "pair_terms_fwd",
    "penalties": "dependence",
}

#: The operators of each back-end with kernels.
_NAMESPACES = {
    "native": torch.ops.classfair_native,
    "triton": torch.ops.classfair_triton,
}

#: Why a module with kernels could not be imported, by module name.
load_errors: dict[str, str] = {}

# (primitive, device type) -> back-ends that serve it; filled once by discover().
_available: dict[tuple[str, str], tuple[str, ...]] = {}

# GPU -> what _why_unusable() found.
_unusable: dict[int, str] = {}


def transformed() -> bool:
    """Whether a function transform, a tracer or the compiler looks on, who must see every tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _load(module: str) -> None:
    try:
        importlib.import_module(f"classfair.{module}")
    except ModuleNotFoundError:
        load_errors[module] = "not built"
    except ImportError as error:
        load_errors[module] = f"built, but its import failed: {error}"


def _load_kernels() -> None:
    try:
        importlib.import_module("classfair.kernels")
    except ModuleNotFoundError as error:
        load_errors["kernels"] = f"{error.name} is not installed"
    except Exception as error:  # a broken Triton fails in its own ways
        load_errors["kernels"] = f"its import failed: {error}"


def load_compiled() -> None:
    """Import the compiled modules, which register their kernels; remember why one is missing."""
    _load("_C")
    if torch.version.cuda is None:
        load_errors["_cuda"] = "this torch is a CPU-only build"
    else:
        _load("_cuda")
    _load_kernels()
    if "_C" in load_errors:
        checkout = (Path(__file__).parents[1] / "pyproject.toml").exists()
        how = "run `pip install -e .` in the checkout" if checkout else "reinstall with a C++ compiler"
        warnings.warn(
            f"classfair: no compiled CPU kernels ({load_errors['_C']}), using plain torch; {how} for speed",
            RuntimeWarning,
            stacklevel=3,
        )


def _has_kernel(backend: str, primitive: str, device_type: str) -> bool:
    if backend == "reference":
        return True
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    operator = PRIMITIVES[primitive]
    if key is None or not hasattr(_NAMESPACES[backend], operator):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"classfair_{backend}::{operator}", key)


def discover() -> None:
    """Ask the dispatcher which kernels are registered."""
    for primitive in PRIMITIVES:
        for device_type in ("cpu", "cuda", "other"):
            serving = (b for b in BACKENDS if _has_kernel(b, primitive, device_type))
            _available[primitive, device_type] = tuple(serving)


def available(primitive: str, device_type: str) -> tuple[str, ...]:
    """Back-ends with kernels for a primitive on a type of device, in their order."""
    return _available.get((primitive, device_type)) or _available[primitive, "other"]


def _why_unusable(gpu: int) -> str:
    """Why ``classfair._cuda``, which could be imported, cannot run on a GPU (built for others, driver too old); empty
    where it can. Asked once per GPU, because it starts CUDA there."""
    if gpu not in _unusable:
        if not torch.cuda.is_available():  # a fake tensor
            return ""
        with torch.cuda.device(gpu):
            _unusable[gpu] = importlib.import_module("classfair._cuda").why_unusable()
    return _unusable[gpu]


# What torch.compiler.assume_constant_result sets; itself it imports the whole compiler, which takes seconds.
_why_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def usable(primitive: str, device: torch.device) -> tuple[str, ...]:
    """Back-ends that serve a primitive on this device, in their order."""
    serving = available(primitive, device.type)
    if device.type == "cuda" and "native" in serving and _why_unusable(_index(device)):
        return tuple(b for b in serving if b != "native")
    return serving


def choose(primitive: str, device: torch.device, backend: str | None) -> str:
    """The back-end to use; RuntimeError if the named one cannot run here."""
    serving = usable(primitive, device)
    if torch.compiler.is_exporting():
        # An exported program keeps operators and loses autograd Functions: plain torch keeps its gradient.
        if backend not in (None, "reference"):
            raise RuntimeError(f"{primitive}: expected backend None or 'reference' in an export, got {backend!r}")
        return "reference"
    if backend is None:
        return serving[0]
    if backend in serving:
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"{primitive}: expected backend 'native', 'triton' or 'reference', got {backend!r}")
    here = ", ".join(repr(b) for b in serving)
    raise RuntimeError(
        f"{primitive}: backend {backend!r} cannot run on device {str(device)!r}"
        f" ({why_missing(primitive, device, backend)}); available here: {here}"
    )


def why_missing(primitive: str, device: torch.device, backend: str) -> str:
    """One line for doctor and for errors."""
    if backend == "native":
        module = "_C" if device.type == "cpu" else "_cuda"
        if module in load_errors:
            return f"classfair.{module}: {load_errors[module]}"
        if device.type == "cuda" and (reason := _why_unusable(_index(device))):
            return f"classfair._cuda: {reason}"
    if backend == "triton":
        if "kernels" in load_errors:
            return f"classfair.kernels: {load_errors['kernels']}"
        if device.type == "cpu":
            return "needs CUDA"
    return f"no {device.type} kernel for {primitive}"


def namespace(backend: str) -> Any:
    """The operators of a back-end with kernels."""
    return _NAMESPACES[backend]
