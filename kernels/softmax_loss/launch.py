"""``softmax_loss``: launches of its kernels. No call reads a device value on the host."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common import acc_dtype, acc_type, check_labels, unit
from .backward import (
    RowGradients,
    Upstream,
    _gradient_sums_kernel,
    _softmax_loss_bwd_kernel,
)
from .forward import (
    Outputs,
    _probability_sums_kernel,
    _softmax_loss_fwd_kernel,
)
from .rows import Inputs, view
from .sums import Cut, cut_keys, cut_rows, sum_splits

_NUM_TENSORS = 12


class Scalars(NamedTuple):
    """The schema's scalars, in its order."""

    num_groups: int
    num_cells: int
    num_classes: int
    class_start: int
    ignore_index: int
    label_smoothing: float
    gamma: float
    stats: int


def _inputs(tensors: tuple[Any, ...], s: Scalars) -> Inputs:
    logits, soft = tensors[0], tensors[7]
    if s.class_start != 0 or s.num_classes != logits.shape[1]:
        raise RuntimeError("softmax_loss: class shards are not supported yet")
    soft_view = None if soft is None else view(soft)
    middle, rest = tensors[1:7], tensors[8:]
    return Inputs(view(logits), *middle, soft_view, *rest, s.num_classes, unit(s.num_classes), s.num_groups)


def _num_rows(x: Inputs) -> int:
    return x.logits.data.shape[0] * x.logits.length


def _pair_rows(x: Inputs) -> int:
    return 0 if x.pair is None else x.pair.shape[0]


