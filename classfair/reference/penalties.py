"""Group penalties in plain torch: dependence of the prediction on the group, and differences of IoU."""

import torch
from torch import Tensor


def _per_row(count: Tensor, rows: Tensor, cell: Tensor | None, num_cells: Tensor | None) -> tuple[Tensor, Tensor]:
    """Samples behind each row (M,), in its dtype, and the first row of its segment (M,)."""
    if cell is None or num_cells is None:  # the rows are groups of one segment
        return count.sum(1).to(rows.dtype), torch.zeros_like(count[:, 0])
    groups = count.shape[0]
    number = torch.arange(cell.shape[0], device=cell.device)
    label, used = cell // groups, number < num_cells
    n = torch.where(used, count[cell % groups, label], 0).to(rows.dtype)
    first = torch.ones_like(used)
    first[1:] = (label[1:] != label[:-1]) | ~used[1:]
    return n, torch.where(first, number, 0).cummax(0).values if len(cell) else number


def dependence(
    rows: Tensor,  # (M, C)
    count: Tensor,  # (G, C) int64
    cell: Tensor | None,  # (M,) int64
    num_cells: Tensor | None,  # () int64
    mutual_information: bool,
    weighted: bool,
) -> Tensor:
    """See :func:`classfair.ops.dependence`."""
    n, first = _per_row(count, rows, cell, num_cells)
    entering = (n > 0)[:, None]
    if mutual_information:
        entering = entering & (rows > 0)  # at 0 the derivative is -inf; such a row is left alone
    rows = torch.where(entering, rows, 0)
    total = torch.zeros_like(rows).index_add(0, first, rows)[first]  # (M, C), of the row's segment
    size = torch.zeros_like(n).index_add(0, first, n)[first]  # (M,)
    groups = torch.zeros_like(n).index_add(0, first, (n > 0).to(n.dtype))[first]
    there = ((n > 0) & (groups > 1))[:, None]  # a row alone in its segment has nothing to differ from: exactly 0
    n_, size_ = torch.where(there, n[:, None], 1), torch.where(there, size[:, None], 1)
    if mutual_information:
        # p(a,g) log(p(a,g) / (p(a) p(g))), with 0 log 0 = 0; a class of certain independence gives exactly 0.
        tiny = torch.finfo(rows.dtype).tiny
        positive = there & (rows > 0)
        safe, safe_total = torch.where(positive, rows, 1), torch.where(positive, total, 1)
        ratio = (safe * size_) / (safe_total * n_)
        term = torch.where(positive, safe / size_ * ratio.clamp_min(tiny).log(), 0)
    else:
        term = torch.where(there, rows / n_ - total / size_, 0).square()
    value = term.sum(1)
    if weighted:
        value = value * size / count.sum().clamp_min(1)
    return value.sum()


def group_iou(
    mass: Tensor,  # (G, C)
    hit: Tensor,  # (G, C)
    count: Tensor,  # (G, C) int64
    skip: bool,
) -> tuple[Tensor, Tensor]:
    """Mean IoU over classes, of each group (G,) and of all samples (); 0 where there is no class to average over.

    ``skip`` leaves out the classes without a true sample (in the group, or at all); else they count with what
    their predictions give, 0.
    """
    union = mass + count - hit

    def mean(inter: Tensor, union: Tensor, count: Tensor) -> Tensor:
        there = union > 0
        iou = torch.where(there, inter / torch.where(there, union, 1), 0)
        valid = count > 0 if skip else torch.ones_like(there)
        return torch.where(valid, iou, 0).sum(-1) / valid.sum(-1).clamp_min(1)

    return mean(hit, union, count), mean(hit.sum(0), union.sum(0), count.sum(0))


def iou_penalty(mass: Tensor, hit: Tensor, count: Tensor, paired: bool, skip: bool) -> Tensor:
    """See :func:`classfair.ops.iou_penalty`."""
    by_group, overall = group_iou(mass, hit, count, skip)
    there = count.sum(1) > 0
    if not paired:
        return torch.where(there, by_group - overall, 0).square().sum()
    both = (there[:, None] & there).triu(1)
    return torch.where(both, by_group[:, None] - by_group, 0).square().sum()
