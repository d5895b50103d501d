"""Sums over rows in a fixed order, without float atomics: partial sums of row pieces, then one sum over pieces.

How rows are cut depends on sizes only, never on the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Pieces(NamedTuple):
    """The rows that each of splits * keys programs sums."""

    key: Tensor | None  # (R,) int32 key of each row, -1 for none; rows in their order are filtered by it
    order: Tensor | None  # (R,) int64 rows sorted by key
    start: Tensor | None  # (keys + 1,) int64: key k owns order[start[k]:start[k + 1]]


class Cut(NamedTuple):
    pieces: Pieces
    keys: int
    splits: int
    rows_per_split: int  # of rows in their order


def cut_rows(key: Tensor, keys: int) -> Cut:
    """For few keys: rows stay in their order, and a program skips those of other keys."""
    rows_per_split = max(64, 8 * keys, triton.cdiv(key.shape[0], 1024))
    splits = max(1, triton.cdiv(key.shape[0], rows_per_split))
    return Cut(Pieces(key, None, None), keys, splits, rows_per_split)


def cut_keys(key: Tensor, keys: int) -> Cut:
    """For many keys: rows are sorted by key, and the rows of one key are split where keys have many."""
    ordered, order = torch.sort(torch.where(key < 0, keys, key), stable=True)
    bounds = torch.arange(keys + 1, device=key.device, dtype=ordered.dtype)
    splits = min(1024, max(1, key.shape[0] // (64 * max(1, keys))))
    return Cut(Pieces(None, order, torch.searchsorted(ordered, bounds)), keys, splits, 0)


@triton.jit
def piece_span(pieces, keys, splits, rows_per_split, num_rows):
    """Number of this program's piece, its key, and begin and end of the positions that it sums."""
    piece = tl.program_id(0).to(tl.int64)
    key = piece % keys
    split = piece // keys
    if pieces.order is None:
        begin = split * rows_per_split
        end = tl.minimum(begin + rows_per_split, num_rows)
    else:
        first = tl.load(pieces.start + key)
        last = tl.load(pieces.start + key + 1)
        size = (last - first + splits - 1) // splits
        begin = first + split * size
        end = tl.minimum(begin + size, last)
    return piece, key, begin, end


@triton.jit
def piece_rows(pieces, key, positions, end):
    """Rows (N,) at these positions, and which of them count."""
    present = positions < end
    if pieces.order is None:
        return positions, present & (tl.load(pieces.key + positions, mask=present, other=-1) == key)
    else:
        return tl.load(pieces.order + positions, mask=present, other=0), present


@triton.jit(do_not_specialize=["splits", "size"])
def _sum_splits_kernel(partial, out, splits, size, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """One program owns BLOCK columns of out (size,): reads those of partial (splits, size), top to bottom."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for first in range(0, splits, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (k < splits)[:, None] & (columns < size)[None, :]
        pointers = partial + k.to(tl.int64)[:, None] * size + columns[None, :]
        total += tl.sum(tl.load(pointers, mask=inside, other=0), 0)
    tl.store(out + columns, total, mask=columns < size)


def sum_splits(partial: Tensor) -> Tensor:
    """(splits, ...) -> (...), summed in order."""
    if partial.shape[0] == 1:
        return partial[0]
    out = partial.new_empty(partial.shape[1:])
    size = out.numel()
    block = min(128, triton.next_power_of_2(max(1, size)))  # constant per table, whatever the batch
    _sum_splits_kernel[(triton.cdiv(size, block),)](
        partial, out, partial.shape[0], size, BLOCK_K=2048 // block, BLOCK=block, enable_fp_fusion=True
    )
    return out
