"""``pair_terms`` in plain torch: a few rows at a time, by direct differences.

Every derivative is taken of one chunk's formula, chunk by chunk, so that at most (chunk, C, D) numbers are live; a
derivative of the whole would keep the differences of all M rows.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from classfair.reference.label_index import raise_if_bad

#: Numbers in the differences of one chunk of rows: 16 MB in float32.
CHUNK_NUMBERS = 1 << 22
#: |w_c - w_y|^2 counts as 0 up to this share of 1 or, where larger, of its mean over c.
THRESHOLD = 1e-12

Tensors = tuple[Tensor, ...]
Pair = tuple[Tensor | None, Tensor | None]
#: weight (C, D), cov (C, D) or (C, D, D), label (M,), num_slots ()
Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor]
Function = Callable[..., Tensors]


class Chunk(NamedTuple):
    """K slots of the M."""

    rows: slice
    own: Tensor  # (K,) int64: their labels
    live: Tensor  # (K, 1) bool: in use


def _chunks(weight: Tensor, label: Tensor, num_slots: Tensor) -> Iterator[Chunk]:
    size = max(1, CHUNK_NUMBERS // max(1, weight.numel()))
    live = (torch.arange(label.shape[0], device=label.device) < num_slots)[:, None]
    for begin in range(0, label.shape[0], size):
        rows = slice(begin, begin + size)
        yield Chunk(rows, label[rows], live[rows])


def _form(difference: Tensor, cov: Tensor) -> Tensor:
    """d' S d (K, C) of (K, C, D) differences, with diagonals (K, D) or matrices (K, D, D)."""
    with torch.autocast(difference.device.type, enabled=False):  # it would round the factors
        if cov.dim() == 2:
            return (difference.square() @ cov[:, :, None]).squeeze(2)
        form = ((difference @ cov) * difference).sum(2)
    return form + (form.clamp_min(0) - form).detach()  # rounding may leave a small negative number


def _ratio(form: Tensor, square: Tensor, cov: Tensor) -> Tensor:
    """d' S d / |d|^2 (K, C); 0 with zero gradient where the distance vanishes."""
    average = square.detach().mean(1, keepdim=True)
    # A NaN among the weights is one in its own pairs alone.
    far = ~(square <= THRESHOLD * torch.where(average > 1, average, 1))
    ratio = torch.where(far, form / torch.where(far, square, 1), 0)
    if cov.dim() == 3 or cov.shape[1] == 0:
        return ratio
    # A Rayleigh quotient lies between the extremes of the diagonal; rounding may leave them by an ulp.
    low, high = cov.detach().aminmax(dim=1, keepdim=True)
    value = ratio.detach()
    return torch.where(far, ratio + (value.clamp(low, high) - value), 0)


def _terms(chunk: Chunk, normalize: bool, variance: bool, square: bool) -> Function:
    """The formula: (weight (C, D), cov (K, D) or (K, D, D)) -> variance and square, (K, C) each, if asked for."""

    def formula(weight: Tensor, cov: Tensor | None = None) -> Tensors:
        difference = weight - weight[chunk.own][:, None]  # exactly 0 at a row's own class, value and gradient
        difference = torch.where(chunk.live[:, None], difference, 0)  # else a NaN in class 0 leaves by unused slots
        terms = []
        distance = difference.square().sum(2) if square or normalize else None
        if variance and cov is not None:
            form = _form(difference, cov)
            terms.append(form if distance is None or not normalize else _ratio(form, distance, cov))
        if square and distance is not None:
            terms.append(distance)
        return tuple(torch.where(chunk.live, t, 0) for t in terms)

    return formula


def _gradient(chunk: Chunk, normalize: bool, variance: bool, square: bool) -> Function:
    """(upstream..., weight, cov) -> gradients of weight and cov; differentiable itself."""
    formula = _terms(chunk, normalize, variance, square)

    def pulled(*values: Tensor) -> Tensors:
        count = variance + square
        return torch.func.vjp(formula, *values[count:])[1](values[:count])

    return pulled


def _push(function: Function, inputs: Tensors, tangents: Tensors) -> Tensors:
    """Tangents of the outputs, by two reverse passes: torch.func.jvp does not run inside of forward-mode."""
    linear = torch.func.vjp(function, *inputs)
    return torch.func.vjp(linear[1], tuple(map(torch.zeros_like, linear[0])))[1](tangents)[0]


def _inputs(chunk: Chunk, weight: Tensor, cov: Tensor | None) -> Tensors:
    return (weight,) if cov is None else (weight, cov[chunk.own])


def _upstream(chunk: Chunk, grads: Pair) -> Tensors:
    return tuple(g[chunk.rows] for g in grads if g is not None)


