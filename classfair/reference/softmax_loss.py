"""``softmax_loss`` and its backward in plain torch."""

import math

import torch
from torch import Tensor

from classfair._schema import Scalars, Tensors, mean_denominator
from classfair.reference.label_index import classify, raise_if_bad


def _rows(tensor: Tensor) -> Tensor:
    """(N, C) or (N, C, L) -> (R, C), row n * L + l."""
    return tensor if tensor.dim() == 2 else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def _log_sum_exp(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row maximum, log-sum-exp above it (both (R,)), and x with all-(-inf) rows replaced by zeros.

    Kept in two parts, because max + log(sum) in float32 loses the digits that small losses need.
    """
    dead = (x == -math.inf).all(1, keepdim=True)
    x = torch.where(dead, 0.0, x)
    top = x.detach().amax(1)
    return top, (x - top[:, None]).exp().sum(1).log(), x


def focal_weight(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma at nll = -log p (Lin et al. 2017, eq. 4); its gradient is 0 at p = 1 and at p = 0."""
    finite = torch.where(nll.isinf(), 1.0, nll)
    miss = torch.where(nll.isinf(), 1.0, -torch.expm1(-finite))
    positive = ~(miss <= 0)
    return torch.where(positive, torch.where(positive, miss, 1.0) ** gamma, 0.0)


class Labels:
    """Hard labels of each row with their shares, which rows are in the loss, and the label of the statistics."""

    def __init__(self, rows: Tensor, t: Tensors, s: Scalars) -> None:  # rows (R, C)
        num_classes, acc = rows.shape[1], rows.dtype
        target, target_b, mix, group, ignore_index = t.target, t.target_b, t.mix, t.group, s.ignore_index
        none = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
        ignored, bad = none, none
        self.labels: list[tuple[Tensor, Tensor]] = []  # (label (R,), share (R,), 0 where absent)
        self.statistic = torch.full(rows.shape[:1], -1, device=rows.device)
        expected = f"label in [0, {num_classes}) or ignore_index {ignore_index}"
        if target is not None:
            share = torch.ones_like(target, dtype=acc) if mix is None else mix.to(acc)
            ignored_a, bad = classify(target, num_classes, ignore_index)
            raise_if_bad("softmax_loss", bad, target, expected)
            absent = ignored_a | bad
            self.labels.append((torch.where(absent, 0, target), torch.where(absent, 0.0, share)))
            self.statistic = torch.where(absent, -1, target)
            ignored = ignored_a
            if target_b is not None:
                ignored_b, bad_b = classify(target_b, num_classes, ignore_index)
                raise_if_bad("softmax_loss", bad_b, target_b, expected)
                absent_b = ignored_b | bad_b
                self.labels.append((torch.where(absent_b, 0, target_b), torch.where(absent_b, 0.0, 1 - share)))
                self.statistic = torch.where(share >= 0.5, self.statistic, torch.where(absent_b, -1, target_b))
                ignored, bad = ignored & ignored_b, bad | bad_b
        if t.soft_target is not None:
            ignored = none
        self.group = torch.zeros_like(self.statistic) if group is None else group
        bad_group = ~ignored & ((self.group < -1) | (self.group >= s.num_groups))
        raise_if_bad("softmax_loss", bad_group, self.group, f"group in [0, {s.num_groups}) or -1")
        self.ignored, self.invalid = ignored, bad | bad_group
        self.valid = ~(self.ignored | self.invalid)  # (R,)


def softmax_loss(t: Tensors, s: Scalars) -> tuple[Tensor, ...]:
    """See :class:`classfair.ops.SoftmaxLoss`; outputs in the order of the operator."""
    acc = torch.float64 if t.logits.dtype == torch.float64 else torch.float32
    raw = _rows(t.logits).to(acc)  # (R, C)
    labels = Labels(raw, t, s)
    valid = labels.valid
    safe = torch.where(valid[:, None], raw, 0.0)  # rows outside the loss must not leak a NaN into a gradient
    x = _perturbed(safe, t, labels)

    top, log_sum, x_safe = _log_sum_exp(x)
    dead = (x == -math.inf).all(1)
    nll = log_sum[:, None] - (x_safe - top[:, None])  # (R, C): -log p'
    loss = _row_loss(nll, labels, t.soft_target, t.weight, s.label_smoothing, s.gamma)
    loss = torch.where(dead, math.inf, loss)
    if t.sample_weight is not None:
        loss = torch.where(t.sample_weight == 0, 0.0, t.sample_weight * loss)
    loss = torch.where(labels.invalid, math.nan, torch.where(labels.ignored, 0.0, loss))
    lse = torch.where(dead, -math.inf, top.double() + log_sum.double())
    lse = torch.where(valid, lse, 0.0)
    total_weight, reduced = _total_weight(raw, labels, t), loss.sum()
    if s.mean:
        reduced = reduced / mean_denominator(total_weight, s.label_smoothing)
    if not s.stats:
        table, none = raw.new_empty(0, 0), raw.new_empty(0, dtype=torch.int64)
        empty = (lse.new_empty(0), none, table, table.clone(), table.clone(), none.clone())
        return loss, lse, *empty, total_weight, reduced

    lse_raw, prediction, mass, hit, joint, counts = _statistics(raw, safe, labels, t, s)
    if not t.perturbed:
        lse_raw = lse.new_empty(0)
    if s.stats == 1:
        mass, hit, joint = mass.detach(), hit.detach(), joint.detach()
    return loss, lse, lse_raw.detach(), prediction, mass, hit, joint, counts, total_weight, reduced


def _perturbed(x: Tensor, t: Tensors, labels: Labels) -> Tensor:
    """Logits (R, C) plus offset and pair row, minus the margin at the label."""
    if t.offset is not None:
        x = x + t.offset
    if t.pair is not None and t.pair.shape[0] == 0:
        x = x + t.pair.sum(0)  # nothing, with a gradient that is not None
    elif t.pair is not None:
        index = labels.labels[0][0] if t.slot is None else t.slot
        exists = labels.statistic >= 0 if t.slot is None else (t.slot >= 0) & (t.slot < t.pair.shape[0])
        has_row = labels.valid & exists
        x = x + torch.where(has_row[:, None], t.pair[torch.where(has_row, index, 0)], 0.0)
    if t.margin is not None:
        y, share = labels.labels[0]
        own = torch.where(share != 0, t.margin[y], 0.0)
        x = x - own[:, None] * torch.nn.functional.one_hot(y, x.shape[1])
    return x


def _row_loss(
    nll: Tensor,  # (R, C)
    labels: Labels,
    soft_target: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    gamma: float,
) -> Tensor:
    num_classes = nll.shape[1]
    w = nll.new_ones(num_classes) if weight is None else weight  # (C,)
    if soft_target is not None:
        t = w * ((1 - label_smoothing) * _rows(soft_target) + label_smoothing / num_classes)
        return torch.where(t == 0, 0.0, t * nll).sum(1)
    loss = torch.zeros_like(nll[:, 0])
    for y, share in labels.labels:
        own = nll.gather(1, y[:, None]).squeeze(1)
        focal = focal_weight(own, gamma) if gamma else 1.0
        term = (1 - label_smoothing) * w[y] * focal * own
        if label_smoothing:
            term = term + label_smoothing / num_classes * (w * nll).sum(1)
        loss = loss + torch.where(share != 0, share * term, 0.0)
    return loss


def _total_weight(raw: Tensor, labels: Labels, t: Tensors) -> Tensor:
    """The denominator of "mean": weights of the hard labels in the loss, or of the dense rows."""
    ones = torch.ones_like(raw[:, 0])
    parts = [(None, ones)] if t.soft_target is not None else labels.labels
    total = torch.zeros((), dtype=torch.float64, device=raw.device)
    for y, share in parts:
        w = share if t.weight is None or y is None else torch.where(share == 0, 0.0, share * t.weight[y])
        if t.sample_weight is not None:
            w = w * t.sample_weight
        total = total + torch.where(labels.valid, w, 0.0).sum(dtype=torch.float64)
    return total.to(raw.dtype)


def _statistics(
    raw: Tensor,  # (R, C)
    safe: Tensor,  # (R, C), zeros in rows outside the loss
    labels: Labels,
    t: Tensors,
    s: Scalars,
) -> tuple[Tensor, ...]:
    num_groups, cell = s.num_groups, t.cell
    num_classes = raw.shape[1]
    top, log_sum, safe = _log_sum_exp(safe)
    dead = (raw == -math.inf).all(1)
    lse = torch.where(dead, -math.inf, top.double() + log_sum.double())
    finite = lse.isfinite()
    y, group = labels.statistic, labels.group
    counted = labels.valid & (y >= 0) & (group >= 0) & finite
    # Rows out of the statistics get finite stand-ins, then weight 0.
    z = torch.where(counted[:, None], safe, 0.0)
    top, log_sum, z = _log_sum_exp(z)
    p = torch.where(counted[:, None], ((z - top[:, None]) - log_sum[:, None]).exp(), 0.0)  # (R, C)
    g = torch.where(counted, group, 0)
    one = counted.long()

    def table(index: Tensor, values: Tensor) -> Tensor:
        flat = torch.zeros(num_groups * num_classes, dtype=values.dtype, device=values.device)
        return flat.index_add(0, g * num_classes + index, values)

    mass = p.new_zeros(num_groups, num_classes).index_add(0, g, p)
    hit = p.new_zeros(num_groups * num_classes)
    own = labels.labels
    if t.soft_target is not None:
        own = [(torch.where(counted, y, 0), torch.ones_like(p[:, 0]))]
    for label, share in own:
        hit = hit + table(label, share * p.gather(1, label[:, None]).squeeze(1))
    joint = p.new_zeros(0, 0)
    if cell is not None:
        in_cell = counted & (cell >= 0) & (cell < s.num_cells)
        index = torch.where(in_cell, cell, s.num_cells)  # a spare row, because there may be no cell at all
        joint = p.new_zeros(s.num_cells + 1, num_classes).index_add(0, index, torch.where(in_cell[:, None], p, 0.0))
        joint = joint[: s.num_cells]
    prediction = raw.argmax(1)
    safe_y = torch.where(counted, y, 0)
    nonfinite = labels.valid & ~finite
    counts = torch.cat(
        [
            table(safe_y, one),
            table(safe_y, one * (prediction == y)),
            table(prediction, one),
            torch.stack([labels.invalid.sum(), nonfinite.sum()]),
        ]
    )
    lse = torch.where(labels.valid, lse, 0.0)
    return lse, prediction, mass, hit.view(num_groups, num_classes), joint, counts


#: Outputs and inputs of the operator that gradients come from and go to, by position.
SOURCES, DIFFERENTIABLE = (0, 1, 4, 5, 6), 4


def softmax_loss_backward(
    upstream: tuple[Tensor | None, ...],  # of loss (R,), lse, mass, hit and joint
    t: Tensors,
    s: Scalars,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of logits and, where wanted, of offset, margin and pair; differentiable itself, to any order."""
    active = [i for i, want in enumerate((True, *wants)) if want]

    def formula(*inputs: Tensor) -> tuple[Tensor, ...]:
        full = list(t)
        for i, value in zip(active, inputs, strict=True):
            full[i] = value
        outputs = softmax_loss(Tensors._make(full), s)
        return tuple(outputs[i] for i, g in zip(SOURCES, upstream, strict=True) if g is not None)

    values, given = [v for i in active if (v := t[i]) is not None], tuple(g for g in upstream if g is not None)
    # torch refuses to differentiate a function without outputs.
    pulled = torch.func.vjp(formula, *values)[1](given) if given else tuple(map(torch.zeros_like, values))
    result: list[Tensor | None] = [None] * DIFFERENTIABLE
    for i, value in zip(active, pulled, strict=True):
        result[i] = value
    return tuple(result)
