"""Tiles of weights and diagonals, and the size of launches."""

import triton
import triton.language as tl
from torch import Tensor

from ..common import acc_type

_THRESHOLD = tl.constexpr(1e-12)  # as in classfair.reference.pair_terms
SLOTS, CLASSES, FEATURES = 8, 32, 16  # 4096 differences at a time
_COLUMNS = 1024
INTEGERS = ["num_classes", "num_features", "num_rows"]


@triton.jit
def slot_rows(tensor, label, rows, used, columns, num_features, ACC: tl.constexpr):
    """(K, D') numbers of the rows of `tensor` that belong to slots `rows`, 0 outside."""
    present = rows < used
    own = tl.load(label + rows, mask=present, other=0)
    inside = present[:, None] & (columns < num_features)[None, :]
    return tl.load(tensor + own[:, None] * num_features + columns[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def class_rows(tensor, classes, num_classes, columns, num_features, ACC: tl.constexpr):
    """(C', D') numbers of rows of `tensor`, 0 outside."""
    inside = (classes < num_classes)[:, None] & (columns < num_features)[None, :]
    at = tensor + classes.to(tl.int64)[:, None] * num_features + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(ACC)


@triton.jit
def threshold(square, row, num_classes, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Below or at which the squares of one row count as 0."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, num_classes, BLOCK):
        classes = first + tl.arange(0, BLOCK)
        total += tl.load(square + row * num_classes + classes, mask=classes < num_classes, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0) / num_classes
    return (tl.where(mean > 1.0, mean, 1.0) * _THRESHOLD).to(ACC)


def launch(weight: Tensor) -> dict:
    sizes = {"BLOCK_M": SLOTS, "BLOCK_C": CLASSES, "BLOCK_D": FEATURES}
    return {**sizes, "ACC": acc_type(weight), "enable_fp_fusion": True}


def row_launch(weight: Tensor) -> dict:
    return {"BLOCK": _COLUMNS, "ACC": acc_type(weight), "enable_fp_fusion": True}
