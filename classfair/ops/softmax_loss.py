"""``softmax_loss``: one pass over the logits for per-sample losses and differentiable batch statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair import backends, reference
from classfair.ops import _library
from classfair.ops._autograd import quick_apply

STATS_NONE, STATS_VALUES, STATS_DIFFERENTIABLE = 0, 1, 2

TENSORS = (
    "Tensor logits, Tensor? offset, Tensor? margin, Tensor? pair, Tensor? target, Tensor? target_b,"
    " Tensor? mix, Tensor? soft_target, Tensor? slot, Tensor? weight, Tensor? group, Tensor? cell"
)
SCALARS = (
    "int num_groups, int num_cells, int num_classes, int class_start, int ignore_index,"
    " float label_smoothing, float gamma, int stats"
)
NUM_TENSORS, NUM_SCALARS = 12, 8
NUM_SAVED = NUM_TENSORS + 3  # the tensors, lse, lse_raw and total_weight
_NO_GRADIENT = (None,) * (NUM_TENSORS - 4 + NUM_SCALARS + 2)  # of inputs after the four differentiable ones


class SoftmaxLoss(NamedTuple):
    """Outputs of the primitive. R = N (or N * L) rows; what statistics were not asked for is None."""

    loss: Tensor  # (R,) or reduced to (); float32, or float64 for float64 logits, as all below unless said
    lse: Tensor  # (R,) float64: at logits of 1e4 a float32 log-sum-exp would put 5e-4 on every probability
    total_weight: Tensor  # ()
    lse_raw: Tensor | None = None  # (R,) float64, of the unperturbed logits; size 0 where it equals lse
    prediction: Tensor | None = None  # (R,) int64
    mass: Tensor | None = None  # (G, C)
    hit: Tensor | None = None  # (G, C)
    joint: Tensor | None = None  # (num_cells, C), size 0 without cells
    counts: Tensor | None = None  # (3 * G * C + 2,) int64: count, correct, predicted, invalid and nonfinite rows


def _acc(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fwd_fake(logits: Tensor, offset: Any, margin: Any, pair: Any, *rest: Any) -> tuple[Tensor, ...]:
    cell, num_groups, num_cells, stats = rest[7], rest[10], rest[11], rest[17]
    rows = logits.shape[0] * (logits.shape[2] if logits.dim() == 3 else 1)
    classes, acc = logits.shape[1], _acc(logits)
    perturbed = offset is not None or margin is not None or pair is not None

    def new(*shape: Any, dtype: torch.dtype = acc) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    table = (num_groups, classes) if stats else (0, 0)
    return (
        new(rows),
        new(rows, dtype=torch.float64),
        new(rows if stats and perturbed else 0, dtype=torch.float64),
        new(rows if stats else 0, dtype=torch.int64),
        new(*table),
        new(*table),
        new(*((num_cells, classes) if stats and cell is not None else (0, 0))),
        new(3 * num_groups * classes + 2 if stats else 0, dtype=torch.int64),
        new(),
    )


def _bwd_fake(
    grad_loss: Any,
    grad_lse: Any,
    grad_mass: Any,
    grad_hit: Any,
    grad_joint: Any,
    logits: Tensor,
    offset: Any,
    margin: Any,
    pair: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    want_offset, want_margin, want_pair = rest[-3:]
    classes, acc = logits.shape[1], _acc(logits)
    return (
        torch.empty_like(logits),
        logits.new_empty(classes if want_offset else 0, dtype=acc),
        logits.new_empty(classes if want_margin else 0, dtype=acc),
        logits.new_empty((pair.shape[0], classes) if want_pair else (0, 0), dtype=acc),
    )


_library.define(
    f"softmax_loss_fwd({TENSORS}, Tensor? lse_in, Tensor? lse_raw_in, {SCALARS})"
    " -> (Tensor loss, Tensor lse, Tensor lse_raw, Tensor prediction, Tensor mass, Tensor hit,"
    " Tensor joint, Tensor counts, Tensor total_weight)",
    _fwd_fake,
)
_library.define(
    "softmax_loss_bwd(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_mass, Tensor? grad_hit,"
    f" Tensor? grad_joint, {TENSORS}, Tensor lse, Tensor lse_raw, {SCALARS},"
    " bool want_offset, bool want_margin, bool want_pair)"
    " -> (Tensor grad_logits, Tensor grad_offset, Tensor grad_margin, Tensor grad_pair)",
    _bwd_fake,
)


def count_table(counts: Tensor, shape: torch.Size, position: int) -> Tensor:
    """(G, C) view of one of the tables in ``counts``: of count, correct and predicted the one at ``position``."""
    # One operator; a slice and a view would be two.
    return counts.as_strided(shape, (shape[1], 1), counts.storage_offset() + position * shape.numel())


def mean_denominator(total_weight: Tensor, label_smoothing: float) -> Tensor:
    """What "mean" divides by. NaN for 0 with smoothing, as torch, whose hard part is then 0 / 0."""
    return torch.where(total_weight == 0, torch.nan, total_weight) if label_smoothing else total_weight


def reduce_rows(loss: Tensor, total_weight: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    """(R,) losses to what the reduction names."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / mean_denominator(total_weight, label_smoothing) if reduction == "mean" else total


