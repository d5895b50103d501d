"""Cross-entropy with everything the fused primitive knows: ``cross_entropy`` and ``cross_entropy_with_stats``."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from classfair import _validate as check
from classfair import backends
from classfair.fairness import compares_groups, own_term
from classfair.ops.label_index import Cells, contested_cells, label_index
from classfair.ops.reduced_loss import NO_TERM, Term, reduced_loss, serves
from classfair.ops.softmax_loss import (
    STATS_DIFFERENTIABLE,
    STATS_VALUES,
    SoftmaxLoss,
    reduce_rows,
    softmax_loss,
)
from classfair.pair import PairTerms
from classfair.statistics import BatchStats, JointRows
from classfair.targets import MixedTarget

#: A (C, C) int64 confusion matrix takes 8 C^2 bytes: 134 MB at this many classes.
MAX_CONFUSION_CLASSES = 4096


class _Problem(NamedTuple):
    """Checked arguments in the primitive's layout."""

    logits: Tensor  # (N, C) or (N, C, L)
    rows_shape: torch.Size  # of the per-sample outputs
    arguments: dict[str, Any]
    mixed: MixedTarget | None  # flat, where pair or margin forces two passes


def _target_arguments(
    function: str, logits: Tensor, target: Any, rows_shape: torch.Size, label: Tensor | None
) -> tuple[dict[str, Any], MixedTarget | None]:
    if isinstance(target, MixedTarget):
        for name in ("y_a", "y_b"):
            check.check_labels_tensor(function, f"target.{name}", getattr(target, name), rows_shape)
            check.check_device(function, f"target.{name}", getattr(target, name), logits.device)
        flat = MixedTarget(_flat(target.y_a), _flat(target.y_b), _mix(function, logits, target.lam, rows_shape))
        return {"target": flat.y_a, "target_b": flat.y_b, "mix": flat.lam}, flat
    if not isinstance(target, Tensor):
        raise TypeError(f"{function}: expected target as a tensor or MixedTarget, got {type(target).__name__}")
    check.check_device(function, "target", target, logits.device)
    if not target.is_floating_point():
        check.check_labels_tensor(function, "target", target, rows_shape)
        return {"target": _flat(target)}, None
    check.check_floats(function, "target (probabilities)", target, logits.shape)
    arguments: dict[str, Any] = {"soft_target": target.detach().to(check.acc_dtype(logits))}
    if label is not None:
        check.check_labels_tensor(function, "label", label, rows_shape)
        arguments["target"] = _flat(label)
    return arguments, None


def _flat(labels: Tensor) -> Tensor:
    """(R,) contiguous, without an operator where they are."""
    return labels if labels.dim() == 1 and labels.is_contiguous() else labels.reshape(-1).contiguous()


def _mix(function: str, logits: Tensor, lam: Any, rows_shape: torch.Size) -> Tensor:
    if isinstance(lam, Tensor):
        if lam.requires_grad:
            raise ValueError(f"{function}: expected target.lam without gradient, got requires_grad=True")
        if lam.dim() == 1 and len(rows_shape) > 1:
            lam = lam.view(-1, *(1,) * (len(rows_shape) - 1))
        try:
            torch.broadcast_shapes(lam.shape, rows_shape)
        except RuntimeError:
            raise ValueError(
                f"{function}: expected target.lam that broadcasts to {tuple(rows_shape)}, got {tuple(lam.shape)}"
            ) from None
        lam = lam.to(logits.device, check.acc_dtype(logits))
        return lam.expand(rows_shape).reshape(-1).contiguous()
    check.check_range(function, "target.lam", lam, 0.0, 1.0)
    return torch.full((math.prod(rows_shape),), lam, dtype=check.acc_dtype(logits), device=logits.device)


def _vector(function: str, name: str, value: Tensor, logits: Tensor) -> Tensor:
    """A (C,) input in the accumulate dtype; torch records the cast, so its gradient comes back right."""
    num_classes = logits.shape[1]
    check.check_floats(function, name, value, (num_classes,))
    check.check_device(function, name, value, logits.device)
    return value.to(check.acc_dtype(logits)).contiguous()


