"""Checks of public arguments, raised before any kernel: ``function: expected X, got Y``."""

import math
import operator
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Dtypes of labels, as torch's cross_entropy takes them. Kernels are given int64.
LABELS = (torch.int64, torch.uint8)

REDUCTIONS = ("none", "mean", "sum")

#: Of the focal term: beyond, (1 - p)^gamma has hardly a digit in float32.
MAX_GAMMA = 1000.0

#: Most keys (class and group) of a table, so that no size of one overflows.
MAX_KEYS = 1 << 60


def acc_dtype(logits: Tensor) -> torch.dtype:
    """Dtype of sums and statistics: float32, or float64 for float64 inputs."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor of torch, whose module takes a second to import; who has one has imported it."""
    if type(value) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_logits(function: str, logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{function}: expected logits as a tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOATS:
        raise TypeError(
            f"{function}: expected logits of dtype float16, bfloat16, float32 or float64, got {logits.dtype}"
        )
    check_dense(function, "logits", logits)
    if logits.dim() == 0 or logits.shape[min(1, logits.dim() - 1)] == 0:
        raise ValueError(
            f"{function}: expected logits of shape (C,), (N, C) or (N, C, d1, ...) with C >= 1,"
            f" got {tuple(logits.shape)}"
        )


def check_dense(function: str, name: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{function}: expected dense (strided) {name}, got {got}")


def check_labels_tensor(
    function: str, name: str, labels: Any, shape: Sequence[int] | None, dtypes: Sequence[torch.dtype] = LABELS[:1]
) -> None:
    """``shape`` None: any vector."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{function}: expected {name} as a tensor, got {type(labels).__name__}")
    if labels.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"{function}: expected {name} of dtype {wanted}, got {labels.dtype}")
    check_dense(function, name, labels)
    if shape is None:
        if labels.dim() != 1:
            raise ValueError(f"{function}: expected {name} of shape (N,), got {tuple(labels.shape)}")
        return
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{function}: expected {name} of shape {tuple(shape)}, got {tuple(labels.shape)}")


def flat_labels(function: str, name: str, labels: Any, shape: Sequence[int]) -> Tensor:
    """Checked labels as (R,) int64, contiguous; without an operator where they are so already."""
    check_labels_tensor(function, name, labels, shape, LABELS)
    if labels.dtype is not torch.int64:
        labels = labels.long()
    return labels if labels.dim() == 1 and labels.is_contiguous() else labels.reshape(-1).contiguous()


def check_floats(function: str, name: str, value: Any, shape: Sequence[int]) -> None:
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: expected {name} as a floating tensor, got {got}")
    check_dense(function, name, value)
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
    check_dense(function, name, value)
    if value.dim() != 2 or value.shape[0] == 0:
        raise ValueError(f"{function}: expected {name} of shape (C, D) with C >= 1, got {tuple(value.shape)}")


def check_range(function: str, name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        wanted = f"in [{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
        if -low == high == math.inf:
            wanted = "that is no NaN"
        raise ValueError(f"{function}: expected {name} {wanted}, got {value}")


def check_real(function: str, name: str, value: Any) -> None:
    if type(value) is not float and not isinstance(value, Real):  # the second question takes microseconds
        raise TypeError(f"{function}: expected {name} as a number, got {type(value).__name__}")


def check_number(function: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """A finite number in [low, high]."""
    check_real(function, name, value)
    number = _as_float(value)
    check_range(function, name, number, low, high)
    if math.isinf(number):
        raise ValueError(f"{function}: expected finite {name}, got {number}")


def check_count(function: str, name: str, value: Any, low: int = 1) -> None:
    """A whole number, as a size is; a bool is none."""
    check_range(function, name, integer(function, name, value), low)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def scalar(function: str, name: str, value: Any, low: float, high: float) -> float:
    """A number as a float; as torch's functions, from a 0-d tensor too, which nobody has to wait for."""
    if isinstance(value, Tensor) and not (value.is_nested or value.requires_grad or value.is_complex()):
        value = value.item() if value.dim() == 0 and value.device.type == "cpu" else value
    check_number(function, name, value, low, high)
    return float(value)


def integer(function: str, name: str, value: Any) -> int:
    """An int64 from what Python takes for an index, but for a bool: an int, a NumPy integer, a 0-d tensor of one."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        try:
            value = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
        except TypeError:
            got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{function}: expected {name} as an int, got {got}") from None
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{function}: expected {name} that fits in 64 bits, got {value}")
    return value


def check_keys(function: str, num_classes: int, num_groups: int) -> None:
    """Both are sizes, and so is the number of pairs of them."""
    for name, value in (("num_classes", num_classes), ("num_groups", num_groups)):
        if integer(function, name, value) < 1:
            raise ValueError(f"{function}: expected {name} >= 1, got {value}")
    if num_classes * num_groups > MAX_KEYS:
        raise ValueError(
            f"{function}: expected at most 2^60 pairs of class and group, got {num_classes} * {num_groups}"
        )


def check_size(function: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}: expected {name} as an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{function}: expected {name} >= 1, got {value}")


def check_flag(function: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: expected {name} as a bool, got {type(value).__name__}")


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
