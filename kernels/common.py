"""What the kernels of several primitives share: types of sums, divisors that the compiler is told, and labels."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


def unit(size: int) -> tl.constexpr:
    """Divisor that the compiler is told. It notices 16 itself; 1000 classes would be read two bytes at a time."""
    return tl.constexpr(math.gcd(16, size))


def acc_dtype(values: Tensor) -> torch.dtype:
    """Type of sums: float32, or float64 for float64."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def acc_type(values: Tensor) -> tl.dtype:
    return tl.float64 if values.dtype == torch.float64 else tl.float32


@triton.jit
def hard_label(labels, rows, present, num_classes, ignore_index):
    """Label of each row, -1 where it is none; whether it is ignored; whether it is out of range."""
    # Compared at full 64-bit width: 2^32 + 3 is not class 3.
    y = tl.load(labels + rows, mask=present, other=0)
    ignored = y == ignore_index
    invalid = (y != ignore_index) & ((y < 0) | (y >= num_classes))
    return tl.where(ignored | invalid, -1, y), ignored, invalid


def check_labels(
    primitive: str,
    targets: tuple[Tensor | None, ...],  # (R,) each
    group: Tensor | None,  # (R,)
    num_classes: int,
    num_groups: int,
    ignore_index: int,
    dense: bool = False,
) -> None:
    """IndexError for a label or group out of range on the CPU, where Triton interprets. A GPU flags the row instead,
    because looking would stall it. The group of a row whose targets are all ignored is not looked at,
    unless dense targets keep the row in the loss."""
    given = [t for t in targets if t is not None]
    if any(t.device.type != "cpu" for t in (*given, group) if t is not None):
        return
    for target in given:
        outside = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
        _raise_if_any(primitive, outside, target, f"label in [0, {num_classes}) or ignore_index {ignore_index}")
    if group is not None:
        outside = (group < -1) | (group >= num_groups)
        if given and not dense:
            outside &= ~torch.stack([t == ignore_index for t in given]).all(0)
        _raise_if_any(primitive, outside, group, f"group in [0, {num_groups}) or -1")


def _raise_if_any(primitive: str, outside: Tensor, values: Tensor, expected: str) -> None:
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise IndexError(f"{primitive}: expected {expected}, got {int(values[row])} at row {row}")
