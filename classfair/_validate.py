"""Checks of public arguments, raised before any kernel: ``function: expected X, got Y``."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


REDUCTIONS = ("none", "mean", "sum")


def acc_dtype(logits: Tensor) -> torch.dtype:
    """Dtype of sums and statistics: float32, or float64 for float64 inputs."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_logits(function: str, logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{function}: expected logits as a tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOATS:
        raise TypeError(
            f"{function}: expected logits of dtype float16, bfloat16, float32 or float64, got {logits.dtype}"
        )
    if logits.layout != torch.strided:
        raise TypeError(f"{function}: expected dense (strided) logits, got layout {logits.layout}")
    if logits.dim() == 0 or logits.shape[min(1, logits.dim() - 1)] == 0:
        raise ValueError(
            f"{function}: expected logits of shape (C,), (N, C) or (N, C, d1, ...) with C >= 1,"
            f" got {tuple(logits.shape)}"
        )


def check_labels_tensor(function: str, name: str, labels: Any, shape: Sequence[int]) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{function}: expected {name} as a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{function}: expected {name} of dtype torch.int64, got {labels.dtype}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{function}: expected {name} of shape {tuple(shape)}, got {tuple(labels.shape)}")


def flat_labels(function: str, name: str, labels: Any, shape: Sequence[int]) -> Tensor:
    """Checked labels as (R,), contiguous; without an operator where they are so already."""
    check_labels_tensor(function, name, labels, shape)
    return labels if labels.dim() == 1 and labels.is_contiguous() else labels.reshape(-1).contiguous()


def check_floats(function: str, name: str, value: Any, shape: Sequence[int]) -> None:
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: expected {name} as a floating tensor, got {got}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{function}: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}")


def check_device(function: str, name: str, value: Tensor, device: torch.device, of: str = "logits") -> None:
    if value.device != device:
        raise ValueError(f"{function}: expected {name} on the device of the {of}, {device}, got {value.device}")


def check_matrix(function: str, name: str, value: Any) -> None:
    """A dense floating tensor of two dimensions, the first at least 1."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: expected {name} as a floating tensor, got {got}")
    if value.layout != torch.strided:
        raise TypeError(f"{function}: expected dense (strided) {name}, got layout {value.layout}")
    if value.dim() != 2 or value.shape[0] == 0:
        raise ValueError(f"{function}: expected {name} of shape (C, D) with C >= 1, got {tuple(value.shape)}")


def check_range(function: str, name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        wanted = f"in [{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
        if -low == high == math.inf:
            wanted = "that is no NaN"
        raise ValueError(f"{function}: expected {name} {wanted}, got {value}")


def check_number(function: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if type(value) is not float and not isinstance(value, Real):  # the second question takes microseconds
        raise TypeError(f"{function}: expected {name} as a number, got {type(value).__name__}")
    check_range(function, name, float(value), low, high)


def check_size(function: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}: expected {name} as an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{function}: expected {name} >= 1, got {value}")


def check_choice(function: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        wanted = ", ".join(repr(c) for c in choices[:-1]) + f" or {choices[-1]!r}"
        raise ValueError(f"{function}: expected {name} {wanted}, got {value!r}")


def check_counts(function: str, counts: Any) -> Tensor:
    """Class counts from a tensor, array or sequence, as (C,) float64."""
    try:
        # By way of NumPy: torch's default dtype may be narrow, and its default device "meta".
        tensor = counts if isinstance(counts, Tensor) else torch.as_tensor(np.array(counts), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{function}: expected class_counts as a tensor, array or sequence of numbers, got {type(counts).__name__}"
        ) from None
    if tensor.dim() != 1 or tensor.numel() == 0 or tensor.is_complex():
        raise ValueError(f"{function}: expected class_counts of shape (C,) with C >= 1, got {tuple(tensor.shape)}")
    if tensor.is_meta:
        raise ValueError(f"{function}: expected class_counts with values, got a tensor on the meta device")
    tensor = tensor.detach().to(torch.float64)
    bad = ~torch.isfinite(tensor) | (tensor < 0)
    if bool(bad.any()):
        c = int(bad.nonzero()[0])
        raise ValueError(f"{function}: expected finite class counts >= 0, got {tensor[c].item():g} for class {c}")
    if float(tensor.sum()) == 0:
        raise ValueError(f"{function}: expected at least one non-zero class count, got all zeros")
    return tensor
