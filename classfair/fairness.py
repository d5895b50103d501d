"""Penalties for treating groups differently, as functions of :class:`classfair.BatchStats`.

A loss is ``loss, stats = criterion.with_stats(logits, target, group=group, num_groups=G)`` plus a multiple of a
penalty of ``stats``; ``with_stats(..., penalty=iou_loss, penalty_weight=10)`` takes it along. With several processes
the statistics of all of them are summed, with gradient, before a penalty is taken of them: it then is that of the whole
batch.

Source: Hänel et al. 2022, "Enhancing fairness of visual attribute predictors" (FVAP).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from classfair import _validate as check
from classfair import backends, reference
from classfair.ops.penalties import Penalty, dependence, iou_penalty
from classfair.statistics import BatchStats

EMPTY = ("skip", "zero", "nan")
KINDS = ("l2", "mi")


def _checked(
    function: str, stats: Any, empty: str, process_group: Any, sync: bool, backend: str | None, *, joint: bool = False
) -> tuple[BatchStats, str]:
    """Statistics of all processes, those that the penalty uses, and the back-end for them."""
    if not isinstance(stats, BatchStats):
        raise TypeError(f"{function}: expected stats as BatchStats, got {type(stats).__name__}")
    if joint and stats.joint is None:
        raise ValueError(
            f"{function}: expected stats of with_stats(..., joint=True), got stats without joint"
            " (a sum of batches keeps none)"
        )
    check.check_choice(function, "empty", empty, EMPTY)
    if sync and not stats.synced and dist.is_available() and dist.is_initialized():
        stats = replace(stats, joint=stats.joint if joint else None, confusion=None).all_reduce(process_group)
    # Away from the CPU a penalty has no kernel: it is plain torch beside whichever back-end computed the statistics.
    primitive = "penalties" if stats.mass.device.type == "cpu" else "softmax_loss"
    return stats, backends.choose(primitive, stats.mass.device, backend)


def _where_empty(value: Tensor, missing: Tensor, empty: str) -> Tensor:
    """What the loss is where a term of it is undefined in this batch."""
    if empty == "skip":
        return value
    return torch.where(missing.any(), 0.0 if empty == "zero" else torch.nan, value)


def demographic_parity_loss(
    stats: BatchStats,
    *,
    kind: str = "l2",
    empty: str = "skip",
    process_group: Any = None,
    sync: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""How far the prediction depends on the group, whatever the label.

    With :math:`p(a|g)` the mean probability of class a over the samples of group g, :math:`p(a)` over all samples:
    ``"l2"`` is :math:`\sum_{a,g} (p(a|g) - p(a))^2` (eq. 3), ``"mi"`` the mutual information of prediction and group in
    nats, :math:`\sum_{a,g} p(a,g) \log \frac{p(a,g)}{p(a)\,p(g)}` (eq. 4). Where labels depend on the group, a perfect
    classifier does not score 0, and a strong penalty costs accuracy.
    Source: Hänel et al. 2022, eq. 1 to 4.

    Args:
        stats: of ``with_stats(..., group=, num_groups=G)`` with hard labels. Their ``mass`` and ``count`` are used.
        kind: ``"l2"`` or ``"mi"``.
        empty: what to do in a batch where a group has no sample: ``"skip"`` it, take the whole loss as ``"zero"``
            (as the authors' code), or as ``"nan"``.
        process_group: processes whose batches are one; None is the default group where one is initialised.
        sync: False for the loss of this process's batch alone. Statistics that have been all-reduced are not again.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the default (:mod:`classfair.backends`).

    Returns:
        A scalar >= 0 (``"mi"``: up to rounding) of the dtype of ``stats.mass``; 0 for a single group.

    Gradients: ``stats.mass``, every order; counts are constants. ``stats`` made with ``differentiable=False`` give a
    constant. Memory: O(G C). Determinism: bitwise, for any number of threads.

    Raises:
        TypeError, ValueError: stats that are no BatchStats; an unknown kind or empty.
        RuntimeError: the named back-end cannot run here.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]], requires_grad=True)
        >>> group = torch.tensor([0, 1])
        >>> loss, stats = classfair.cross_entropy_with_stats(logits, group, group=group, num_groups=2)
        >>> penalty = demographic_parity_loss(stats)
        >>> round(penalty.item(), 4)
        0.8193
        >>> (loss + 10 * penalty).backward()
    """
    function = "demographic_parity_loss"
    check.check_choice(function, "kind", kind, KINDS)
    stats, backend = _checked(function, stats, empty, process_group, sync, backend)
    value = dependence(stats.mass, stats.count, mutual_information=kind == "mi", backend=backend)
    return value if empty == "skip" else _where_empty(value, stats.count.sum(1) == 0, empty)