def _tables(parts: list[Tensors], weight: Tensor, label: Tensor, variance: bool, square: bool) -> tuple[Tensor, Tensor]:
    """Rows of all chunks as (M, C) variance and square, of size 0 where there is none."""

    def table(index: int, wanted: bool) -> Tensor:
        if wanted and parts:
            return torch.cat([p[index] for p in parts])
        return weight.new_empty((label.shape[0], weight.shape[0]) if wanted else (0, 0))

    return table(0, variance), table(-1, square)


def pair_terms(
    weight: Tensor,  # (C, D)
    cov: Tensor | None,  # (C, D) or (C, D, D)
    label: Tensor,  # (M,)
    num_slots: Tensor,  # ()
    normalize: bool,
    want_square: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`classfair.ops.pair_terms`; outputs not asked for are of size 0."""
    has_cov, classes = cov is not None, weight.shape[0]
    used = torch.arange(label.shape[0], device=label.device) < num_slots
    bad = used & ((label < 0) | (label >= classes))
    raise_if_bad("pair_terms", bad, label, f"label in [0, {classes})")
    parts = [
        _terms(chunk, normalize, has_cov, want_square)(*_inputs(chunk, weight, cov))
        for chunk in _chunks(weight, label, num_slots)
    ]
    return _tables(parts, weight, label, has_cov, want_square)


def pair_terms_jvp(
    tangents: tuple[Tensor, Tensor | None],  # of weight and cov
    inputs: Inputs,
    normalize: bool,
    want_square: bool,
) -> tuple[Tensor, Tensor]:
    """Tangents of the two outputs."""
    weight, cov, label, num_slots = inputs
    parts = []
    for chunk in _chunks(weight, label, num_slots):
        formula = _terms(chunk, normalize, cov is not None, want_square)
        parts.append(_push(formula, _inputs(chunk, weight, cov), _inputs(chunk, *tangents)))
    return _tables(parts, weight, label, cov is not None, want_square)


def _zeros(weight: Tensor, cov: Tensor | None, want_cov: bool) -> tuple[Tensor, Tensor]:
    """Where gradients of weight and, if wanted, of cov (else of size 0) begin."""
    return torch.zeros_like(weight), torch.zeros_like(cov) if want_cov and cov is not None else weight.new_empty(0)


def _add(total: tuple[Tensor, Tensor], chunk: Chunk, part: Tensors, want_cov: bool) -> tuple[Tensor, Tensor]:
    return total[0] + part[0], total[1].index_add(0, chunk.own, part[1]) if want_cov else total[1]


def pair_terms_backward(grads: Pair, inputs: Inputs, normalize: bool, want_cov: bool) -> tuple[Tensor, Tensor]:
    """Gradients of weight and, if wanted, of cov (else of size 0), from those of the two outputs."""
    weight, cov, label, num_slots = inputs
    has = (grads[0] is not None, grads[1] is not None)
    total = _zeros(weight, cov, want_cov)
    for chunk in _chunks(weight, label, num_slots) if any(has) else ():
        values = (*_upstream(chunk, grads), *_inputs(chunk, weight, cov))
        total = _add(total, chunk, _gradient(chunk, normalize, *has)(*values), want_cov)
    return total


def pair_terms_backward_jvp(
    tangents: tuple[Tensor | None, Tensor | None, Tensor, Tensor | None],  # of grads, weight and cov
    grads: Pair,
    inputs: Inputs,
    normalize: bool,
    want_cov: bool,
) -> tuple[Tensor, Tensor]:
    """Tangents of the gradients of weight and of cov."""
    weight, cov, label, num_slots = inputs
    has = (grads[0] is not None, grads[1] is not None)
    total = _zeros(weight, cov, want_cov)
    for chunk in _chunks(weight, label, num_slots) if any(has) else ():
        values = (*_upstream(chunk, grads), *_inputs(chunk, weight, cov))
        directions = (*_upstream(chunk, tangents[:2]), *_inputs(chunk, *tangents[2:]))
        total = _add(total, chunk, _push(_gradient(chunk, normalize, *has), values, directions), want_cov)
    return total


def pair_terms_double_backward(
    seeds: tuple[Tensor, Tensor | None],  # gradients of those of weight and cov
    grads: Pair,
    inputs: Inputs,
    normalize: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of the gradients of the two outputs, of weight and of cov."""
    weight, cov, label, num_slots = inputs
    has = (grads[0] is not None, grads[1] is not None)
    count, has_cov = sum(has), cov is not None
    rows, total = [], _zeros(weight, cov, has_cov)
    for chunk in _chunks(weight, label, num_slots):
        values = (*_upstream(chunk, grads), *_inputs(chunk, weight, cov))
        pulled = torch.func.vjp(_gradient(chunk, normalize, *has), *values)[1](_inputs(chunk, *seeds))
        rows.append(pulled[:count])
        total = _add(total, chunk, pulled[count:], has_cov)
    variance, square = _tables(rows, weight, label, *has)
    return variance if has[0] else None, square if has[1] else None, total[0], total[1] if has_cov else None
