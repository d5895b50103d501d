"""``softmax_loss`` and its backward in plain torch."""

import math

import torch
from torch import Tensor

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
    """Hard labels of each row with their shares, which rows are in the loss, and the statistics' label."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor | None,
        target_b: Tensor | None,
        mix: Tensor | None,
        dense: bool,
        group: Tensor | None,
        num_groups: int,
        ignore_index: int,
    ) -> None:
        rows, num_classes = logits.shape
        acc = logits.dtype
        none = torch.zeros(rows, dtype=torch.bool, device=logits.device)
        ignored, bad = none, none
        self.labels: list[tuple[Tensor, Tensor]] = []  # (label (R,), share (R,), 0 where absent)
        self.statistic = torch.full((rows,), -1, device=logits.device)
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
        if dense:
            ignored = none
        self.group = torch.zeros_like(self.statistic) if group is None else group
        bad_group = ~ignored & ((self.group < -1) | (self.group >= num_groups))
        raise_if_bad("softmax_loss", bad_group, self.group, f"group in [0, {num_groups}) or -1")
        self.ignored, self.invalid = ignored, bad | bad_group
        self.valid = ~(self.ignored | self.invalid)  # (R,)


def softmax_loss(
    logits: Tensor,
    offset: Tensor | None,
    margin: Tensor | None,
    pair: Tensor | None,
    target: Tensor | None,
    target_b: Tensor | None,
    mix: Tensor | None,
    soft_target: Tensor | None,
    slot: Tensor | None,
    weight: Tensor | None,
    group: Tensor | None,
    cell: Tensor | None,
    num_groups: int,
    num_cells: int,
    num_classes: int,
    class_start: int,
    ignore_index: int,
    label_smoothing: float,
    gamma: float,
    stats: int,
) -> tuple[Tensor, ...]:
    """See :func:`classfair.ops.softmax_loss`; arguments and outputs in the order of the schema."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    raw = _rows(logits).to(acc)  # (R, C)
    dense = soft_target is not None
    labels = Labels(raw, target, target_b, mix, dense, group, num_groups, ignore_index)
    valid = labels.valid
    safe = torch.where(valid[:, None], raw, 0.0)  # rows outside the loss must not leak a NaN into a gradient

    x = safe
    if offset is not None:
        x = x + offset
    if pair is not None:
        index = labels.labels[0][0] if slot is None else slot
        has_row = valid & (labels.statistic >= 0 if slot is None else (slot >= 0) & (slot < pair.shape[0]))
        x = x + torch.where(has_row[:, None], pair[torch.where(has_row, index, 0)], 0.0)
    if margin is not None:
        y, share = labels.labels[0]
        own = torch.where(share > 0, margin[y], 0.0)
        x = x - own[:, None] * torch.nn.functional.one_hot(y, num_classes)

    top, log_sum, x_safe = _log_sum_exp(x)
    dead = (x == -math.inf).all(1)
    nll = log_sum[:, None] - (x_safe - top[:, None])  # (R, C): -log p'
    loss = _row_loss(nll, labels, soft_target, weight, label_smoothing, gamma)
    loss = torch.where(dead, math.inf, loss)
    loss = torch.where(labels.invalid, math.nan, torch.where(labels.ignored, 0.0, loss))
    lse = torch.where(dead, -math.inf, top.double() + log_sum.double())
    lse = torch.where(valid, lse, 0.0)
    total_weight = _total_weight(raw, labels, dense, weight)
    empty = raw.new_empty
    if not stats:
        none = empty(0, dtype=torch.int64)
        table = empty(0, 0)
        return loss, lse, lse.new_empty(0), none, table, table.clone(), table.clone(), none.clone(), total_weight

    perturbed = offset is not None or margin is not None or pair is not None
    lse_raw, prediction, mass, hit, joint, counts = _statistics(raw, safe, labels, dense, cell, num_groups, num_cells)
    if not perturbed:
        lse_raw = lse.new_empty(0)
    if stats == 1:
        mass, hit, joint = mass.detach(), hit.detach(), joint.detach()
    return loss, lse, lse_raw.detach(), prediction, mass, hit, joint, counts, total_weight


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
        loss = loss + torch.where(share > 0, share * term, 0.0)
    return loss


def _total_weight(raw: Tensor, labels: Labels, dense: bool, weight: Tensor | None) -> Tensor:
    """The denominator of "mean": weights of the hard labels in the loss, or the number of dense rows."""
    if dense:
        return labels.valid.sum().to(raw.dtype)
    total = raw.new_zeros(())
    for y, share in labels.labels:
        w = share if weight is None else share * weight[y]
        total = total + torch.where(labels.valid, w, 0.0).sum()
    return total.detach()


def _statistics(
    raw: Tensor,  # (R, C)
    safe: Tensor,  # (R, C), zeros in rows outside the loss
    labels: Labels,
    dense: bool,
    cell: Tensor | None,
    num_groups: int,
    num_cells: int,
) -> tuple[Tensor, ...]:
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
    own = [(torch.where(counted, y, 0), torch.ones_like(p[:, 0]))] if dense else labels.labels
    for label, share in own:
        hit = hit + table(label, share * p.gather(1, label[:, None]).squeeze(1))
    joint = p.new_zeros(0, 0)
    if cell is not None:
        in_cell = counted & (cell >= 0) & (cell < num_cells)
        index = torch.where(in_cell, cell, num_cells)  # a spare row, because there may be no cell at all
        joint = p.new_zeros(num_cells + 1, num_classes).index_add(0, index, torch.where(in_cell[:, None], p, 0.0))
        joint = joint[:num_cells]
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


def softmax_loss_backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    grad_hit: Tensor | None,
    grad_joint: Tensor | None,
    logits: Tensor,
    offset: Tensor | None,
    margin: Tensor | None,
    pair: Tensor | None,
    *rest: object,
) -> tuple[Tensor | None, ...]:
    """Gradients of logits, offset, margin and pair; differentiable itself, to any order."""
    constant, wants = rest[:-3], (True, *rest[-3:])
    values = (logits, offset, margin, pair)
    active = [i for i, want in enumerate(wants) if want]
    upstream = (grad_loss, grad_lse, grad_mass, grad_hit, grad_joint)

    def formula(*inputs: Tensor) -> tuple[Tensor, ...]:
        full = list(values)
        for i, value in zip(active, inputs, strict=True):
            full[i] = value
        outputs = softmax_loss(*full, *constant)  # type: ignore[arg-type]
        outputs = (outputs[0], outputs[1], outputs[4], outputs[5], outputs[6])
        return tuple(o for o, u in zip(outputs, upstream, strict=True) if u is not None)

    pullback = torch.func.vjp(formula, *(values[i] for i in active))[1]
    pulled = pullback(tuple(u for u in upstream if u is not None))
    result: list[Tensor | None] = [None] * 4
    for i, value in zip(active, pulled, strict=True):
        result[i] = value
    return tuple(result)
