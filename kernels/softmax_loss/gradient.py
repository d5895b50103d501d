"""The gradient of one row's logits, on blocks: its part from loss and lse, and its part from the statistics."""

import triton
import triton.language as tl

from .rows import (
    class_weight,
    classes,
    joint_cell,
    logit_at,
    own_margin,
    perturb,
    soft_targets,
)
from .terms import expm1, focal_slope, two_parts


@triton.jit
def hard_slope(x, y, share, log_p, keep, gamma, FOCAL: tl.constexpr, ACC: tl.constexpr):
    """d loss / d nll of a hard label: share * (1 - e) * w_y * focal slope (N,)."""
    t = share * keep * class_weight(x, y, ACC)
    if FOCAL:
        t *= focal_slope(-log_p, gamma)
    return tl.where(share > 0.0, t, 0.0)


@triton.jit
def gradient_at(log_p, own, rest, soft, upstream, upstream_lse):
    """Gradient at a label's column (N,), p - 1 formed without cancellation: `own` is its slope, `rest` that of
    the other targets, `soft` its soft target."""
    total = own + rest
    return upstream * (total * expm1(log_p) + rest - soft) + upstream_lse * tl.exp(log_p)


@triton.jit
def hard_gradients(
    x,
    start,
    active,
    labels,
    slot,
    lse_parts,
    soft,
    upstreams,
    smoothing,
    gamma,
    FOCAL: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum of the hard labels' slopes, and the gradient at each label's column; all (N,)."""
    a, share_a, b, share_b = labels
    high, low = lse_parts
    upstream, upstream_lse = upstreams
    margin = own_margin(x, a, share_a, ACC)
    log_a = (logit_at(x, start, active, a, slot, ACC) - margin - high) - low
    t_a = hard_slope(x, a, share_a, log_a, 1.0 - smoothing, gamma, FOCAL, ACC)
    spread = (share_a + share_b) * (smoothing / x.num_classes)
    soft_a = spread * class_weight(x, a, ACC)
    if x.target_b is None:
        at_a = gradient_at(log_a, t_a, soft, soft_a, upstream, upstream_lse)
        return t_a, at_a, at_a
    else:
        log_b = (logit_at(x, start, active, b, slot, ACC) - high) - low
        t_b = hard_slope(x, b, share_b, log_b, 1.0 - smoothing, gamma, FOCAL, ACC)
        soft_b = spread * class_weight(x, b, ACC)
        both = t_a + t_b
        own_a, rest_a = tl.where(a == b, both, t_a), tl.where(a == b, 0.0, t_b)
        own_b, rest_b = tl.where(a == b, both, t_b), tl.where(a == b, 0.0, t_a)
        at_a = gradient_at(log_a, own_a, rest_a + soft, soft_a, upstream, upstream_lse)
        at_b = gradient_at(log_b, own_b, rest_b + soft, soft_b, upstream, upstream_lse)
        return both, at_a, at_b


@triton.jit
def loss_gradient(x, z, rows, columns, inside, slot, high, low, row, smoothing, SOFT: tl.constexpr, ACC: tl.constexpr):
    """Gradient of the perturbed logits (N, C') from loss and lse."""
    scale, soft_scale, a, at_a, b, at_b = row
    z = perturb(x, z, columns, inside, slot, a, tl.zeros(rows.shape, ACC))
    gradient = scale[:, None] * tl.exp((z - high[:, None]) - low[:, None])
    if SOFT:
        t = soft_targets(x, rows, columns, inside, smoothing, ACC)
        gradient -= soft_scale[:, None] * t
    if x.soft_target is None:
        gradient = tl.where(columns[None, :] == a[:, None], at_a[:, None], gradient)
        if x.target_b is not None:
            gradient = tl.where(columns[None, :] == b[:, None], at_b[:, None], gradient)
    return gradient


@triton.jit
def statistics_row(x, up, rows, active, a, share_a, b, share_b, label, group, num_cells, lse_raw, ACC: tl.constexpr):
    """What statistic_gradient needs of each row."""
    lse = tl.load(lse_raw + rows, mask=active, other=0.0)
    counted = active & (label >= 0) & (group >= 0) & (tl.abs(lse) < float("inf"))
    high, low = two_parts(tl.where(counted, lse, 0.0), ACC)
    cell = group
    if up.joint is not None:
        cell = joint_cell(x, rows, counted, num_cells)
    extra_a = tl.zeros(rows.shape, ACC)
    extra_b = extra_a
    if up.hit is not None:
        at = up.hit + group * x.num_classes
        extra_a = share_a * tl.load(at + a, mask=counted & (a >= 0), other=0.0)
        extra_b = share_b * tl.load(at + b, mask=counted & (b >= 0), other=0.0)
    return counted, high, low, group, cell, a, extra_a, b, extra_b


@triton.jit
def statistic_gradient(x, up, z, columns, row):
    """Probabilities, 0 in rows of no statistic, and the gradient that reaches them; both (N, C')."""
    counted, high, low, group, cell, a, extra_a, b, extra_b = row
    inside = counted[:, None] & (columns < classes(x))[None, :]
    p = tl.where(inside, tl.exp((z - high[:, None]) - low[:, None]), 0.0)
    r = tl.zeros_like(z)
    if up.mass is not None:
        at = up.mass + group[:, None] * classes(x) + columns[None, :]
        r += tl.load(at, mask=inside, other=0.0)
    if up.joint is not None:
        at = up.joint + cell[:, None] * classes(x) + columns[None, :]
        r += tl.load(at, mask=inside & (cell >= 0)[:, None], other=0.0)
    if up.hit is not None:
        r += tl.where(columns[None, :] == a[:, None], extra_a[:, None], 0.0)
        if x.target_b is not None:
            r += tl.where(columns[None, :] == b[:, None], extra_b[:, None], 0.0)
    return p, r
