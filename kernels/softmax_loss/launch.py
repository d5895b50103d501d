"""``softmax_loss``: launches of its kernels. No call reads a device value on the host."""

from collections import namedtuple
from typing import Any

import torch
import triton
from torch import Tensor

from classfair._schema import Scalars, Tensors, mean_denominator

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

_Forward = namedtuple("_Forward", (*Tensors._fields, *Scalars._fields))
_Backward = namedtuple(
    "_Backward",
    (
        *("grad_loss", "grad_lse", "grad_mass", "grad_hit", "grad_joint", "stats_scale"),
        *(*Tensors._fields, "lse", "lse_raw", "total_weight", *Scalars._fields),
        *("want_offset", "want_margin", "want_pair"),
    ),
)
_Arguments = _Forward | _Backward


def _inputs(a: _Arguments) -> Inputs:
    tensors = {name: getattr(a, name) for name in Tensors._fields}
    tensors["logits"] = view(a.logits)
    tensors["soft_target"] = None if a.soft_target is None else view(a.soft_target)
    classes = a.logits.shape[1]
    return Inputs(**tensors, num_groups=a.num_groups, num_classes=classes, unit=unit(classes))


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


def _soft(x: Inputs, a: _Arguments) -> bool:
    return x.soft_target is not None or a.label_smoothing != 0


