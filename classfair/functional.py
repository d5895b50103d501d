"""Cross-entropy with everything the fused primitive knows, and how its arguments are made from those of the user."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair import _validate as check
from classfair import backends
from classfair._dtensor import whole_batch
from classfair._schema import SoftmaxLoss
from classfair.ops import Cells, Penalty
from classfair.ops.softmax_loss import reduce_rows, softmax_loss
from classfair.pair import PairTerms
from classfair.targets import MixedTarget, flat_mixture, major_first


class Problem(NamedTuple):
    """Checked arguments in the layout of the primitive."""

    logits: Tensor  # (N, C) or (N, C, L)
    rows_shape: torch.Size  # of the per-sample outputs
    reduction: str
    backend: str
    given: dict[str, Any]  # of the primitive's other inputs
    mixed: MixedTarget | None  # flat, where pair or margin forces two passes
    soft_target: Tensor | None  # the user's, where it requires grad


def prepare(
    function: str,
    logits: Any,
    target: Any,
    *,
    offset: Tensor | None,
    margin: Tensor | None,
    pair: Any,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    label_smoothing: float,
    gamma: float,
    ignore_index: int,
    reduction: str,
    backend: str | None,
    label: Tensor | None = None,
) -> Problem:
    """The checked arguments of ``function``; TypeError and ValueError name it."""
    if check.is_dtensor(logits):
        logits, target, sample_weight, label = whole_batch(function, logits, target, sample_weight, label)
    check.check_logits(function, logits)
    check.check_choice(function, "reduction", reduction, check.REDUCTIONS)
    if type(label_smoothing) is not float or label_smoothing != 0.0:
        label_smoothing = check.scalar(function, "label_smoothing", label_smoothing, 0.0, 1.0)
    if type(gamma) is not float or gamma != 0.0:
        gamma = check.scalar(function, "gamma", gamma, 0.0, check.MAX_GAMMA)
    ignore_index = check.integer(function, "ignore_index", ignore_index)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if soft:
        check.check_device(function, "target", target, logits.device)
        check.check_floats(function, "target (probabilities)", target, logits.shape)
    rows_shape = logits.shape[:1] + logits.shape[2:]
    if logits.dim() == 1:  # one sample, as torch allows
        rows_shape, logits = torch.Size(), logits.unsqueeze(0)
        target = target.unsqueeze(0) if soft else target
    elif logits.dim() > 3:
        logits = logits.flatten(2)
        target = target.flatten(2) if soft else target
    given: dict[str, Any] = {"ignore_index": ignore_index}
    if label_smoothing:
        given["label_smoothing"] = label_smoothing
    if gamma:
        given["gamma"] = gamma
    mixed = _add_target(function, given, logits, target, rows_shape, label)
    if soft:
        _check_soft(function, pair, margin, gamma, ignore_index)
    for name, vector in (("offset", offset), ("margin", margin), ("weight", weight)):
        if vector is not None:
            given[name] = _vector(function, name, vector, logits)
    if weight is not None and weight.requires_grad:
        raise ValueError(f"{function}: expected weight without gradient, got requires_grad=True")
    if sample_weight is not None:
        given["sample_weight"] = _sample_weight(function, sample_weight, rows_shape, logits)
    if pair is not None:
        # The two labels of a mixture have a row each: slots of y_a, then of y_b.
        labels = math.prod(rows_shape) * (1 if mixed is None else 2)
        _add_pair(function, given, pair, logits, labels)
    backend = backends.choose("softmax_loss", logits.device, backend)
    two_passes = mixed if pair is not None or margin is not None else None
    with_gradient = target if soft and target.requires_grad else None
    return Problem(logits, rows_shape, reduction, backend, given, two_passes, with_gradient)


def _add_target(
    function: str, given: dict[str, Any], logits: Tensor, target: Any, rows_shape: torch.Size, label: Any
) -> MixedTarget | None:
    """Adds labels or probabilities; returns a mixture, flat."""
    if isinstance(target, MixedTarget):
        mixed = flat_mixture(function, target, rows_shape, check.acc_dtype(logits), logits.device)
        given["target"], given["target_b"], given["mix"] = mixed
        return mixed
    if not isinstance(target, Tensor):
        raise TypeError(f"{function}: expected target as a tensor or MixedTarget, got {type(target).__name__}")
    if not target.is_floating_point():
        check.check_device(function, "target", target, logits.device)
        given["target"] = check.flat_labels(function, "target", target, rows_shape)
        return None
    given["soft_target"] = target.detach().to(check.acc_dtype(logits))
    if label is not None:
        given["target"] = check.flat_labels(function, "label", label, rows_shape)
        check.check_device(function, "label", label, logits.device)
    return None


def _check_soft(function: str, pair: Any, margin: Any, gamma: float, ignore_index: int) -> None:
    if pair is not None or margin is not None:
        name = "pair" if pair is not None else "margin"
        raise ValueError(
            f"{function}: expected hard labels or MixedTarget with {name}, got probabilities;"
            " mix two hard labels with MixedTarget(y_a, y_b, lam)"
        )
    if gamma:
        raise ValueError(f"{function}: expected hard labels with gamma > 0, got probabilities")
    if ignore_index >= 0:
        raise ValueError(
            f"{function}: expected hard labels with ignore_index >= 0, got probabilities, which have no index to ignore"
        )


def _vector(function: str, name: str, value: Tensor, logits: Tensor) -> Tensor:
    """A (C,) input in the accumulate dtype; torch records the cast, so that its gradient comes back right."""
    check.check_floats(function, name, value, (logits.shape[1],))
    check.check_device(function, name, value, logits.device)
    return value.to(check.acc_dtype(logits)).contiguous()


def _sample_weight(function: str, value: Any, rows_shape: torch.Size, logits: Tensor) -> Tensor:
    """(R,) in the accumulate dtype."""
    check.check_floats(function, "sample_weight", value, rows_shape)
    check.check_device(function, "sample_weight", value, logits.device)
    if value.requires_grad:
        raise ValueError(
            f"{function}: expected sample_weight without gradient, got requires_grad=True; multiply the losses of"
            " reduction='none' with it"
        )
    return value.to(check.acc_dtype(logits)).reshape(-1).contiguous()


def _add_pair(function: str, given: dict[str, Any], pair: Any, logits: Tensor, labels: int) -> None:
    num_classes, acc = logits.shape[1], check.acc_dtype(logits)
    rows = pair
    if isinstance(pair, PairTerms):
        rows = pair.rows
        check.check_floats(function, "pair.rows", rows, (rows.shape[0], num_classes))
        check.check_labels_tensor(function, "pair.slot", pair.slot, (labels,))
        check.check_device(function, "pair.slot", pair.slot, logits.device)
        given["slot"] = pair.slot.contiguous()
    else:
        check.check_floats(function, "pair", pair, (num_classes, num_classes))
    check.check_device(function, "pair" if rows is pair else "pair.rows", rows, logits.device)
    given["pair"] = rows.to(acc).contiguous()


def carries(problem: Problem) -> bool:
    """Whether the pass over the logits also reduces the loss and takes a penalty along."""
    return problem.mixed is None and problem.soft_target is None and problem.reduction != "none"


def run(problem: Problem, penalty: Penalty | None = None, cells: Cells | None = None) -> tuple[Tensor, SoftmaxLoss]:
    """The loss as the user asked for it, and the other outputs; a ``penalty`` only where it :func:`carries` one."""
    if problem.mixed is None:
        reduction = problem.reduction if carries(problem) else "none"
        out = softmax_loss(
            problem.logits,
            reduction=reduction,
            penalty=penalty,
            cells=cells,
            backend=problem.backend,
            **problem.given,
        )
    else:
        out = _run_each_label(problem, cells)
    loss = out.loss
    if not carries(problem):
        if problem.soft_target is not None:
            loss = loss + _soft_target_term(problem, problem.soft_target)
        loss = reduce_rows(loss, out.total_weight, problem.given.get("label_smoothing", 0.0), problem.reduction)
    return loss.view(problem.rows_shape) if problem.reduction == "none" else loss, out


def _run_each_label(problem: Problem, cells: Cells | None) -> SoftmaxLoss:
    """A pass for each label of a mixture, whose pair row and margin perturb the logits in their own way.

    The larger share comes first because it is the one that the integer statistics count.
    """
    assert problem.mixed is not None
    ordered, swap = major_first(problem.mixed)
    common = {k: v for k, v in problem.given.items() if k not in ("target", "target_b", "mix", "slot")}
    common |= {"cells": cells, "backend": problem.backend}
    halves: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    if "slot" in problem.given:
        a, b = problem.given["slot"].chunk(2)
        halves = {"slot": torch.where(swap, b, a)}, {"slot": torch.where(swap, a, b)}
    first = softmax_loss(problem.logits, target=ordered.y_a, mix=ordered.lam, **common, **halves[0])
    second = softmax_loss(problem.logits, target=ordered.y_b, mix=1 - ordered.lam, **common, **halves[1])
    return first._replace(
        loss=first.loss + second.loss,
        hit=None if first.hit is None or second.hit is None else first.hit + second.hit,
        total_weight=first.total_weight + second.total_weight,
    )


def _soft_target_term(problem: Problem, target: Tensor) -> Tensor:
    """Zero, with the gradient of the loss in its probability targets: the loss is linear in them."""
    given = problem.given
    logits = problem.logits.to(check.acc_dtype(problem.logits))

    def over_classes(vector: Tensor) -> Tensor:
        return vector.view(-1, *(1,) * (logits.dim() - 2))

    if "offset" in given:
        logits = logits + over_classes(given["offset"])
    nll = -logits.log_softmax(1)
    if "weight" in given:
        nll = nll * over_classes(given["weight"])
    change = (target - target.detach()).to(nll.dtype) * nll * (1 - given.get("label_smoothing", 0.0))
    rows = torch.where(nll.isfinite(), change, 0.0).sum(1).reshape(-1)
    return rows * given["sample_weight"] if "sample_weight" in given else rows


def cross_entropy(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    offset: Tensor | None = None,
    margin: Tensor | None = None,
    pair: Tensor | PairTerms | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Softmax cross-entropy, equal to :func:`torch.nn.functional.cross_entropy` for every keyword they share.

    With hard label :math:`y`, perturbed logits
    :math:`z'_c = z_c + \text{offset}_c + \text{pair}_{y,c} - [c = y]\,\text{margin}_y` and
    :math:`p' = \mathrm{softmax}(z')`, a sample's loss is

    .. math::
        \ell = (1-\epsilon)\,w_y\,(1-p'_y)^\gamma\,(-\log p'_y)
               + \frac{\epsilon}{C} \sum_c w_c\,(-\log p'_c)

    (smoothing as in torch; focal term of Lin et al. 2017, eq. 4; offset of Menon et al. 2021, eq. 10; pair rows of
    Wang et al. 2019, eq. 7, and the losses built on it).

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float16, bfloat16, float32 or float64.
        target: one of: int64 or uint8 labels ``(N,)`` or ``(N, d1, ...)`` in [0, C) or ``ignore_index``; probabilities
            of the shape of ``logits``, any float dtype; a :class:`MixedTarget`.
        offset: ``(C,)`` added to the logits of every sample, e.g. :func:`logit_adjustment`.
        margin: ``(C,)`` subtracted from the true class's logit.
        pair: ``(C, C)`` table whose row y is added for label y, or :class:`PairTerms`. With ``MixedTarget`` each
            label's own row perturbs its own loss: two passes; slots are then ``(2N,)``, of all y_a and then all y_b.
        weight: ``(C,)`` class weights >= 0; no gradient.
        sample_weight: weights >= 0 of the samples, floating, of the shape of hard labels; no gradient. They multiply
            with the class weights, in the loss and in the denominator of ``"mean"``; statistics do not see them. A
            sample of weight 0 costs 0, whatever its loss.
        label_smoothing: epsilon in [0, 1].
        gamma: focusing exponent in [0, 1000], hard labels only; 0 is plain cross-entropy.
        ignore_index: label of samples that count for nothing; hard labels only where >= 0.
        reduction: ``"mean"`` (over the weights of the labels present; over N for probabilities; as torch; times those
            of the samples),
            ``"sum"`` or ``"none"``.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the default (:mod:`classfair.backends`).

    Returns:
        A scalar, or one loss per sample for ``"none"``; float32, or float64 for float64 logits. (torch returns the
        dtype of the logits; a bfloat16 loss has three digits.)

    Gradients: ``logits``, ``offset``, ``margin``, ``pair`` and probability targets, every order.
    Determinism: bitwise, for any number of threads.
    DTensor logits, replicated or with sharded samples: every process gathers the samples, and has the loss of all.

    Differences from torch, on purpose: half-precision logits give a float32 loss; a row of -inf only has loss +inf
    and gradient 0 instead of NaN; ``weight.requires_grad`` is an error here and at backward there. ``sample_weight`` is
    none of torch's keywords.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape, device or range, before any kernel runs.
        IndexError: on the CPU, a label out of range, naming the first such row; on other devices the loss of such a
            row is NaN and its gradient 0.
        RuntimeError: the named back-end cannot run here.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> loss = classfair.cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=0.1)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=0.1))
        True
    """
    problem = prepare(
        "cross_entropy",
        logits,
        target,
        offset=offset,
        margin=margin,
        pair=pair,
        weight=weight,
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
        gamma=gamma,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )
    return run(problem)[0]
