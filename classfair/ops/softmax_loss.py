"""``softmax_loss``: one pass over the logits for the loss and for differentiable batch statistics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from classfair import backends, reference
from classfair._schema import NUM_TENSORS, Call, Options, Scalars, SoftmaxLoss, Tensors, mean_denominator
from classfair.ops.label_index import Cells
from classfair.ops.penalties import Penalty, Statistics
from classfair.ops.softmax_loss_backward import (
    NUM_DIFFERENTIABLE,
    SoftmaxLossBackward,
    SoftmaxLossBackwardForwardMode,
    push_forward,
)

STATS_NONE, STATS_VALUES, STATS_DIFFERENTIABLE = 0, 1, 2


def penalty_of(options: Options) -> Penalty | None:
    return None if options.kind is None else Penalty(options.kind, *options[3:])


class _Saved(NamedTuple):
    """What the backward needs besides the tensors of the schema; never the softmax."""

    lse: Tensor
    lse_raw: Tensor
    total_weight: Tensor
    key: Tensor | None
    num_cells: Tensor | None
    of_mass: Tensor | None  # gradients of the penalty
    of_hit: Tensor | None
    of_joint: Tensor | None


def count_table(counts: Tensor, shape: torch.Size) -> Tensor:
    """(G, C) view of the first table in ``counts``, the samples of each group and class."""
    # One operator; a slice and a view would be two.
    return counts.as_strided(shape, (shape[1], 1))


def reduce_rows(loss: Tensor, total_weight: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    """(R,) losses to what the reduction names."""
    if reduction == "none":
        return loss
    return loss.sum() / mean_denominator(total_weight, label_smoothing) if reduction == "mean" else loss.sum()


class SoftmaxLossFunction(torch.autograd.Function):
    """Loss, its reduction, and a penalty of the statistics; one backward for all of them.

    Inputs: the tensors and scalars of the schema, key and number of the penalty's cells, :class:`Options`. Outputs:
    those that receive gradient (loss, lse and, with ``stats=2``, mass, hit and joint), then the others.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Any, ...]:
        return SoftmaxLossFunction.compute(Call.of(inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*SoftmaxLossFunction.remember(ctx, Call.of(inputs), output))
        ctx.num_outputs = len(output)

    @staticmethod
    def compute(call: Call) -> tuple[Any, ...]:
        """The outputs."""
        t, s, key, num_cells, options = call
        loss, lse, lse_raw, prediction, mass, hit, joint, counts, total_weight, reduced = backends.namespace(
            options.backend
        ).softmax_loss_fwd(*t, *s)
        if options.reduced:
            loss = reduced
        if not s.stats:
            return loss, lse, total_weight
        gradients: tuple[Tensor, ...] = ()
        if (penalty := penalty_of(options)) is not None:
            statistics = Statistics(mass, hit, joint, count_table(counts, mass.shape), key, num_cells)
            value, every = statistics.value_and_gradients(penalty, options.backend)
            loss = torch.add(loss, value, alpha=options.penalty_weight)
            gradients = tuple(g for g in every if g is not None)
        sums = (mass, hit) if t.cell is None else (mass, hit, joint)
        return loss, lse, *sums, total_weight, lse_raw, prediction, counts, *gradients

    @staticmethod
    def remember(ctx: Any, call: Call, output: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Note what the backward needs; returns the tensors."""
        t, ctx.scalars, key, num_cells, options = call
        ctx.options = options
        ctx.set_materialize_grads(False)
        lse, lse_raw, total_weight = output[1], output[1], output[2]
        gradients: list[Tensor | None] = [None, None, None]
        if ctx.scalars.stats:
            total_weight, lse_raw, _, _, *given = output[2 + num_sums(t) :]
            if penalty_of(options) is not None:
                places = (0, 1) if options.kind == "iou" else (2,) if options.of_cells else (0,)
                for place, gradient in zip(places, given, strict=True):
                    gradients[place] = gradient
        saved = (*t, *_Saved(lse, lse_raw, total_weight, key, num_cells, *gradients))
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*output[num_differentiable(t, ctx.scalars) :])
        return saved

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        tensors, s, options, needs = ctx.saved_tensors, ctx.scalars, ctx.options, ctx.needs_input_grad
        t, saved = Tensors._make(tensors[:NUM_TENSORS]), _Saved._make(tensors[NUM_TENSORS:])
        loss, lse = grads[:2]
        statistics: list[Tensor | None] = [None, None, None]
        if s.stats == STATS_DIFFERENTIABLE:
            statistics[: num_sums(t)] = grads[2 : 2 + num_sums(t)]
        scale = None
        if loss is not None and options.kind is not None:
            statistics, scale = _with_penalty(loss, statistics, t, s, saved, options)
        if torch.is_grad_enabled() and loss is not None and options.reduced:  # whose formula knows rows only
            loss = loss / mean_denominator(saved.total_weight, s.label_smoothing) if s.mean else loss
            loss, s = loss.expand(saved.lse.shape[0]), s._replace(mean=False)
        others = [g if g is None else g.contiguous() for g in (lse, *statistics)]
        arguments = (
            loss,
            *others,
            scale,
            *t,
            saved.lse,
            saved.lse_raw,
            saved.total_weight,
            *s,
            *needs[1:NUM_DIFFERENTIABLE],
        )
        # Without create_graph the nested Function would only cost time: 0.05 ms a call.
        if torch.is_grad_enabled():
            function = SoftmaxLossBackward if torch.compiler.is_compiling() else SoftmaxLossBackwardForwardMode
            result = function.apply(*arguments, options.backend)
        else:
            result = backends.namespace(options.backend).softmax_loss_bwd(*arguments)
        given = [g if need else None for g, need in zip(result, needs, strict=False)]
        return (*given, *(None,) * (len(needs) - NUM_DIFFERENTIABLE))


def num_sums(t: Tensors) -> int:
    """How many sums of probabilities there are in the outputs."""
    return 2 if t.cell is None else 3


def num_differentiable(t: Tensors, s: Scalars) -> int:
    """How many of the outputs receive gradient."""
    return 2 + (num_sums(t) if s.stats == STATS_DIFFERENTIABLE else 0)


def _with_penalty(
    upstream: Tensor, statistics: list[Tensor | None], t: Tensors, s: Scalars, saved: _Saved, options: Options
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of mass, hit and joint with those of the penalty in them, and the number that they count times."""
    assert penalty_of(options) is not None
    scale = upstream * options.penalty_weight
    own: tuple[Tensor | None, ...] = saved[-3:]
    if torch.is_grad_enabled():
        own = _differentiable_gradients(scale, t, s, saved, options)
    elif all(g is None for g in statistics):
        return list(own), scale
    else:
        own = tuple(g if g is None else g * scale for g in own)
    both = zip(statistics, own, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in both], None


def _differentiable_gradients(
    scale: Tensor, t: Tensors, s: Scalars, saved: _Saved, options: Options
) -> tuple[Tensor | None, ...]:
    """Those of the penalty as a function of the logits, for derivatives of derivatives."""
    penalty = penalty_of(options)
    assert penalty is not None
    none = Options(backend=options.backend)
    function = SoftmaxLossFunction if torch.compiler.is_compiling() else SoftmaxLossForwardMode
    out = function.apply(*t, *s, saved.key, saved.num_cells, *none)
    sums, counts = out[2 : 2 + num_sums(t)], out[num_differentiable(t, s) + 3]
    count = count_table(counts, sums[0].shape)

    def value(*sums: Tensor) -> Tensor:
        mass, hit, joint = (*sums, None)[:3]
        assert mass is not None
        assert hit is not None
        return Statistics(mass, hit, joint, count, saved.key, saved.num_cells).value(penalty)

    return (*torch.func.vjp(value, *sums)[1](scale), None)[:3]


class SoftmaxLossForwardMode(SoftmaxLossFunction):
    """With forward mode, which Dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Tangents of the outputs that receive gradient, by the formula; exact, at twice the price of its gradient."""
        t, saved = Tensors._make(ctx.saved_tensors[:NUM_TENSORS]), _Saved._make(ctx.saved_tensors[NUM_TENSORS:])
        number = num_differentiable(t, ctx.scalars)

        def formula(*values: Tensor) -> tuple[Tensor, ...]:
            own, options = Tensors._make((*values, *t[NUM_DIFFERENTIABLE:])), ctx.options
            out = _reference(own, ctx.scalars, options.reduced, penalty_of(options), saved.key, saved.num_cells)
            outputs = (out.loss, out.lse, out.mass, out.hit, out.joint)[:number]
            return tuple(o for o in outputs if o is not None)

        outputs = push_forward(formula, t[:NUM_DIFFERENTIABLE], tangents[:NUM_DIFFERENTIABLE])
        return (*outputs, *(None,) * (ctx.num_outputs - number))


class _EagerSoftmaxLoss(SoftmaxLossForwardMode):
    """The same where no transform and no compiler looks on.

    torch binds the arguments of a ``forward`` that takes no ``ctx`` through ``inspect``, 50 to 120 microseconds a call,
    and autograd takes 2 to 4 for every output: those without gradient go to the list that is the last input.
    """

    setup_context = torch.autograd.Function.setup_context  # how torch knows that `forward` does its work

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        call, every = inputs[NUM_DIFFERENTIABLE:]
        output = SoftmaxLossFunction.compute(call)
        saved = SoftmaxLossFunction.remember(ctx, call, output)
        every += output
        ctx.num_outputs = num_differentiable(call.t, call.s)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*saved)
        return output[: ctx.num_outputs]


def _apply(call: Call) -> tuple[Tensor, ...]:
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.t[:NUM_DIFFERENTIABLE])
    if backends.transformed():
        # Without a gradient the Dynamo of torch 2.10 takes a forward of any number of inputs for one that takes ctx.
        if torch.compiler.is_compiling():
            return SoftmaxLossFunction.apply(*call.flat()) if recorded else SoftmaxLossFunction.compute(call)
        return SoftmaxLossForwardMode.apply(*call.flat())
    if not recorded and forward_ad._current_level < 0:
        return SoftmaxLossFunction.compute(call)
    every: list[Tensor] = []
    differentiable = _EagerSoftmaxLoss.apply(*call.t[:NUM_DIFFERENTIABLE], call, every)
    return *differentiable, *every[len(differentiable) :]