def _pair_arguments(function: str, pair: Any, logits: Tensor, labels: int) -> dict[str, Any]:
    num_classes, acc = logits.shape[1], check.acc_dtype(logits)
    if isinstance(pair, PairTerms):
        check.check_floats(function, "pair.rows", pair.rows, (pair.rows.shape[0], num_classes))
        check.check_labels_tensor(function, "pair.slot", pair.slot, (labels,))
        check.check_device(function, "pair.rows", pair.rows, logits.device)
        return {"pair": pair.rows.to(acc).contiguous(), "slot": pair.slot.contiguous()}
    check.check_floats(function, "pair", pair, (num_classes, num_classes))
    check.check_device(function, "pair", pair, logits.device)
    return {"pair": pair.to(acc).contiguous()}


def _prepare(
    function: str,
    logits: Any,
    target: Any,
    offset: Tensor | None,
    margin: Tensor | None,
    pair: Any,
    weight: Tensor | None,
    label_smoothing: float,
    gamma: float,
    ignore_index: int,
    reduction: str,
    label: Tensor | None = None,
) -> _Problem:
    check.check_logits(function, logits)
    check.check_choice(function, "reduction", reduction, check.REDUCTIONS)
    if label_smoothing:
        check.check_range(function, "label_smoothing", label_smoothing, 0.0, 1.0)
    if gamma:
        check.check_range(function, "gamma", gamma, 0.0)
    if logits.dim() == 1:  # one sample, as torch allows
        rows_shape = torch.Size()
        if isinstance(target, Tensor) and target.is_floating_point():
            check.check_floats(function, "target (probabilities)", target, logits.shape)
            target = target.unsqueeze(0)
        logits = logits.unsqueeze(0)
    else:
        rows_shape = logits.shape[:1] + logits.shape[2:]
    arguments, mixed = _target_arguments(function, logits, target, rows_shape, label)
    dense = "soft_target" in arguments
    if dense and (pair is not None or margin is not None):
        name = "pair" if pair is not None else "margin"
        raise ValueError(
            f"{function}: expected hard labels or MixedTarget with {name}, got probabilities;"
            " mix two hard labels with MixedTarget(y_a, y_b, lam)"
        )
    if dense and gamma:
        raise ValueError(f"{function}: expected hard labels with gamma > 0, got probabilities")
    if dense and ignore_index >= 0:
        raise ValueError(
            f"{function}: expected hard labels with ignore_index >= 0, got probabilities, which have no index to ignore"
        )
    arguments["label_smoothing"] = float(label_smoothing)
    arguments["gamma"] = float(gamma)
    arguments["ignore_index"] = ignore_index
    if offset is not None:
        arguments["offset"] = _vector(function, "offset", offset, logits)
    if margin is not None:
        arguments["margin"] = _vector(function, "margin", margin, logits)
    if weight is not None:
        arguments["weight"] = _vector(function, "weight", weight, logits)
        if weight.requires_grad:
            raise ValueError(f"{function}: expected weight without gradient, got requires_grad=True")
    if pair is not None:
        # The two labels of a mixture have a row each: slots of y_a, then of y_b.
        labels = math.prod(rows_shape) * (1 if mixed is None else 2)
        arguments |= _pair_arguments(function, pair, logits, labels)
    if logits.dim() > 3:
        logits = logits.flatten(2)
        if dense:
            arguments["soft_target"] = arguments["soft_target"].flatten(2)
    two_pass = mixed if pair is not None or margin is not None else None
    return _Problem(logits, rows_shape, arguments, two_pass)


def _rows_to_come(target: Any) -> bool:
    """Whether terms of single rows are still to come: where probabilities receive gradient."""
    return isinstance(target, Tensor) and target.requires_grad


def _reduces(problem: _Problem, target: Any, reduction: str, backend: str) -> bool:
    """Whether one operator computes the loss and reduces it."""
    return problem.mixed is None and not _rows_to_come(target) and serves(problem.logits, reduction, backend)


