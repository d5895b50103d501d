"""Cross-entropy with the statistics of the same pass over the logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair._dtensor import whole_batch
from classfair._schema import SoftmaxLoss
from classfair.fairness import along, compares_groups
from classfair.functional import Problem, carries, prepare, run
from classfair.ops.label_index import Cells, contested_cells, label_index
from classfair.ops.softmax_loss import STATS_DIFFERENTIABLE, STATS_VALUES
from classfair.pair import PairTerms
from classfair.statistics import BatchStats, JointRows
from classfair.targets import MixedTarget, major_label

#: A (C, C) int64 confusion matrix takes 8 C^2 bytes: 134 MB at this many classes.
MAX_CONFUSION_CLASSES = 4096


def cross_entropy_with_stats(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    group: Tensor | None = None,
    num_groups: int | None = None,
    label: Tensor | None = None,
    joint: bool | str = False,
    confusion: bool = False,
    differentiable: bool = True,
    penalty: Callable[[BatchStats], Tensor] | None = None,
    penalty_weight: float = 1.0,
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
) -> tuple[Tensor, BatchStats]:
    """:func:`cross_entropy` and the :class:`BatchStats` of the same pass over the logits.

    The statistics use the softmax of the unperturbed ``logits``, those the model predicts with.

    Args:
        logits, target, offset, margin, pair, weight, sample_weight, label_smoothing, gamma, ignore_index, reduction,
            backend: as in :func:`cross_entropy`.
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
    if check.is_dtensor(logits):
        logits, target, group, label, sample_weight = whole_batch(function, logits, target, group, label, sample_weight)
    problem = prepare(
        function,
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
        label=label,
    )
    check.check_choice(function, "joint", joint, (False, True, "contested"))
    if penalty is not None:
        penalty_weight = _check_penalty(function, penalty, penalty_weight, reduction, num_groups)
    _add_group(function, problem, group, num_groups, label, confusion)
    groups, given = num_groups or 1, problem.given
    given["num_groups"] = groups
    given["stats"] = STATS_DIFFERENTIABLE if differentiable else STATS_VALUES
    counted = _counted_label(given)
    cells = _cells(counted, problem, groups, joint == "contested") if joint else None
    taken = None
    if penalty is not None and differentiable and carries(problem):
        taken = along(penalty, penalty_weight, of_cells=cells is not None)
    loss, out = run(problem, taken, cells)
    prediction = _given(out.prediction)
    stats = BatchStats.of_pass(
        _given(out.mass),
        _given(out.hit),
        _given(out.counts),
        prediction if len(problem.rows_shape) == 1 else prediction.view(problem.rows_shape),
        joint=None if cells is None else JointRows(_given(out.joint), cells.key, cells.num_cells),
        contested=joint == "contested",
        confusion=_confusion(problem, out, counted, groups) if confusion else None,
    )
    if penalty is not None and taken is None:
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


def _counted_label(given: dict[str, Any]) -> Tensor:  # (R,)
    """The label that the integer statistics count."""
    if "target_b" not in given:
        return given["target"]
    return major_label(MixedTarget(given["target"], given["target_b"], given["mix"]))


def _cells(label: Tensor, problem: Problem, groups: int, contested: bool) -> Cells:
    given = problem.given
    classes, ignore_index = problem.logits.shape[1], given["ignore_index"]
    index = label_index(label, classes, given.get("group"), groups, ignore_index=ignore_index, backend=problem.backend)
    return contested_cells(index, groups) if contested else Cells(index.slot, index.key_of_slot, index.num_slots)


def _add_group(
    function: str, problem: Problem, group: Any, num_groups: int | None, label: Any, confusion: bool
) -> None:
    """Checks what the statistics are asked for with, and adds the groups."""
    soft, num_classes = "soft_target" in problem.given, problem.logits.shape[1]
    if soft and label is None:
        raise ValueError(f"{function}: expected label=(N,) with probability targets, got None")
    if label is not None and not soft:
        raise ValueError(f"{function}: expected label only with probability targets, got hard labels")
    if num_groups is not None:
        check.check_keys(function, num_classes, num_groups)
    if group is not None:
        if num_groups is None:
            raise ValueError(f"{function}: expected num_groups with group, got None")
        problem.given["group"] = check.flat_labels(function, "group", group, problem.rows_shape)
        check.check_device(function, "group", group, problem.logits.device)
    elif num_groups is not None and num_groups > 1:
        raise ValueError(f"{function}: expected group with num_groups={num_groups}, got None")
    if confusion and num_classes > MAX_CONFUSION_CLASSES:
        raise ValueError(
            f"{function}: expected at most {MAX_CONFUSION_CLASSES} classes with confusion=True,"
            f" got {num_classes} ({8 * num_classes**2 / 1e9:.1f} GB); count, correct and predicted need O(C)"
        )


def _given(statistic: Tensor | None) -> Tensor:
    """A statistic that was asked for."""
    assert statistic is not None
    return statistic


def _confusion(problem: Problem, out: SoftmaxLoss, label: Tensor, groups: int) -> Tensor:
    """(C, C) int64, rows true: one scatter of integers, exact on every device."""
    num_classes = problem.logits.shape[1]
    lse_raw = _given(out.lse_raw)
    lse = lse_raw if lse_raw.numel() else out.lse
    counted = (label >= 0) & (label < num_classes) & (label != problem.given["ignore_index"])
    counted &= lse.isfinite()
    group = problem.given.get("group")
    if group is not None:
        counted &= (group >= 0) & (group < groups)
    spare = num_classes * num_classes  # rows that do not count land behind the matrix
    index = torch.where(counted, label * num_classes + _given(out.prediction), spare)
    flat = torch.zeros(spare + 1, dtype=torch.int64, device=label.device)
    return flat.scatter_add_(0, index, torch.ones_like(index))[:spare].view(num_classes, num_classes)