def softmax_loss(
    logits: Tensor,
    *,
    reduction: str = "none",
    penalty: Penalty | None = None,
    cells: Cells | None = None,
    backend: str = "reference",
    **given: Any,
) -> SoftmaxLoss:
    """The primitive itself, unchecked; :func:`classfair.cross_entropy` is the safe way in.

    ``given``: what :class:`classfair._schema.Tensors` and :class:`classfair._schema.Scalars` name; or ``cells`` in the
    place of ``cell`` and ``num_cells``. ``pair`` rows are taken by ``slot``, or by label where ``slot`` is None; with
    ``target_b`` there is neither ``pair`` nor ``margin``. With ``soft_target``, ``target`` serves the statistics only.
    ``mix`` without ``target_b`` scales the row's loss and hit. A ``penalty`` needs a reduction and ``stats=2``, one
    ``of_cells`` also ``cells``.

    Gradients: ``logits``, ``offset``, ``margin``, ``pair``; from ``loss``, ``lse`` and, with ``stats=2``, from
    ``mass``, ``hit`` and ``joint``. Every order. Determinism: bitwise, any number of threads.
    """
    if cells is not None:
        given |= {"cell": cells.slot, "num_cells": cells.key.shape[0]}
    t = Tensors(logits, **{name: given.pop(name) for name in Tensors._fields if name in given})
    s = Scalars(**given, mean=reduction == "mean")
    key, num_cells = (None, None) if cells is None else cells[1:]
    if backend == "reference":
        return _reference(t, s, reduction != "none", penalty, key, num_cells)
    options = Options(reduction != "none", backend, *(penalty or ()))
    out = _apply(Call(t, s, key, num_cells, options))
    if not s.stats:
        return SoftmaxLoss(*out[:3])
    end = 2 + num_sums(t)
    joint = out[4] if t.cell is not None else out[2].new_empty(0, 0)
    (loss, lse, mass, hit), (total_weight, lse_raw, prediction, counts) = out[:4], out[end : end + 4]
    return SoftmaxLoss(loss, lse, total_weight, lse_raw, prediction, mass, hit, joint, counts)


def _reference(
    t: Tensors, s: Scalars, reduces: bool, penalty: Penalty | None, key: Tensor | None, num_cells: Tensor | None
) -> SoftmaxLoss:
    """In plain torch, which autograd differentiates."""
    loss, lse, *statistics, total_weight, reduced = reference.softmax_loss(t, s)
    if reduces:
        loss = reduced
    if not s.stats:
        return SoftmaxLoss(loss, lse, total_weight)
    _, _, mass, hit, joint, counts = statistics
    if penalty is not None:
        count = count_table(counts, mass.shape)
        loss = loss + penalty.weight * Statistics(mass, hit, joint, count, key, num_cells).value(penalty)
    return SoftmaxLoss(loss, lse, total_weight, *statistics)