def equalized_odds_loss(
    stats: BatchStats,
    *,
    kind: str = "l2",
    weighted: bool = False,
    empty: str = "skip",
    process_group: Any = None,
    sync: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""How far the prediction depends on the group among samples of one label, summed over labels.

    With :math:`p(a|b,g)` the mean probability of class a over the samples of label b and group g, :math:`p(a|b)` over
    all samples of label b: ``"l2"`` is :math:`\sum_{a,b,g} (p(a|b,g) - p(a|b))^2` (eq. 6), ``"mi"`` is
    :math:`\sum_b I(a; g \mid b)` in nats (eq. 7). A perfect classifier scores exactly 0. Labels that the batch has in
    one group only contribute exactly 0.
    Source: Hänel et al. 2022, eq. 5 to 7.

    Args:
        stats: of ``with_stats(..., group=, num_groups=G, joint=True)`` with hard labels, or on one process of
            ``joint="contested"``, which gives the same for less. Their ``joint`` and ``count`` are used.
        kind: ``"l2"`` or ``"mi"``.
        weighted: weight label b by its share of the samples; ``"mi"`` is then the conditional mutual information.
            (The authors do not weight: a rare label counts as much as a frequent one.)
        empty: what to do in a batch that lacks a sample: ``"skip"`` what is undefined, take the whole loss as
            ``"zero"`` (as the authors' code) or ``"nan"`` where for ``"l2"`` any (label, group) cell and for ``"mi"``
            any label is without a sample.
        process_group, sync, backend: as in :func:`demographic_parity_loss`.

    Returns:
        A scalar >= 0 (``"mi"``: up to rounding) of the dtype of ``stats.mass``.

    Gradients: ``stats.joint.rows``, every order; counts are constants. Memory: O(N C). Determinism: bitwise, for any
    number of threads.

    Raises:
        TypeError, ValueError: stats that are no BatchStats, or without ``joint``; an unknown kind or empty.
        RuntimeError: the named back-end cannot run here.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]], requires_grad=True)
        >>> target, group = torch.tensor([0, 0]), torch.tensor([0, 1])
        >>> _, stats = classfair.cross_entropy_with_stats(logits, target, group=group, num_groups=2, joint=True)
        >>> round(equalized_odds_loss(stats).item(), 4)
        0.8193
    """
    function = "equalized_odds_loss"
    check.check_choice(function, "kind", kind, KINDS)
    check.check_choice(function, "weighted", weighted, (False, True))
    stats, backend = _checked(function, stats, empty, process_group, sync, backend, joint=True)
    joint = stats.joint
    assert joint is not None
    value = dependence(
        joint.rows,
        stats.count,
        joint.cell,
        joint.num_cells,
        mutual_information=kind == "mi",
        weighted=weighted,
        backend=backend,
    )
    if empty == "skip":
        return value
    return _where_empty(value, stats.count == 0 if kind == "l2" else stats.count.sum(0) == 0, empty)


def iou_loss(
    stats: BatchStats,
    *,
    reduction: str = "sum",
    paired: bool = False,
    empty: str = "skip",
    process_group: Any = None,
    sync: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""How far the intersection over union of the groups differs.

    With soft predictions, class a in group g has :math:`I = \sum_i p(a|x_i)` over its true samples and
    :math:`U = \sum_i p(a|x_i) + n_{ag} - I` over the group's samples; :math:`\mathrm{IoU}_g` is the mean of I/U over
    classes, :math:`\mathrm{IoU}` the same with I and U summed over groups. The loss is
    :math:`\sum_g (\mathrm{IoU}_g - \mathrm{IoU})^2` (eq. 8 to 12). A perfect classifier scores exactly 0; so does
    one that says the same of everything where the groups have the same labels, which is why it is a penalty and not a
    loss of its own.
    Source: Hänel et al. 2022, eq. 8 to 12.

    Args:
        stats: of ``with_stats(..., group=, num_groups=G)`` with hard labels. Their ``mass``, ``hit`` and ``count`` are
            used.
        reduction: ``"sum"`` over groups (the paper) or ``"mean"`` (the authors' code).
        paired: mean over pairs of groups of the squared difference of their IoU instead, whatever the reduction (an
            option of the authors' code).
        empty: ``"skip"`` groups without a sample, and in each group the classes without a true sample; ``"zero"``:
            take an absent class's IoU as 0, which a perfect classifier then pays for, and the whole loss as 0 where a
            group is without a sample (the authors' code); ``"nan"``: as skip, but NaN where any was to be skipped.
        process_group, sync, backend: as in :func:`demographic_parity_loss`.

    Returns:
        A scalar >= 0 of the dtype of ``stats.mass``.

    Gradients: ``stats.mass`` and ``stats.hit``, every order; counts are constants. Memory: O(G C). Determinism:
    bitwise, for any number of threads.

    Raises:
        TypeError, ValueError: stats that are no BatchStats; an unknown reduction or empty.
        RuntimeError: the named back-end cannot run here.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]], requires_grad=True)
        >>> target, group = torch.tensor([0, 0]), torch.tensor([0, 1])
        >>> _, stats = classfair.cross_entropy_with_stats(logits, target, group=group, num_groups=2)
        >>> round(iou_loss(stats).item(), 4)
        0.4096
    """
    function = "iou_loss"
    check.check_choice(function, "reduction", reduction, ("sum", "mean"))
    check.check_choice(function, "paired", paired, (False, True))
    stats, backend = _checked(function, stats, empty, process_group, sync, backend)
    mass, hit, count = stats.mass, stats.hit, stats.count
    value = iou_penalty(mass, hit, count, paired=paired, skip=empty != "zero", backend=backend)
    if paired or reduction == "mean":
        groups = (count.sum(1) > 0).sum()
        value = value / (groups * (groups - 1) / 2 if paired else groups).clamp_min(1)
    if empty == "skip":
        return value
    return _where_empty(value, count.sum(1) == 0 if empty == "zero" else count == 0, empty)


