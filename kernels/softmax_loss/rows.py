"""Samples: what kernels are given, how rows and classes are addressed, and what the labels of a row mean."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import hard_label, unit


class View(NamedTuple):
    """(N, C) or (N, C, L) memory as rows n * L + l of C classes."""

    data: Tensor
    length: int  # L, 1 for (N, C)
    stride_n: int
    stride_c: int
    stride_l: int
    unit: tl.constexpr  # divides stride_n


class Inputs(NamedTuple):
    """Tensors of softmax_loss by the names of its schema. An absent one is None and compiled out."""

    logits: View  # R rows
    offset: Tensor | None  # (C,)
    margin: Tensor | None  # (C,)
    pair: Tensor | None  # (M, C)
    target: Tensor | None  # (R,)
    target_b: Tensor | None  # (R,)
    mix: Tensor | None  # (R,)
    soft_target: View | None  # R rows
    slot: Tensor | None  # (R,)
    weight: Tensor | None  # (C,)
    sample_weight: Tensor | None  # (R,)
    group: Tensor | None  # (R,)
    cell: Tensor | None  # (R,)
    num_groups: int
    num_classes: int
    unit: tl.constexpr  # divides num_classes


def view(tensor: Tensor) -> View:
    """Rows of (N, C) or (N, C, L)."""
    length, stride_l = (1, 0) if tensor.dim() == 2 else (tensor.shape[2], tensor.stride(2))
    stride_n, stride_c = tensor.stride()[:2]
    return View(tensor, length, stride_n, stride_c, stride_l, unit(stride_n))


@triton.jit
def row_start(view, rows):
    """Addresses of class 0 of rows (N,)."""
    stride_n = view.stride_n // view.unit * view.unit
    return view.data + rows // view.length * stride_n + rows % view.length * view.stride_l


@triton.jit
def classes(x):
    """Number of classes, as a multiple of what divides it."""
    return x.num_classes // x.unit * x.unit


@triton.jit
def load_tile(view, start, columns, inside, OTHER: tl.constexpr, ACC: tl.constexpr):
    """(N, C') values of the rows at `start`, OTHER outside."""
    pointers = start[:, None] + columns.to(tl.int64)[None, :] * view.stride_c
    return tl.load(pointers, mask=inside, other=OTHER).to(ACC)


@triton.jit
def hard_labels(x, rows, present, ignore_index, ACC: tl.constexpr):
    """Both labels with their shares (-1 and 0 where absent), the label of the statistics, ignored, invalid."""
    a = tl.full(rows.shape, -1, tl.int64)
    b = a
    share_a = tl.zeros(rows.shape, ACC)
    share_b = share_a
    ignored = rows < 0
    invalid = ignored
    share = tl.full(rows.shape, 1.0, ACC)
    if x.mix is not None:
        share = tl.load(x.mix + rows, mask=present, other=0.0)
    if x.target is not None:
        a, ignored, invalid = hard_label(x.target, rows, present, x.num_classes, ignore_index)
        share_a = tl.where(a >= 0, share, 0.0)
    label = a
    if x.target_b is not None:
        b, ignored_b, bad_b = hard_label(x.target_b, rows, present, x.num_classes, ignore_index)
        share_b = tl.where(b >= 0, 1.0 - share, 0.0)
        label = tl.where(share >= 0.5, a, b)
        ignored = ignored & ignored_b
        invalid = invalid | bad_b
    if x.soft_target is not None:  # the label then serves the statistics only
        ignored = rows < 0
    return a, share_a, b, share_b, label, ignored, invalid


@triton.jit
def resolve(x, rows, present, ignore_index, ACC: tl.constexpr):
    """Labels and shares of hard_labels, group, which rows are in the loss, which are invalid."""
    a, share_a, b, share_b, label, ignored, invalid = hard_labels(x, rows, present, ignore_index, ACC)
    group = tl.zeros(rows.shape, tl.int64)
    if x.group is not None:
        group = tl.load(x.group + rows, mask=present, other=0)
        bad_group = (group < -1) | (group >= x.num_groups)
        invalid = invalid | (bad_group & (ignored == 0))
    valid = present & (ignored == 0) & (invalid == 0)
    return a, share_a, b, share_b, label, group, valid, present & invalid


@triton.jit
def pair_slot(x, rows, valid, label, pair_rows):
    """Row of `pair` that each sample takes, -1 for none."""
    slot = label
    if x.slot is not None:
        slot = tl.load(x.slot + rows, mask=valid, other=-1)
    return tl.where(valid & (slot >= 0) & (slot < pair_rows), slot, -1)


@triton.jit
def joint_cell(x, rows, counted, num_cells):
    """Row of `joint` that each sample counts in, -1 for none."""
    cell = tl.load(x.cell + rows, mask=counted, other=-1)
    return tl.where((cell >= 0) & (cell < num_cells), cell, -1)


@triton.jit
def class_weight(x, y, ACC: tl.constexpr):
    """Weight of class y (N,): 1 without weights, 0 where y is -1."""
    if x.weight is None:
        return tl.where(y >= 0, 1.0, 0.0).to(ACC)
    else:
        return tl.load(x.weight + y, mask=y >= 0, other=0.0)


@triton.jit
def own_margin(x, label, share, ACC: tl.constexpr):
    """Margin of each sample's first label (N,), 0 for none."""
    if x.margin is None:
        return tl.zeros(label.shape, ACC)
    else:
        return tl.load(x.margin + label, mask=share > 0.0, other=0.0)


@triton.jit
def perturb(x, z, columns, inside, slot, label, margin):
    """z + offset + pair row - margin at the label, (N, C')."""
    if x.offset is not None:
        z += tl.load(x.offset + columns, mask=columns < classes(x), other=0.0)[None, :]
    if x.pair is not None:
        pointers = x.pair + slot[:, None] * classes(x) + columns[None, :]
        z += tl.load(pointers, mask=inside & (slot >= 0)[:, None], other=0.0)
    if x.margin is not None:
        z = tl.where(columns[None, :] == label[:, None], z - margin[:, None], z)
    return z


@triton.jit
def logit_at(x, start, valid, y, slot, ACC: tl.constexpr):
    """Perturbed logit of class y (N,), without the margin; 0 where y is -1."""
    has = valid & (y >= 0)
    z = tl.load(start + y * x.logits.stride_c, mask=has, other=0.0).to(ACC)
    if x.offset is not None:
        z += tl.load(x.offset + y, mask=has, other=0.0)
    if x.pair is not None:
        z += tl.load(x.pair + slot * x.num_classes + y, mask=has & (slot >= 0), other=0.0)
    return z


@triton.jit
def soft_targets(x, rows, columns, inside, smoothing, ACC: tl.constexpr):
    """Weighted dense targets (N, C'), or the smoothing that hard ones share (1, C'); 0 outside."""
    within = columns < classes(x)
    if x.weight is None:
        weight = tl.where(within, 1.0, 0.0).to(ACC)
    else:
        weight = tl.load(x.weight + columns, mask=within, other=0.0)
    t = (weight * (smoothing / x.num_classes))[None, :]
    if x.soft_target is not None:
        start = row_start(x.soft_target, rows)
        soft = load_tile(x.soft_target, start, columns, inside, 0.0, ACC)
        t = tl.where(inside, weight[None, :] * ((1.0 - smoothing) * soft) + t, 0.0)
    return t