def _row_tile(logits: Tensor) -> dict[str, Any]:
    """Tile of the row kernels, by the number of classes alone. Which thread holds which column, and so the order of a
    sum, is Triton's choice by strides and alignment."""
    if logits.dim() == 3:  # neighbours in memory are rows
        block_n, block_c = 32, min(16, triton.next_power_of_2(logits.shape[1]))
    else:
        block_c = min(4096, triton.next_power_of_2(logits.shape[1]))
        block_n = min(128, max(1, 512 // block_c))
    warps = 8 if block_c == 4096 else 4
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": warps, **_common(logits)}


def _column_tile(logits: Tensor, cut: Cut) -> dict[str, Any]:
    """Tile of the column kernels: wide where rows are sorted, because most keys have few."""
    whole, narrow = triton.next_power_of_2(logits.shape[1]), 128 if cut.pieces.order is None else 512
    block_c = min(whole, max(narrow, min(1024, whole // 8)) if logits.dim() == 2 else 16)
    return {"BLOCK_N": min(512, 2048 // block_c), "BLOCK_C": block_c, **_common(logits)}


def _common(logits: Tensor) -> dict[str, Any]:
    # Whether Triton fuses multiply and add by default depends on its version.
    return {"ACC": acc_type(logits), "enable_fp_fusion": True}


def _soft(x: Inputs, s: Scalars) -> bool:
    return x.soft_target is not None or s.label_smoothing != 0


def _replicas(num_rows: int, table: int) -> int:
    """Copies of a small table of counts, so that atomics of many rows do not wait for each other."""
    return max(1, min(65536 // (3 * table + 2), num_rows // 256))


def softmax_loss_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    """See ``classfair.ops.softmax_loss`` for arguments and outputs."""
    tensors, (lse_in, lse_raw_in) = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:][:2]
    s = Scalars(*arguments[_NUM_TENSORS + 2 :])
    x = _inputs(tensors, s)
    if lse_in is not None or lse_raw_in is not None:
        raise RuntimeError("softmax_loss: class shards are not supported yet")
    dense = x.soft_target is not None
    check_labels("softmax_loss", (x.target, x.target_b), x.group, s.num_classes, s.num_groups, s.ignore_index, dense)
    with torch.cuda.device_of(x.logits.data):
        return _forward(x, s)


def _new_outputs(x: Inputs, s: Scalars, programs: int, perturbed: bool) -> Outputs:
    rows, acc = _num_rows(x), acc_dtype(x.logits.data)
    new = x.logits.data.new_empty
    loss, lse = new(rows, dtype=acc), new(rows, dtype=torch.float64)
    row_weight = new((programs, 1), dtype=acc)
    if not s.stats:
        return Outputs(loss, lse, row_weight, None, None, None, None, None)
    table = s.num_groups * s.num_classes
    lse_raw = new(rows, dtype=torch.float64) if perturbed else None
    counts = loss.new_zeros((_replicas(rows, table), 3 * table + 2), dtype=torch.int64)
    cell = None if x.cell is None else new(rows, dtype=torch.int32)
    prediction, group = new(rows, dtype=torch.int64), new(rows, dtype=torch.int32)
    return Outputs(loss, lse, row_weight, lse_raw, prediction, counts, group, cell)


def _forward(x: Inputs, s: Scalars) -> tuple[Tensor, ...]:
    tile, rows = _row_tile(x.logits.data), _num_rows(x)
    perturbed = any(t is not None for t in (x.offset, x.margin, x.pair))
    programs = triton.cdiv(rows, tile["BLOCK_N"])
    out = _new_outputs(x, s, programs, perturbed)
    _softmax_loss_fwd_kernel[(programs,)](
        x,
        out,
        rows,
        s.num_cells,
        _pair_rows(x),
        1 if out.counts is None else out.counts.shape[0],
        s.ignore_index,
        s.label_smoothing,
        s.gamma,
        STATS=s.stats != 0,
        PERTURBED=perturbed,
        SOFT=_soft(x, s),
        FOCAL=s.gamma != 0,
        **tile,
    )
    total_weight = sum_splits(out.row_weight).view(())
    new = out.loss.new_empty
    lse_raw = new(0, dtype=torch.float64) if out.lse_raw is None else out.lse_raw
    mass, hit, joint = new(0, 0), new(0, 0), new(0, 0)
    if not s.stats:
        none, nothing = new(0, dtype=torch.int64), new(0, dtype=torch.int64)
        return out.loss, out.lse, lse_raw, none, mass, hit, joint, nothing, total_weight
    lse = out.lse if out.lse_raw is None else out.lse_raw
    mass, hit = _probability_sums(x, s, lse, cut_rows(out.group, s.num_groups), with_hit=True)
    if out.cell is not None:
        joint, _ = _probability_sums(x, s, lse, cut_keys(out.cell, s.num_cells), with_hit=False)
    counts = sum_splits(out.counts)
    return out.loss, out.lse, lse_raw, out.prediction, mass, hit, joint, counts, total_weight


def _probability_sums(x: Inputs, s: Scalars, lse: Tensor, cut: Cut, *, with_hit: bool) -> tuple[Tensor, Tensor | None]:
    """Sums of p (keys, C) over the rows of each key and, with_hit, of p at the rows' labels."""
    logits = x.logits.data
    mass = logits.new_empty((cut.splits, cut.keys, s.num_classes), dtype=acc_dtype(logits))
    hit = torch.empty_like(mass) if with_hit else None
    tile = _column_tile(logits, cut)
    grid = (cut.splits * cut.keys, triton.cdiv(s.num_classes, tile["BLOCK_C"]))
    _probability_sums_kernel[grid](x, lse, mass, hit, *cut, lse.shape[0], s.ignore_index, **tile)
    return sum_splits(mass), None if hit is None else sum_splits(hit)


def softmax_loss_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of logits, offset, margin and pair; the last three have size 0 unless wanted."""
    upstream, arguments = arguments[:5], arguments[5:]
    tensors, (lse, lse_raw) = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:][:2]
    *scalars, want_offset, want_margin, want_pair = arguments[_NUM_TENSORS + 2 :]
    s = Scalars(*scalars)
    x, logits = _inputs(tensors, s), tensors[0]
    loss, *middle, joint = upstream
    stride = 0 if loss is None else loss.stride(0)
    up = Upstream(loss, *middle, None if x.cell is None else joint, stride)  # no cell: size 0
    offset = margin = pair = None
    with torch.cuda.device_of(logits):
        row = _new_row_gradients(x) if want_offset or want_margin or want_pair else None
        raw = lse if lse_raw is None or lse_raw.numel() == 0 else lse_raw
        grad = _backward(x, s, up, row, lse, raw)
        if want_offset or want_margin:
            cut = cut_rows(row.active, 1)
            offset, margin = _gradient_sums(x, s, lse, row, cut, want_offset, want_margin)
        if want_pair:
            cut = cut_keys(row.slot, _pair_rows(x))
            pair, _ = _gradient_sums(x, s, lse, row, cut, True, False)
    new, acc = logits.new_empty, acc_dtype(logits)
    offset = new(0, dtype=acc) if offset is None else offset.view(-1)
    margin = new(0, dtype=acc) if margin is None else margin.view(-1)
    return grad, offset, margin, new((0, 0), dtype=acc) if pair is None else pair


def _new_row_gradients(x: Inputs) -> RowGradients:
    rows, logits = _num_rows(x), x.logits.data
    floats = (logits.new_empty(rows, dtype=acc_dtype(logits)) for _ in range(5))
    integers = (logits.new_empty(rows, dtype=torch.int32) for _ in range(4))
    return RowGradients(*floats, *integers)


def _backward(x: Inputs, s: Scalars, up: Upstream, row: RowGradients | None, lse: Tensor, lse_raw: Tensor) -> Tensor:
    """Gradient of the logits; fills row."""
    logits, rows = x.logits.data, _num_rows(x)
    grad, tile = torch.empty_like(logits), _row_tile(logits)
    _softmax_loss_bwd_kernel[(triton.cdiv(rows, tile["BLOCK_N"]),)](
        x,
        up,
        row,
        view(grad),
        lse,
        lse_raw,
        rows,
        s.num_cells,
        _pair_rows(x),
        s.ignore_index,
        s.label_smoothing,
        s.gamma,
        STATS=any(g is not None for g in (up.mass, up.hit, up.joint)),
        SOFT=_soft(x, s),
        FOCAL=s.gamma != 0,
        **tile,
    )
    return grad


def _gradient_sums(
    x: Inputs, s: Scalars, lse: Tensor, row: RowGradients, cut: Cut, total: bool, margin: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of the perturbed logits' gradient (keys, C) over the rows of each key, and of the margins'."""
    logits = x.logits.data
    partial = logits.new_empty((cut.splits, cut.keys, s.num_classes), dtype=acc_dtype(logits))
    totals = partial if total else None
    margins = torch.empty_like(partial) if margin else None
    tile = _column_tile(logits, cut)
    grid = (cut.splits * cut.keys, triton.cdiv(s.num_classes, tile["BLOCK_C"]))
    _gradient_sums_kernel[grid](
        x, lse, row, totals, margins, *cut, lse.shape[0], s.label_smoothing, SOFT=_soft(x, s), **tile
    )
    return tuple(None if t is None else sum_splits(t) for t in (totals, margins))