def _run(
    problem: _Problem, target: Any, reduction: str, backend: str, reduces: bool, term: Term = NO_TERM
) -> SoftmaxLoss:
    """``term``: of the statistics, for the operator that reduces to take along."""
    if problem.mixed is None:
        once = "none" if _rows_to_come(target) else reduction
        arguments = {"logits": problem.logits, **problem.arguments, "reduction": once, "backend": backend}
        return reduced_loss(term, **arguments) if reduces else softmax_loss(**arguments)
    # The pair row and the margin of each label perturb the logits in their own way: a pass for each label, the larger
    # share first because it is the one that the integer statistics count.
    y_a, y_b, lam = problem.mixed
    swap = lam < 0.5
    major, minor = torch.where(swap, y_b, y_a), torch.where(swap, y_a, y_b)
    share = torch.where(swap, 1 - lam, lam)
    common = {k: v for k, v in problem.arguments.items() if k not in ("target", "target_b", "mix", "slot")}
    halves: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    if "slot" in problem.arguments:
        a, b = problem.arguments["slot"].chunk(2)
        halves = {"slot": torch.where(swap, b, a)}, {"slot": torch.where(swap, a, b)}
    first = softmax_loss(problem.logits, target=major, mix=share, **common, **halves[0], backend=backend)
    second = softmax_loss(problem.logits, target=minor, mix=1 - share, **common, **halves[1], backend=backend)
    return first._replace(
        loss=first.loss + second.loss,
        hit=None if first.hit is None or second.hit is None else first.hit + second.hit,
        total_weight=first.total_weight + second.total_weight,
    )


def _loss(problem: _Problem, out: SoftmaxLoss, target: Any, reduction: str) -> Tensor:
    """The loss as the user asked for it."""
    loss = out.loss
    if loss.dim() == 1:
        if _rows_to_come(target):
            loss = loss + _soft_target_term(problem, target)
        loss = reduce_rows(loss, out.total_weight, problem.arguments["label_smoothing"], reduction)
    return loss.view(problem.rows_shape) if reduction == "none" else loss


def _soft_target_term(problem: _Problem, target: Tensor) -> Tensor:
    """Zero, with the gradient of the loss in its probability targets: the loss is linear in them."""
    arguments = problem.arguments
    logits = problem.logits.to(check.acc_dtype(problem.logits))
    if "offset" in arguments:
        logits = logits + arguments["offset"].view(-1, *(1,) * (logits.dim() - 2))
    nll = -logits.log_softmax(1)
    if "weight" in arguments:
        nll = nll * arguments["weight"].view(-1, *(1,) * (logits.dim() - 2))
    target = target.reshape(logits.shape)
    change = (target - target.detach()) * nll * (1 - arguments["label_smoothing"])
    return torch.where(nll.isfinite(), change, 0.0).sum(1).reshape(-1)


