"""``pair_terms``: mapped variance and squared distance of class pairs, for the labels of a batch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair import _library, backends, reference

_INPUTS = "Tensor weight, Tensor? cov, Tensor label, Tensor num_slots"


class PairTermRows(NamedTuple):
    """Outputs of the primitive, float32 or float64 as the weight; what was not asked for is None."""

    variance: Tensor | None  # (M, C): S, or R = S / Q if normalized
    square: Tensor | None  # (M, C): Q


def _fwd_fake(
    weight: Tensor, cov: Tensor | None, label: Tensor, num_slots: Tensor, normalize: bool, want_square: bool
) -> tuple[Tensor, ...]:
    shape, none = (label.shape[0], weight.shape[0]), (0, 0)
    return weight.new_empty(none if cov is None else shape), weight.new_empty(shape if want_square else none)


def _bwd_fake(
    grad_variance: Any, grad_square: Any, weight: Tensor, cov: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    grad_cov = cov if rest[-1] and cov is not None else weight.new_empty(0)
    return weight.new_empty(weight.shape), grad_cov.new_empty(grad_cov.shape)


_library.define(
    f"pair_terms_fwd({_INPUTS}, bool normalize, bool want_square) -> (Tensor variance, Tensor square)", _fwd_fake
)
# `variance` and `square` are the outputs of a normalized forward, which its backward needs.
_library.define(
    f"pair_terms_bwd(Tensor? grad_variance, Tensor? grad_square, {_INPUTS}, Tensor variance, Tensor square,"
    " bool normalize, bool want_cov) -> (Tensor grad_weight, Tensor grad_cov)",
    _bwd_fake,
)


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.pair_terms(*arguments)
    return backends.namespace(backend).pair_terms_fwd(*arguments)


def _backward(
    backend: str,
    grads: tuple[Tensor | None, Tensor | None],
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    normalize: bool,
    want_cov: bool,
) -> tuple[Tensor, Tensor]:
    grads = grads[0] if inputs[1] is not None else None, grads[1]
    if backend == "reference":
        return reference.pair_terms_backward(grads, inputs, normalize, want_cov)
    contiguous = (g if g is None else g.contiguous() for g in grads)
    return backends.namespace(backend).pair_terms_bwd(*contiguous, *inputs, *outputs, normalize, want_cov)


class PairTermsFunction(torch.autograd.Function):
    """The fused forward. Saves its inputs and, for the normalized ratio, its outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        cov: Tensor | None,
        label: Tensor,
        num_slots: Tensor,
        normalize: bool,
        want_square: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _forward(backend, weight, cov, label, num_slots, normalize, want_square)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.normalize, ctx.want_square, ctx.backend = inputs[4:]
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.save_for_forward(*inputs[:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_variance: Any, grad_square: Any) -> tuple:
        # The compiler gives an output of size 0 a gradient of that size.
        grads = (grad_variance, grad_square if ctx.want_square else None)
        arguments = (*grads, *ctx.saved_tensors, ctx.normalize, ctx.needs_input_grad[1], ctx.backend)
        function = PairTermsBackward if torch.compiler.is_compiling() else PairTermsBackwardForwardMode
        grad_weight, grad_cov = function.apply(*arguments)
        return grad_weight, grad_cov if ctx.needs_input_grad[1] else None, None, None, None, None, None


class PairTermsForwardMode(PairTermsFunction):
    """With forward-mode, which Dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        inputs = ctx.saved_tensors
        directions = _directions(tangents[:2], inputs[:2])
        return reference.pair_terms_jvp(directions, inputs, ctx.normalize, ctx.want_square)


class PairTermsBackward(torch.autograd.Function):
    """The fused backward; its own backward differentiates the reference formula, so every order is exact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_variance: Tensor | None,
        grad_square: Tensor | None,
        weight: Tensor,
        cov: Tensor | None,
        label: Tensor,
        num_slots: Tensor,
        variance: Tensor,
        square: Tensor,
        normalize: bool,
        want_cov: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        inputs = (weight, cov, label, num_slots)
        return _backward(backend, (grad_variance, grad_square), inputs, (variance, square), normalize, want_cov)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.normalize, ctx.want_cov = inputs[8:10]
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor | None, grad_cov: Tensor | None) -> tuple:
        saved = ctx.saved_tensors
        upstream, inputs = saved[:2], saved[2:]
        wanted = (grad_weight, grad_cov if ctx.want_cov else None)
        result: tuple[Any, ...] = (None,) * 4
        if upstream != (None, None):
            seeds = _directions(wanted, inputs[:2])
            result = reference.pair_terms_double_backward(seeds, upstream, inputs, ctx.normalize)
        return (*result, *(None,) * 7)


class PairTermsBackwardForwardMode(PairTermsBackward):
    """With forward-mode, which Dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        saved = ctx.saved_tensors
        directions = _directions(tangents[:4], saved[:4])
        return reference.pair_terms_backward_jvp(directions, saved[:2], saved[2:], ctx.normalize, ctx.want_cov)


def _directions(tangents: Any, values: Any) -> tuple:
    """Zeros for the tangents that are missing of values that are there."""
    return tuple(
        torch.zeros_like(v) if t is None and v is not None else t for t, v in zip(tangents, values, strict=True)
    )


def pair_terms(
    weight: Tensor,  # (C, D)
    cov: Tensor | None,  # (C, D), or (C, D, D) with the reference back-end
    label: Tensor,  # (M,) int64
    num_slots: Tensor,  # () int64
    *,
    normalize: bool = False,
    want_square: bool = False,
    backend: str = "reference",
) -> PairTermRows:
    """The primitive itself, unchecked; :func:`classfair.pair_variance` is the safe way in.

    For label y = ``label[m]`` of every slot m < ``num_slots`` and every class c, with ``d = weight[c] - weight[y]``:
    ``square = |d|^2`` and, with ``cov``, ``variance = d' cov[y] d``, or their ratio if ``normalize`` (then ``square``
    comes with it). The ratio and its gradient are 0 where ``square`` is at most 1e-12 of the larger of 1 and its mean
    over c; it lies between the least and the largest number of the diagonal ``cov[y]``. Rows of unused slots are 0.

    All floats are contiguous and of one dtype, float32 or float64; labels of used slots are distinct. Gradients:
    ``weight``, and ``cov`` if it requires one; every order, and forward-mode. Never larger than (M, C) or (C, D).
    Determinism: bitwise, any number of threads.
    """
    want_square = want_square or (normalize and cov is not None)
    arguments = (weight, cov, label, num_slots, normalize, want_square)
    if torch.compiler.is_exporting():  # a Function would be recorded without its gradient
        variance, square = reference.pair_terms(*arguments)
    else:
        function = PairTermsFunction if torch.compiler.is_compiling() else PairTermsForwardMode
        variance, square = function.apply(*arguments, backend)
    return PairTermRows(None if cov is None else variance, square if want_square else None)


#: Distances of class means below this share of their mean count as this share: the margin stays below 6 ln 10.
NEAREST = 1e-6


def log_distance_ratio(square: Tensor, average: Tensor, defined: Tensor) -> Tensor:
    """log(average / distance) (Wu et al. 2023, eq. 31) of squared distances (M, C).

    0 where it is not ``defined``, a bool that broadcasts, where a distance is 0 and where ``average`` () is.
    """
    average = average.to(square.dtype)
    ratio = average.log() - 0.5 * square.clamp_min((NEAREST * average).square()).log()
    return torch.where((square > 0) & defined & (average > 0), ratio, 0)
