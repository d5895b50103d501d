"""Group penalties in plain torch: dependence of the prediction on the group, and differences of IoU."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Which rows belong together, how many samples are behind each, and which enter."""

    first: Tensor  # (M,) int64 the first row of the row's segment
    samples: Tensor  # (M,) behind the row; 1 where it does not enter
    size: Tensor  # (M,) of the row's segment; 1 where it does not enter
    enters: Tensor  # (M,) bool: a row alone in its segment has nothing to differ from

    def total(self, rows: Tensor) -> Tensor:
        """Sums over the row's segment, (M, C)."""
        return torch.zeros_like(rows).index_add(0, self.first, rows)[self.first]


def segments(rows: Tensor, count: Tensor, cell: Tensor | None, num_cells: Tensor | None) -> Segments:
    """The segments of :func:`classfair.ops.dependence`, in the dtype of the rows."""
    if cell is None or num_cells is None:  # the rows are groups of one segment
        n, first = count.sum(1).to(rows.dtype), torch.zeros_like(count[:, 0])
    else:
        groups = count.shape[0]
        number = torch.arange(cell.shape[0], device=cell.device)
        label, used = cell // groups, number < num_cells
        known = (label >= 0) & (label < count.shape[1])  # a cell of another table has no samples here
        n = torch.where(used & known, count[cell % groups, torch.where(known, label, 0)], 0).to(rows.dtype)
        begins = torch.ones_like(used)
        begins[1:] = (label[1:] != label[:-1]) | ~used[1:]
        first = torch.where(begins, number, 0).cummax(0).values if len(cell) else number
    both = torch.stack([n, (n > 0).to(n.dtype)], 1)
    size, rows_with_samples = torch.zeros_like(both).index_add(0, first, both)[first].unbind(1)
    enters = (n > 0) & (rows_with_samples > 1)
    return Segments(first, torch.where(enters, n, 1), torch.where(enters, size, 1), enters)


def dependence(
    rows: Tensor,  # (M, C)
    count: Tensor,  # (G, C) int64
    cell: Tensor | None,  # (M,) int64
    num_cells: Tensor | None,  # () int64
    mutual_information: bool,
    weighted: bool,
) -> Tensor:
    """See :func:`classfair.ops.dependence`."""
    part = segments(rows, count, cell, num_cells)
    n, size, enters = part.samples[:, None], part.size[:, None], part.enters[:, None]
    # At 0 the derivative of the logarithm is -inf; below the smallest normal number its size overflows.
    tiny = torch.finfo(rows.dtype).tiny
    entering = enters & (rows >= tiny) if mutual_information else enters
    rows = torch.where(entering, rows, 0)
    total = part.total(rows)
    if mutual_information:
        # p(a,g) log(p(a,g) / (p(a) p(g))), with 0 log 0 = 0; a class of certain independence gives exactly 0.
        safe, safe_total = torch.where(entering, rows, 1), torch.where(entering, total, 1)
        # The value is that of a ratio of products, the gradient that of two logarithms: a ratio's would overflow.
        ratio = ((safe * size) / (safe_total * n)).detach().clamp_min(tiny).log()
        difference = safe.log() - safe_total.log()
        term = torch.where(entering, safe / size * (ratio + (difference - difference.detach())), 0)
    else:
        term = torch.where(enters, rows / n - total / size, 0).square()
    value = term.sum(1)
    if weighted:
        value = value * part.size / count.sum().clamp_min(1)
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