class SoftmaxLossFunction(torch.autograd.Function):
    """The fused forward. Saves logits, labels and lse; never the softmax."""

    generate_vmap_rule = True

    # Spelled out, because Dynamo tells Functions with setup_context from others by the number of parameters.
    @staticmethod
    def forward(
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
        reduction: str,
        backend: str,
    ) -> tuple[Tensor, ...]:
        loss, lse, *statistics, total_weight = backends.namespace(backend).softmax_loss_fwd(
            logits,
            offset,
            margin,
            pair,
            target,
            target_b,
            mix,
            soft_target,
            slot,
            weight,
            group,
            cell,
            None,
            None,
            num_groups,
            num_cells,
            num_classes,
            class_start,
            ignore_index,
            label_smoothing,
            gamma,
            stats,
        )
        # Reduced here, because as autograd nodes of their own a sum and a division cost 30 microseconds a step.
        loss = reduce_rows(loss, total_weight, label_smoothing, reduction)
        # autograd spends 2 microseconds on each output, also on those of size 0.
        return (loss, lse, total_weight, *statistics) if stats else (loss, lse, total_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, lse, total_weight, *statistics = output
        ctx.scalars, (ctx.reduction, ctx.backend) = inputs[NUM_TENSORS:-2], inputs[-2:]
        ctx.set_materialize_grads(False)
        if not statistics:
            ctx.save_for_backward(*inputs[:NUM_TENSORS], lse, lse, total_weight)
            ctx.mark_non_differentiable(total_weight)
            return
        lse_raw, prediction, mass, hit, joint, counts = statistics
        ctx.save_for_backward(*inputs[:NUM_TENSORS], lse, lse_raw, total_weight)
        constant = [total_weight, lse_raw, prediction, counts]
        if ctx.scalars[-1] != STATS_DIFFERENTIABLE:
            constant += [mass, hit, joint]
        ctx.mark_non_differentiable(*constant)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return SoftmaxLossFunction.pull_back(ctx, ctx.saved_tensors, grads)

    @staticmethod
    def pull_back(ctx: Any, saved_tensors: tuple, grads: tuple) -> tuple:
        """Gradients of the inputs from those of the outputs and what :meth:`setup_context` saves."""
        grad_loss, grad_lse = grads[:2]
        *saved, total_weight = saved_tensors
        if grad_loss is not None and ctx.reduction != "none":
            if ctx.reduction == "mean":
                grad_loss = grad_loss / mean_denominator(total_weight, ctx.scalars[5])
            grad_loss = grad_loss.expand(saved[-2].shape[0])  # (R,), as lse
        statistics: tuple = (None, None, None)
        if ctx.scalars[-1] == STATS_DIFFERENTIABLE:
            statistics = tuple(map(contiguous, grads[5:8]))
        needs = ctx.needs_input_grad
        arguments = (
            grad_loss,
            contiguous(grad_lse),
            *statistics,
            *saved,
            *ctx.scalars,
            *needs[1:4],
        )
        # Without create_graph the nested Function would only cost time: 0.05 ms a call.
        if torch.is_grad_enabled():
            result = SoftmaxLossBackward.apply(*arguments, ctx.backend)
        else:
            result = backends.namespace(ctx.backend).softmax_loss_bwd(*arguments)
        return SoftmaxLossFunction.gradients(ctx, result)

    @staticmethod
    def gradients(ctx: Any, result: tuple[Tensor, ...]) -> tuple:
        """Of all inputs, from what the operator returns."""
        differentiable = [g if need else None for g, need in zip(result, ctx.needs_input_grad, strict=False)]
        return (*differentiable, *_NO_GRADIENT)


class SoftmaxLossBackward(torch.autograd.Function):
    """The fused backward; its own backward differentiates the reference formula, so every order is exact."""

    generate_vmap_rule = True
    _num_upstream = 5
    _num_differentiable = 9  # upstream gradients, logits, offset, margin, pair

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return backends.namespace(args[-1]).softmax_loss_bwd(*args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        last = SoftmaxLossBackward._num_upstream + NUM_TENSORS
        ctx.save_for_backward(*inputs[:last])
        ctx.scalars, ctx.wants = inputs[last + 2 : -4], inputs[-4:-1]
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        count, upstream = SoftmaxLossBackward._num_differentiable, SoftmaxLossBackward._num_upstream
        tensors = ctx.saved_tensors
        differentiable, constant = tensors[:count], tensors[count:]
        present = [i for i, t in enumerate(differentiable) if t is not None]
        wanted = [g is not None and w for g, w in zip(grads, (True, *ctx.wants), strict=True)]

        def formula(*values: Tensor) -> tuple[Any, ...]:
            full: list[Any] = [None] * count
            for i, value in zip(present, values, strict=True):
                full[i] = value
            result = reference.softmax_loss_backward(
                *full[:upstream], *full[upstream:], *constant, *ctx.scalars, *ctx.wants
            )
            return tuple(r for r, w in zip(result, wanted, strict=True) if w)

        result: list[Any] = [None] * ctx.num_inputs
        if any(wanted):
            pullback = torch.func.vjp(formula, *(differentiable[i] for i in present))[1]
            pulled = pullback(tuple(g for g, w in zip(grads, wanted, strict=True) if w))
            for i, value in zip(present, pulled, strict=True):
                result[i] = value
        return tuple(result)


_apply = quick_apply(SoftmaxLossFunction)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def softmax_loss(
    logits: Tensor,  # (N, C) or (N, C, L)
    *,
    target: Tensor | None = None,  # (R,) int64, R = N * L
    target_b: Tensor | None = None,  # (R,) int64
    mix: Tensor | None = None,  # (R,) share of `target`
    soft_target: Tensor | None = None,  # shape of logits
    offset: Tensor | None = None,  # (C,)
    margin: Tensor | None = None,  # (C,)
    pair: Tensor | None = None,  # (M, C)
    slot: Tensor | None = None,  # (R,) int64
    weight: Tensor | None = None,  # (C,)
    group: Tensor | None = None,  # (R,) int64
    cell: Tensor | None = None,  # (R,) int64
    num_groups: int = 1,
    num_cells: int = 0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    stats: int = STATS_NONE,
    reduction: str = "none",
    backend: str = "reference",
    apply: Callable[..., Any] = _apply,
) -> SoftmaxLoss:
    """The primitive itself, unchecked; :func:`classfair.cross_entropy` is the safe way in.

    Floating inputs other than ``logits`` are float32 (float64 for float64 logits); all but ``logits`` and
    ``soft_target`` are contiguous. ``pair`` rows are taken by ``slot``, or by label where ``slot`` is None; with
    ``target_b`` there is neither ``pair`` nor ``margin``. With ``soft_target``, ``target`` serves the statistics
    only. ``mix`` without ``target_b`` scales the row's loss and hit. ``apply``: of :class:`SoftmaxLossFunction`, or of
    one that adds to its loss.

    Gradients: ``logits``, ``offset``, ``margin``, ``pair``; from ``loss``, ``lse`` and, with ``stats=2``, from
    ``mass``, ``hit`` and ``joint``. Every order. Determinism: bitwise, any number of threads.
    """
    tensors = (logits, offset, margin, pair, target, target_b, mix, soft_target, slot, weight, group, cell)
    scalars = (num_groups, num_cells, logits.shape[1], 0, ignore_index, label_smoothing, gamma, stats)
    if backend == "reference":
        loss, lse, *statistics, total_weight = reference.softmax_loss(*tensors, *scalars)
        loss = reduce_rows(loss, total_weight, label_smoothing, reduction)
        return SoftmaxLoss(loss, lse, total_weight, *(statistics if stats else ()))
    return SoftmaxLoss(*apply(*tensors, *scalars, reduction, backend))