def _unwrapped(penalty: Callable[[BatchStats], Tensor]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """The function behind a :class:`functools.partial`, and its options."""
    if isinstance(penalty, partial) and not penalty.args:
        return penalty.func, penalty.keywords
    return penalty, {}


def compares_groups(penalty: Callable[[BatchStats], Tensor]) -> bool:
    """Whether it is one of this module's penalties."""
    return _unwrapped(penalty)[0] in (demographic_parity_loss, equalized_odds_loss, iou_loss)


def along(penalty: Callable[[BatchStats], Tensor], weight: float, *, of_cells: bool) -> Penalty | None:
    """The penalty as the loss takes it along in its own pass, or None where it is to be called and added.

    It is called with options other than ``kind`` and ``weighted``, over several processes, and where it is not one of
    this module's. What is wrong with a penalty it says itself when it is called. ``of_cells``: there are joint rows.
    """
    if dist.is_available() and dist.is_initialized():
        return None
    function, options = _unwrapped(penalty)
    if function is iou_loss and not options:
        return Penalty("iou", weight)
    kind, weighted = options.get("kind", "l2"), options.get("weighted", False)
    if kind not in KINDS or weighted not in (False, True):
        return None
    if function is demographic_parity_loss and options.keys() <= {"kind"}:
        return Penalty(kind, weight)
    if function is equalized_odds_loss and options.keys() <= {"kind", "weighted"} and of_cells:
        return Penalty(kind, weight, weighted, True)
    return None


class GroupIoU(NamedTuple):
    """Mean intersection over union, in [0, 1]; NaN where there is no true sample.

    Example:
        >>> _, stats = classfair.cross_entropy_with_stats(torch.zeros(1, 2), torch.tensor([0]))
        >>> intersection_over_union(stats).by_group
        tensor([0.5000])
    """

    by_group: Tensor  # (G,)
    overall: Tensor  # ()


def intersection_over_union(stats: BatchStats, *, hard: bool = False) -> GroupIoU:
    r"""Mean over classes of intersection over union, of each group and of all samples.

    Source: Hänel et al. 2022, eq. 10 and 11. Classes without a true sample are left out of the mean.

    Args:
        stats: of one batch, or a sum of many.
        hard: of the predicted classes (``correct``, ``predicted``) instead of the probabilities (``hit``, ``mass``).

    Returns:
        A :class:`GroupIoU`. Gradients: ``stats.mass`` and ``stats.hit``, unless ``hard``.

    Raises:
        TypeError: stats that are no BatchStats.

    Example:
        >>> logits, target = torch.eye(2), torch.tensor([0, 0])
        >>> _, stats = classfair.cross_entropy_with_stats(logits, target)
        >>> intersection_over_union(stats, hard=True).overall
        tensor(0.5000)
    """
    if not isinstance(stats, BatchStats):
        raise TypeError(f"intersection_over_union: expected stats as BatchStats, got {type(stats).__name__}")
    mass, hit = stats.mass, stats.hit
    if hard:
        mass, hit = stats.predicted.to(mass.dtype), stats.correct.to(mass.dtype)
    by_group, overall = reference.group_iou(mass, hit, stats.count, skip=True)
    seen = stats.count.sum(1) > 0
    return GroupIoU(torch.where(seen, by_group, torch.nan), torch.where(seen.any(), overall, torch.nan))


def binary_logits(logit: Tensor) -> Tensor:
    r"""Two columns of logits for a head with a single one: (0, z), whose softmax is :math:`(1 - \sigma(z), \sigma(z))`.

    Cross-entropy and statistics then are of one and the same probability. (In the authors' code the loss uses
    :math:`\sigma(2z)` and the penalty :math:`\sigma(z)`.)

    Args:
        logit: ``(N,)`` or ``(N, 1)``, of the positive class (1); any floating dtype.

    Returns:
        ``(N, 2)``. Gradient: ``logit``.

    Raises:
        TypeError, ValueError: no floating tensor of such a shape.

    Example:
        >>> binary_logits(torch.tensor([2.0, -1.0])).tolist()
        [[0.0, 2.0], [0.0, -1.0]]
    """
    if not isinstance(logit, Tensor) or logit.dtype not in check.FLOATS:
        got = logit.dtype if isinstance(logit, Tensor) else type(logit).__name__
        raise TypeError(f"binary_logits: expected logit as a floating tensor, got {got}")
    if logit.dim() != 1 and not (logit.dim() == 2 and logit.shape[1] == 1):
        raise ValueError(f"binary_logits: expected logit of shape (N,) or (N, 1), got {tuple(logit.shape)}")
    logit = logit.reshape(-1, 1)
    return torch.cat([torch.zeros_like(logit), logit], 1)