def _replicas(num_rows: int, table: int) -> int:
    """Copies of a small table of counts, so that atomics of many rows do not wait for each other."""
    return max(1, min(65536 // (3 * table + 2), num_rows // 256))


def softmax_loss_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    """See ``classfair.ops.softmax_loss`` for arguments and outputs."""
    a = _Forward(*arguments)
    dense, num_classes = a.soft_target is not None, a.logits.shape[1]
    labels = (a.target, a.target_b)
    check_labels("softmax_loss", labels, a.group, num_classes, a.num_groups, a.ignore_index, dense)
    with torch.cuda.device_of(a.logits):
        return _forward(_inputs(a), a)


def _new_outputs(x: Inputs, a: _Arguments, programs: int, perturbed: bool) -> Outputs:
    rows, acc = _num_rows(x), acc_dtype(x.logits.data)
    new = x.logits.data.new_empty
    loss, lse = new(rows, dtype=acc), new(rows, dtype=torch.float64)
    weight_parts, loss_parts = new((programs, 1), dtype=acc), new((programs, 1), dtype=acc)
    if not a.stats:
        return Outputs(loss, lse, weight_parts, loss_parts, None, None, None, None, None)
    table = a.num_groups * x.num_classes
    lse_raw = new(rows, dtype=torch.float64) if perturbed else None
    counts = loss.new_zeros((_replicas(rows, table), 3 * table + 2), dtype=torch.int64)
    cell = None if x.cell is None else new(rows, dtype=torch.int32)
    prediction, group = new(rows, dtype=torch.int64), new(rows, dtype=torch.int32)
    return Outputs(loss, lse, weight_parts, loss_parts, lse_raw, prediction, counts, group, cell)


def _forward(x: Inputs, a: _Arguments) -> tuple[Tensor, ...]:
    tile, rows = _row_tile(x.logits.data), _num_rows(x)
    perturbed = any(t is not None for t in (x.offset, x.margin, x.pair))
    programs = triton.cdiv(rows, tile["BLOCK_N"])
    out = _new_outputs(x, a, programs, perturbed)
    _softmax_loss_fwd_kernel[(programs,)](
        x,
        out,
        rows,
        a.num_cells,
        _pair_rows(x),
        1 if out.counts is None else out.counts.shape[0],
        a.ignore_index,
        a.label_smoothing,
        a.gamma,
        STATS=a.stats != 0,
        PERTURBED=perturbed,
        SOFT=_soft(x, a),
        FOCAL=a.gamma != 0,
        **tile,
    )
    total_weight, reduced = sum_splits(out.weight_parts).view(()), sum_splits(out.loss_parts).view(())
    if a.mean:
        reduced = reduced / mean_denominator(total_weight, a.label_smoothing)
    new = out.loss.new_empty
    lse_raw = new(0, dtype=torch.float64) if out.lse_raw is None else out.lse_raw
    mass, hit, joint = new(0, 0), new(0, 0), new(0, 0)
    if not a.stats:
        none, nothing = new(0, dtype=torch.int64), new(0, dtype=torch.int64)
        return out.loss, out.lse, lse_raw, none, mass, hit, joint, nothing, total_weight, reduced
    lse = out.lse if out.lse_raw is None else out.lse_raw
    mass, hit = _probability_sums(x, a, lse, cut_rows(out.group, a.num_groups), with_hit=True)
    if out.cell is not None:
        joint, _ = _probability_sums(x, a, lse, cut_keys(out.cell, a.num_cells), with_hit=False)
    counts = sum_splits(out.counts)
    return out.loss, out.lse, lse_raw, out.prediction, mass, hit, joint, counts, total_weight, reduced


def _probability_sums(
    x: Inputs, a: _Arguments, lse: Tensor, cut: Cut, *, with_hit: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of p (keys, C) over the rows of each key and, with_hit, of p at the rows' labels."""
    logits = x.logits.data
    mass = logits.new_empty((cut.splits, cut.keys, x.num_classes), dtype=acc_dtype(logits))
    hit = torch.empty_like(mass) if with_hit else None
    tile = _column_tile(logits, cut)
    grid = (cut.splits * cut.keys, triton.cdiv(x.num_classes, tile["BLOCK_C"]))
    _probability_sums_kernel[grid](x, lse, mass, hit, *cut, lse.shape[0], a.ignore_index, **tile)
    return sum_splits(mass), None if hit is None else sum_splits(hit)


def softmax_loss_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of logits, offset, margin and pair; the last three have size 0 unless wanted."""
    a = _Backward(*arguments)
    x, logits = _inputs(a), a.logits
    offset = margin = pair = None
    with torch.cuda.device_of(logits):
        row = _new_row_gradients(x) if a.want_offset or a.want_margin or a.want_pair else None
        grad = _backward(x, a, row)
        if a.want_offset or a.want_margin:
            cut = cut_rows(row.active, 1)
            offset, margin = _gradient_sums(x, a, row, cut, a.want_offset, a.want_margin)
        if a.want_pair:
            cut = cut_keys(row.slot, _pair_rows(x))
            pair, _ = _gradient_sums(x, a, row, cut, True, False)
    new, acc = logits.new_empty, acc_dtype(logits)
    offset = new(0, dtype=acc) if offset is None else offset.view(-1)
    margin = new(0, dtype=acc) if margin is None else margin.view(-1)
    return grad, offset, margin, new((0, 0), dtype=acc) if pair is None else pair


def _upstream(a: _Arguments) -> Upstream:
    loss = a.grad_loss
    if loss is not None and a.mean:
        loss = loss / mean_denominator(a.total_weight, a.label_smoothing)
    stride = 0 if loss is None or loss.dim() == 0 else loss.stride(0)
    joint = None if a.cell is None else a.grad_joint  # size 0 without cells
    return Upstream(loss, a.grad_lse, a.grad_mass, a.grad_hit, joint, a.stats_scale, stride)


def _new_row_gradients(x: Inputs) -> RowGradients:
    rows, logits = _num_rows(x), x.logits.data
    floats = (logits.new_empty(rows, dtype=acc_dtype(logits)) for _ in range(5))
    integers = (logits.new_empty(rows, dtype=torch.int32) for _ in range(4))
    return RowGradients(*floats, *integers)


def _backward(x: Inputs, a: _Arguments, row: RowGradients | None) -> Tensor:
    """Gradient of the logits; fills row."""
    up, lse_raw = _upstream(a), a.lse_raw if a.lse_raw.numel() else a.lse
    logits, rows = x.logits.data, _num_rows(x)
    grad, tile = torch.empty_like(logits), _row_tile(logits)
    _softmax_loss_bwd_kernel[(triton.cdiv(rows, tile["BLOCK_N"]),)](
        x,
        up,
        row,
        view(grad),
        a.lse,
        lse_raw,
        rows,
        a.num_cells,
        _pair_rows(x),
        a.ignore_index,
        a.label_smoothing,
        a.gamma,
        STATS=any(g is not None for g in (up.mass, up.hit, up.joint)),
        SOFT=_soft(x, a),
        FOCAL=a.gamma != 0,
        **tile,
    )
    return grad


def _gradient_sums(
    x: Inputs, a: _Arguments, row: RowGradients, cut: Cut, total: bool, margin: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of the perturbed logits' gradient (keys, C) over the rows of each key, and of the margins'."""
    logits = x.logits.data
    partial = logits.new_empty((cut.splits, cut.keys, x.num_classes), dtype=acc_dtype(logits))
    totals = partial if total else None
    margins = torch.empty_like(partial) if margin else None
    tile = _column_tile(logits, cut)
    grid = (cut.splits * cut.keys, triton.cdiv(x.num_classes, tile["BLOCK_C"]))
    _gradient_sums_kernel[grid](
        x, a.lse, row, totals, margins, *cut, a.lse.shape[0], a.label_smoothing, SOFT=_soft(x, a), **tile
    )
    return tuple(None if t is None else sum_splits(t) for t in (totals, margins))