def cross_entropy(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    offset: Tensor | None = None,
    margin: Tensor | None = None,
    pair: Tensor | PairTerms | None = None,
    weight: Tensor | None = None,
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
        target: one of: int64 labels ``(N,)`` or ``(N, d1, ...)`` in [0, C) or ``ignore_index``; probabilities of the
            shape of ``logits``, any float dtype; a :class:`MixedTarget`.
        offset: ``(C,)`` added to the logits of every sample, e.g. :func:`logit_adjustment`.
        margin: ``(C,)`` subtracted from the true class's logit.
        pair: ``(C, C)`` table whose row y is added for label y, or :class:`PairTerms`. With ``MixedTarget`` each
            label's own row perturbs its own loss: two passes; slots are then ``(2N,)``, of all y_a and then all y_b.
        weight: ``(C,)`` class weights >= 0; no gradient.
        label_smoothing: epsilon in [0, 1].
        gamma: focusing exponent >= 0, hard labels only; 0 is plain cross-entropy.
        ignore_index: label of samples that count for nothing; hard labels only where >= 0.
        reduction: ``"mean"`` (over the weights of the labels present; over N for probabilities; as torch),
            ``"sum"`` or ``"none"``.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the default (:mod:`classfair.backends`).

    Returns:
        A scalar, or one loss per sample for ``"none"``; float32, or float64 for float64 logits. (torch returns the
        dtype of the logits; a bfloat16 loss has three digits.)

    Gradients: ``logits``, ``offset``, ``margin``, ``pair`` and probability targets, every order.
    Determinism: bitwise, for any number of threads.

    Differences from torch, on purpose: half-precision logits give a float32 loss; a row of -inf only has loss +inf
    and gradient 0 instead of NaN; ``weight.requires_grad`` is an error here and at backward there.

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
    problem = _prepare(
        "cross_entropy",
        logits,
        target,
        offset,
        margin,
        pair,
        weight,
        label_smoothing,
        gamma,
        ignore_index,
        reduction,
    )
    backend = backends.choose("softmax_loss", problem.logits.device, backend)
    out = _run(problem, target, reduction, backend, _reduces(problem, target, reduction, backend))
    return _loss(problem, out, target, reduction)


def cross_entropy_with_stats(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    offset: Tensor | None = None,
    margin: Tensor | None = None,
    pair: Tensor | PairTerms | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: Tensor | None = None,
    num_groups: int | None = None,
    label: Tensor | None = None,
    joint: bool | str = False,
    confusion: bool = False,
    differentiable: bool = True,
    penalty: Callable[[BatchStats], Tensor] | None = None,
    penalty_weight: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, BatchStats]:
    """:func:`cross_entropy` and the :class:`BatchStats` of the same pass over the logits.

    The statistics use the softmax of the unperturbed ``logits``, those the model predicts with.

    Args:
        logits, target, offset, margin, pair, weight, label_smoothing, gamma, ignore_index, reduction, backend: as in
            :func:`cross_entropy`.
        group: int64 of the shape of hard labels, in [0, num_groups), or -1: in the loss, in no statistic. Needs
            ``num_groups``.
        num_groups: G, the number of groups; 1 without ``group``.
        label: int64 labels for the statistics; required with probability targets, refused otherwise.
        joint: True: also return :class:`JointRows` of the (label, group) cells present. ``"contested"``: of those whose
            label the batch has in other groups too. :func:`equalized_odds_loss` compares no others and is cheaper so;
            with several processes it needs all, because another process may have a label in another group.
        confusion: also return the (C, C) confusion matrix; refused above 4096 classes.
        differentiable: False for monitoring: same values, no gradient (nor from ``penalty``), no cost in backward.
        penalty: a function of the statistics whose value, a scalar, is added to a reduced loss: :func:`iou_loss`,
            ``functools.partial(equalized_odds_loss, kind="mi")``, one of your own. The same as adding it yourself, but
            the group penalties of this library are then computed with the loss, which saves a small batch a good part
            of their cost. They need ``num_groups``. Part of the loss in evaluation too.
        penalty_weight: what the penalty is multiplied with.

    Returns:
        The loss as :func:`cross_entropy`, plus ``penalty_weight * penalty(stats)``; and the statistics.

    Gradients: as :func:`cross_entropy`, and into ``logits`` from ``mass``, ``hit``, ``joint.rows`` and the penalty.
    Determinism: bitwise, for any number of threads.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`cross_entropy`; groups out of range are treated as
            labels out of range.

    Example:
        >>> logits, target = torch.randn(8, 3, requires_grad=True), torch.arange(8) % 3
        >>> loss, stats = classfair.cross_entropy_with_stats(logits, target, group=target % 2, num_groups=2)
        >>> share = stats.mass / stats.mass.sum(1, keepdim=True)  # (G, C): who is predicted how often
        >>> (loss + (share[0] - share[1]).square().sum()).backward()
    """
    function = "cross_entropy_with_stats"
    problem = _prepare(
        function,
        logits,
        target,
        offset,
        margin,
        pair,
        weight,
        label_smoothing,
        gamma,
        ignore_index,
        reduction,
        label,
    )
    check.check_choice(function, "joint", joint, (False, True, "contested"))
    if penalty is not None:
        penalty_weight = _check_penalty(function, penalty, penalty_weight, reduction, num_groups)
    _check_statistics(function, problem, target, group, num_groups, label, confusion)
    arguments = problem.arguments
    groups = 1 if num_groups is None else num_groups
    arguments["num_groups"] = groups
    arguments["stats"] = STATS_DIFFERENTIABLE if differentiable else STATS_VALUES
    if group is not None:
        arguments["group"] = _flat(group)
    backend = backends.choose("softmax_loss", problem.logits.device, backend)
    counted_label = _counted_label(arguments)
    cells = None
    if joint:
        cells = _cells(counted_label, problem, groups, joint == "contested", backend)
        arguments |= {"cell": cells.slot, "num_cells": cells.key.shape[0]}
    reduces = _reduces(problem, target, reduction, backend)
    term = None
    if penalty is not None and reduces and differentiable:
        term = own_term(penalty, penalty_weight, cells)
    out = _run(problem, target, reduction, backend, reduces, term or NO_TERM)
    prediction = _given(out.prediction)
    stats = BatchStats.of_pass(
        _given(out.mass),
        _given(out.hit),
        _given(out.counts),
        prediction if len(problem.rows_shape) == 1 else prediction.view(problem.rows_shape),
        joint=None if cells is None else JointRows(_given(out.joint), cells.key, cells.num_cells),
        contested=joint == "contested",
        confusion=_confusion(problem, out, counted_label, groups) if confusion else None,
    )
    loss = _loss(problem, out, target, reduction)
    if penalty is not None and term is None:
        loss = torch.add(loss, _scalar(function, penalty(stats)), alpha=penalty_weight)
    return loss, stats


def _check_penalty(function: str, penalty: Any, weight: Any, reduction: str, num_groups: Any) -> float:
    """The weight, which may be any real number, as a float."""
    if not callable(penalty):
        raise TypeError(f"{function}: expected penalty as a function of BatchStats, got {type(penalty).__name__}")
    check.check_number(function, "penalty_weight", weight)
    if reduction == "none":
        raise ValueError(f"{function}: expected reduction 'mean' or 'sum' with penalty, got 'none'")
    if num_groups is None and compares_groups(penalty):  # of a single group it is 0, and nobody would notice
        raise ValueError(f"{function}: expected group and num_groups with this penalty, got None")
    return float(weight)


def _scalar(function: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: expected penalty to return a scalar tensor, got {got}")
    return value


def _counted_label(arguments: dict[str, Any]) -> Tensor:  # (R,)
    """The label that the integer statistics count: of two mixed labels the one with the larger share."""
    if "target_b" not in arguments:
        return arguments["target"]
    return torch.where(arguments["mix"] >= 0.5, arguments["target"], arguments["target_b"])


def _cells(label: Tensor, problem: _Problem, groups: int, contested: bool, backend: str) -> Cells:
    arguments = problem.arguments
    classes, ignore_index = problem.logits.shape[1], arguments["ignore_index"]
    index = label_index(label, classes, arguments.get("group"), groups, ignore_index=ignore_index, backend=backend)
    if contested:
        return contested_cells(index, groups, backend=backend)
    return Cells(index.slot, index.key_of_slot, index.num_slots)


def _check_statistics(
    function: str,
    problem: _Problem,
    target: Any,
    group: Any,
    num_groups: int | None,
    label: Any,
    confusion: bool,
) -> None:
    dense = "soft_target" in problem.arguments
    if dense and label is None:
        raise ValueError(f"{function}: expected label=(N,) with probability targets, got None")
    if label is not None and not dense:
        raise ValueError(f"{function}: expected label only with probability targets, got hard labels")
    if num_groups is not None:
        check.check_size(function, "num_groups", num_groups)
    if group is not None:
        if num_groups is None:
            raise ValueError(f"{function}: expected num_groups with group, got None")
        check.check_labels_tensor(function, "group", group, problem.rows_shape)
        check.check_device(function, "group", group, problem.logits.device)
    elif num_groups is not None and num_groups > 1:
        raise ValueError(f"{function}: expected group with num_groups={num_groups}, got None")
    num_classes = problem.logits.shape[1]
    if confusion and num_classes > MAX_CONFUSION_CLASSES:
        raise ValueError(
            f"{function}: expected at most {MAX_CONFUSION_CLASSES} classes with confusion=True,"
            f" got {num_classes} ({8 * num_classes**2 / 1e9:.1f} GB); count, correct and predicted need O(C)"
        )


def _given(statistic: Tensor | None) -> Tensor:
    """A statistic that was asked for."""
    assert statistic is not None
    return statistic


def _confusion(problem: _Problem, out: SoftmaxLoss, label: Tensor, groups: int) -> Tensor:
    """(C, C) int64, rows true: one scatter of integers, exact on every device."""
    num_classes = problem.logits.shape[1]
    lse_raw = _given(out.lse_raw)
    lse = lse_raw if lse_raw.numel() else out.lse
    counted = (label >= 0) & (label < num_classes) & (label != problem.arguments["ignore_index"])
    counted &= lse.isfinite()
    group = problem.arguments.get("group")
    if group is not None:
        counted &= (group >= 0) & (group < groups)
    spare = num_classes * num_classes  # rows that do not count land behind the matrix
    index = torch.where(counted, label * num_classes + _given(out.prediction), spare)
    flat = torch.zeros(spare + 1, dtype=torch.int64, device=label.device)
    return flat.scatter_add_(0, index, torch.ones_like(index))[:spare].view(num_classes, num_classes)
