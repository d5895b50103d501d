"""Group penalties of batch statistics: value and closed-form gradient in one go.

They are small. A kernel exists for the CPU only, where two dozen torch operators cost as much as the loss of a small
batch; on GPUs they are those operators, which a graph captures. :func:`classfair.ops.softmax_loss` takes a penalty
along in its own autograd node. Higher derivatives are those of the formulas in :mod:`classfair.reference`.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair import _library, backends, reference

KINDS = ("l2", "mi", "iou")


class Penalty(NamedTuple):
    """A penalty for the loss to take along.

    ``"iou"`` is :func:`iou_penalty` with its defaults; ``"l2"`` and ``"mi"`` are :func:`dependence` of ``mass``, or of
    ``joint`` with ``of_cells``.
    """

    kind: str  # of KINDS
    weight: float = 1.0
    weighted: bool = False
    of_cells: bool = False


class Statistics(NamedTuple):
    """What penalties are functions of."""

    mass: Tensor  # (G, C)
    hit: Tensor  # (G, C)
    joint: Tensor | None  # (M, C)
    count: Tensor  # type: ignore[assignment]  # (G, C) int64
    cell: Tensor | None = None  # (M,) int64, of the rows of `joint`: label * G + group, ascending
    num_cells: Tensor | None = None  # () int64, rows in use

    def value(self, penalty: Penalty) -> Tensor:
        """The penalty by its formula, unweighted; differentiable to any order."""
        if penalty.kind == "iou":
            return reference.iou_penalty(self.mass, self.hit, self.count, False, True)
        rows, count, cell, num_cells = self._rows(penalty)
        return reference.dependence(rows, count, cell, num_cells, penalty.kind == "mi", penalty.weighted)

    def value_and_gradients(self, penalty: Penalty, backend: str) -> tuple[Tensor, list[Tensor | None]]:
        """The penalty, unweighted, and its gradients with respect to mass, hit and joint."""
        gradients: list[Tensor | None] = [None, None, None]
        if penalty.kind == "iou":
            value, gradients[0], gradients[1] = _implementation("iou_penalty", self.mass, backend)(
                self.mass, self.hit, self.count, False, True
            )
            return value, gradients
        function = _implementation("dependence", self.mass, backend)
        value, rows = function(*self._rows(penalty), penalty.kind == "mi", penalty.weighted)
        gradients[2 if penalty.of_cells else 0] = rows
        return value, gradients

    def _rows(self, penalty: Penalty) -> tuple[Any, ...]:
        if penalty.of_cells:
            return self.joint, self.count, self.cell, self.num_cells
        return self.mass, self.count, None, None


def _implementation(operator: str, like: Tensor, backend: str) -> Any:
    """The CPU kernel, or the closed form in torch."""
    if backend == "native" and like.device.type == "cpu":
        return getattr(backends.namespace(backend), operator)
    return {"dependence": _dependence, "iou_penalty": _iou_penalty}[operator]


def _dependence_fake(rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(()), torch.empty_like(rows)


def _iou_fake(mass: Tensor, hit: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return mass.new_empty(()), torch.empty_like(mass), torch.empty_like(hit)


_library.define(
    "dependence(Tensor rows, Tensor count, Tensor? cell, Tensor? num_cells, bool mutual_information, bool weighted)"
    " -> (Tensor value, Tensor grad_rows)",
    _dependence_fake,
    ("classfair_native",),
)
_library.define(
    "iou_penalty(Tensor mass, Tensor hit, Tensor count, bool paired, bool skip)"
    " -> (Tensor value, Tensor grad_mass, Tensor grad_hit)",
    _iou_fake,
    ("classfair_native",),
)


def _dependence(
    rows: Tensor,  # (M, C)
    count: Tensor,  # (G, C) int64
    cell: Tensor | None,
    num_cells: Tensor | None,
    mutual_information: bool,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """Hänel et al. 2022, eq. 3, 4, 6 and 7 with their gradients."""
    part = reference.segments(rows, count, cell, num_cells)
    n, size = part.samples[:, None], part.size[:, None]  # (M, 1), 1 where a row does not enter
    rows = torch.where(part.enters[:, None], rows, 0)
    total = part.total(rows)  # (M, C), of the row's segment
    if mutual_information:
        positive = rows > 0
        ratio = torch.where(positive, rows * size / (torch.where(positive, total, 1) * n), 1)
        logarithm = ratio.clamp_min(torch.finfo(rows.dtype).tiny).log()
        # The derivatives of the row's own term and of the segment's sum cancel but for the logarithm.
        value, gradient = (rows / size * logarithm).sum(1), logarithm / size
    else:
        gap = torch.where(part.enters[:, None], rows / n - total / size, 0)
        value, gradient = gap.square().sum(1), 2 * (gap / n - part.total(gap) / size)
    gradient = torch.where(part.enters[:, None], gradient, 0)
    if weighted:
        share = part.size / count.sum().clamp_min(1)
        value, gradient = value * share, gradient * share[:, None]
    return value.sum(), gradient


def _iou_penalty(
    mass: Tensor,  # (G, C)
    hit: Tensor,  # (G, C)
    count: Tensor,  # (G, C) int64
    paired: bool,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hänel et al. 2022, eq. 8 to 12 with their gradients."""

    def means(mass: Tensor, hit: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean IoU over classes, and its derivatives in mass and hit."""
        union = mass + count - hit
        there = union > 0
        valid = count > 0 if skip else torch.ones_like(there)
        inverse = torch.where(there, 1 / torch.where(there, union, 1), 0)
        iou, number = hit * inverse, valid.sum(-1, keepdim=True).clamp_min(1)
        inverse = torch.where(valid, inverse / number, 0)
        return torch.where(valid, iou, 0).sum(-1) / number[..., 0], -iou * inverse, (1 + iou) * inverse

    by_group, *slopes = means(mass, hit, count)
    there = count.sum(1) > 0
    if paired:
        gap = torch.where(there[:, None] & there, by_group[:, None] - by_group, 0)  # (G, G), each pair twice
        outer = 2 * gap.sum(1, keepdim=True)
        return gap.square().sum() / 2, outer * slopes[0], outer * slopes[1]
    overall, *slopes_of_all = means(mass.sum(0), hit.sum(0), count.sum(0))
    gap = torch.where(there, by_group - overall, 0)
    outer = 2 * gap[:, None]
    of_mass, of_hit = (outer * own - outer.sum() * every for own, every in zip(slopes, slopes_of_all, strict=True))
    return gap.square().sum(), of_mass, of_hit


class PenaltyFunction(torch.autograd.Function):
    """A penalty alone: keeps the gradients that come with the value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        operator: str, backend: str, options: tuple, count: Tensor, cell: Any, num_cells: Any, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        function = _implementation(operator, count, backend)
        return function(*tables, count, *(() if operator == "iou_penalty" else (cell, num_cells)), *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.operator, _, ctx.options = inputs[:3]
        ctx.save_for_backward(*inputs[3:], *output[1:])
        ctx.save_for_forward(*inputs[3:], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        count, cell, num_cells, *saved = ctx.saved_tensors
        tables, gradients = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if torch.is_grad_enabled():
            constant = (count,) if ctx.operator == "iou_penalty" else (count, cell, num_cells)
            formula = partial(_formula, ctx.operator, (*constant, *ctx.options))
            return (*(None,) * 6, *torch.func.vjp(formula, *tables)[1](upstream))
        return (*(None,) * 6, *(g * upstream for g in gradients))


class PenaltyForwardMode(PenaltyFunction):
    """With forward mode, which Dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        gradients = ctx.saved_tensors[3 + (len(ctx.saved_tensors) - 3) // 2 :]
        terms = [(g * t).sum() for g, t in zip(gradients, tangents[6:], strict=True) if t is not None]
        return (torch.stack(terms).sum(), *(None for _ in gradients))


def _apply(operator: str, backend: str, options: tuple, *tables: Any) -> Tensor:
    inputs, rows = (operator, backend, options, *tables), tables[3:]
    if torch.compiler.is_exporting():  # a Function would be recorded without its gradient
        constant = tables[:1] if operator == "iou_penalty" else tables[:3]
        return _formula(operator, (*constant, *options), *rows)
    if not torch.compiler.is_compiling():
        return PenaltyForwardMode.apply(*inputs)[0]
    # Without a gradient Dynamo takes a forward of any number of inputs for one that takes ctx.
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in rows)
    return (PenaltyFunction.apply(*inputs) if recorded else PenaltyFunction.forward(*inputs))[0]


def _formula(operator: str, rest: tuple, *tables: Tensor) -> Tensor:
    return getattr(reference, operator)(*tables, *rest)


def dependence(
    rows: Tensor,  # (M, C)
    count: Tensor,  # (G, C) int64
    cell: Tensor | None = None,  # (M,) int64
    num_cells: Tensor | None = None,  # () int64
    *,
    mutual_information: bool = False,
    weighted: bool = False,
    backend: str = "reference",
) -> Tensor:
    """How far the mean prediction depends on the group; :mod:`classfair.fairness` is the safe way in.

    ``rows[m]`` is the sum of p(c|x) over n_m samples. Without ``cell`` row g is group g, and its n_g are the row sums
    of ``count``: one segment. With ``cell`` row m < ``num_cells`` is the cell label * G + group, ascending, and n_m
    its number in ``count[group, label]``; the rows of one label are a segment; further rows count for nothing.
    In a segment of N samples, with q(c) = sum_m rows[m, c] / N and over rows with n_m > 0:

        sum_mc (rows[m, c] / n_m - q(c))^2,  or with ``mutual_information``
        sum_mc rows[m, c] / N log(rows[m, c] N / (n_m sum_m rows[m, c])),  0 log 0 = 0,

    summed over segments, if ``weighted`` with the segment's share of all samples in ``count``.

    ``rows`` is float32 or float64; ``cell`` is contiguous. A row that is 0 has gradient 0 from its logarithm.
    Returns: () in the dtype of ``rows``. Gradients: ``rows``, every order. Determinism: bitwise, any number of threads.
    """
    options = (mutual_information, weighted)
    tables = (count.contiguous(), cell, num_cells, rows.contiguous())
    return _apply("dependence", backend, options, *tables)


def iou_penalty(
    mass: Tensor,  # (G, C)
    hit: Tensor,  # (G, C)
    count: Tensor,  # (G, C) int64
    *,
    paired: bool = False,
    skip: bool = True,
    backend: str = "reference",
) -> Tensor:
    """How far the groups' intersections over union differ; :mod:`classfair.fairness` is the safe way in.

    IoU of class c in a group: hit / (mass + count - hit), 0 / 0 = 0. A group's IoU is its mean over classes, that of
    all the same from the sums over groups; with ``skip`` over classes with count > 0 only. The penalty is the sum over
    groups with a sample of (IoU of group - IoU of all)^2, or if ``paired`` the sum over pairs of such groups of the
    squared difference.

    ``mass`` and ``hit`` are float32 or float64 and alike.
    Returns: () in the dtype of ``mass``. Gradients: ``mass``, ``hit``, every order. Determinism: bitwise, any number of
    threads.
    """
    tables = (count.contiguous(), None, None, mass.contiguous(), hit.contiguous())
    return _apply("iou_penalty", backend, (paired, skip), *tables)
