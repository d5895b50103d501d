"""The base of the torchmetrics classes: statistics by group and class, exact over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors

from classfair import _validate as check
from classfair.functional_stats import cross_entropy_with_stats
from classfair.metrics._labels import label_stats
from classfair.statistics import BatchStats

COUNTS = ("count", "correct", "predicted")
SUMS = ("mass", "hit")
DIAGNOSTICS = ("invalid", "nonfinite")
CONSTANT = ("reading", "unlike_any_other")  # states that all processes have alike
PREDS = ("logits", "probabilities", "labels")


class SummedMetric(Metric):
    """A metric whose states keep their dtype and are never shared between metrics that read their input differently."""

    is_differentiable = False
    full_state_update = False  # forward() updates once and adds the states

    def __init__(self, num_classes: int, *, preds: str, ignore_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check.check_size(self._name, "num_classes", num_classes)
        check.check_choice(self._name, "preds", preds, PREDS)
        if not isinstance(ignore_index, int):
            raise TypeError(f"{self._name}: expected ignore_index as an int, got {type(ignore_index).__name__}")
        self.num_classes, self.preds, self.ignore_index = num_classes, preds, ignore_index
        # A MetricCollection lets metrics of equal states share one update. Equal after the first batch is not equal
        # for ever if they read labels or predictions differently, so that how they read is part of the state.
        self.add_state("reading", torch.tensor([ignore_index, PREDS.index(preds)]), dist_reduce_fx="max")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Moves between devices only: sums in bfloat16, as ``.to(torch.bfloat16)`` would make them, are worthless."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), exclude_state)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        """One exchange for all sums of a dtype, instead of three collectives for each state."""
        sums: dict[torch.dtype, dict[str, Tensor]] = {}
        others = {}
        for name, reduction in self._reductions.items():
            state = getattr(self, name)
            if reduction is dim_zero_sum and isinstance(state, Tensor):
                sums.setdefault(state.dtype, {})[name] = state
            elif name not in CONSTANT:
                others[name] = reduction
        for states in sums.values():
            flat = torch.cat([state.reshape(-1) for state in states.values()])
            total = torch.stack(dist_sync_fn(flat, group=process_group or self.process_group)).sum(0)
            parts = total.split([state.numel() for state in states.values()])
            for (name, state), part in zip(states.items(), parts, strict=True):
                setattr(self, name, part.view_as(state))
        every, self._reductions = self._reductions, others  # torchmetrics does the rest as it always does
        try:
            super()._sync_dist(dist_sync_fn, process_group)
        finally:
            self._reductions = every

    def _check_statistics(self, stats: Any) -> None:
        """Statistics that ``compute`` can add up over processes: those of all of them would count several times."""
        if not isinstance(stats, BatchStats):
            raise TypeError(f"{self._name}: expected stats as BatchStats, got {type(stats).__name__}")
        sync = (self.sync_on_compute or self.dist_sync_on_step) and self.distributed_available_fn()
        if stats.synced and sync and dist.get_world_size(self.process_group) > 1:
            raise ValueError(
                f"{self._name}.update_from: expected statistics of this process, got those of all processes"
            )

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Figure and axes with a value, or with the course of a list of values (default: of ``compute()``).

        ``figure`` is None where ``ax`` was given. Needs matplotlib.
        """
        value = self.compute() if val is None else val
        if isinstance(value, Sequence):
            return self._plot(value, ax)
        return self._draw(value, ax)

    def _draw(self, value: Any, ax: Any) -> Any:
        from classfair.metrics import _charts

        top = self.plot_upper_bound
        if isinstance(value, dict):
            names, values = list(value), torch.stack(list(value.values()))
            if values.dim() == 1:
                return _charts.bars(names, values, ax, self._name, top=top)
            return _charts.heat_map(values, ax, self._name, self._axis(), "", names)
        if value.dim() == 0:
            return self._plot(value, ax)
        if value.dim() == 1:
            return _charts.bars(range(len(value)), value, ax, self._name, self._axis(), top)
        return _charts.heat_map(value, ax, self._name, "class", "group")

    def _axis(self) -> str:
        """What a vector has an entry for."""
        return "group" if getattr(self, "num_groups", 1) > 1 else "class"


class ClassMetric(SummedMetric):
    """Base of every metric of counts and probability sums by group g and class c; subclasses say what to ``compute``.

    States, of G * C numbers each, added up over batches and processes: int64 ``count``, ``correct``, ``predicted``
    and float64 ``mass``, ``hit`` (as in :class:`classfair.BatchStats`), int64 ``invalid`` and ``nonfinite``. Batches
    of any size, empty ones and processes without a batch included, give what one batch of all samples gives. An update
    never waits for the device.

    Metrics with equal arguments have equal states, so that a ``torchmetrics.MetricCollection`` updates them once.

    Args:
        num_classes: C >= 1.
        num_groups: G >= 1; with 1, groups are not told apart: ``group`` is ignored and the groups of statistics are
            added up.
        preds: what ``update`` is given: ``"logits"``, ``"probabilities"`` (rows sum to 1) or ``"labels"`` (predicted
            classes; for metrics that need no probability).
        ignore_index: label of samples that count for nothing.
        kwargs: of ``torchmetrics.Metric``: ``sync_on_compute``, ``dist_sync_on_step``, ``process_group``, ....

    Raises:
        TypeError, ValueError: arguments of the wrong kind or range.

    Example:
        >>> class Errors(classfair.metrics.ClassMetric):
        ...     def compute(self):
        ...         return (self.count - self.correct).sum()
        >>> metric = Errors(num_classes=3)
        >>> metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(1)
    """

    count: Tensor
    correct: Tensor
    predicted: Tensor
    mass: Tensor
    hit: Tensor
    invalid: Tensor
    nonfinite: Tensor

    _needs_probabilities = False

    def __init__(
        self,
        num_classes: int,
        num_groups: int = 1,
        *,
        preds: str = "logits",
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, preds=preds, ignore_index=ignore_index, **kwargs)
        check.check_size(self._name, "num_groups", num_groups)
        self.num_groups = num_groups
        self._check_probabilities(self._needs_probabilities)
        for name in COUNTS:
            self.add_state(name, torch.zeros(num_groups, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        for name in SUMS:
            self.add_state(name, torch.zeros(num_groups, num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        for name in DIAGNOSTICS:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _check_probabilities(self, needed: bool) -> None:
        if needed and self.preds == "labels":
            raise ValueError(f"{self._name}: expected preds 'logits' or 'probabilities', got 'labels'")

    def update(self, preds: Tensor | BatchStats, target: Tensor | None = None, group: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: ``(N, C)`` or ``(N, C, d1, ...)`` logits or probabilities, or int64 labels ``(N,)`` or
                ``(N, d1, ...)``, as the argument ``preds`` of the class says; or :class:`classfair.BatchStats`, alone.
            target: int64 labels ``(N,)`` or ``(N, d1, ...)`` in [0, C), or ``ignore_index``.
            group: int64 of the shape of ``target``, in [0, G), or -1: in no statistic. Needed where G > 1.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, shape, dtype or device.
            IndexError, ValueError: on the CPU, a label or group out of range, or a row said to be probabilities with a
                value outside [0, 1] or a sum that is off 1 by more than 0.001 (bfloat16: 0.008); on other devices the
                sample is left out and counted in ``invalid``.
        """
        if isinstance(preds, BatchStats):
            if target is not None or group is not None:
                raise ValueError(f"{self._name}: expected statistics alone, got target or group as well")
            self._check_statistics(preds)
            self._add(preds)
            return
        if target is None:
            raise ValueError(f"{self._name}: expected target with preds, got None")
        if self.num_groups == 1:
            group = None
        elif group is None:
            raise ValueError(f"{self._name}: expected group with num_groups={self.num_groups}, got None")
        with torch.no_grad():
            self._add(self._statistics(preds, target, group))

    def update_from(self, stats: BatchStats) -> None:
        """Add a batch by the statistics of its loss, without a second pass over the logits.

        The same as ``update(stats)``, which is for a ``MetricCollection``. In several processes give each batch's own
        statistics, not those of ``all_reduce``: ``compute`` adds up those of all processes.

        Args:
            stats: of ``with_stats`` or ``cross_entropy_with_stats`` with this C, and G groups. With ``num_groups=1``
                any number of groups, which are added up; samples with group -1 are in none of them and do not count,
                unlike in ``update(preds, target)``, which ignores groups.

        Raises:
            TypeError, ValueError: no BatchStats, or of other C or G, or of all processes where ``compute`` adds up.
        """
        self._check_statistics(stats)
        self.update(stats)

    def _statistics(self, preds: Tensor, target: Tensor, group: Tensor | None, **options: Any) -> BatchStats:
        if self.preds == "labels":
            return label_stats(
                self._name,
                preds,
                target,
                group,
                num_classes=self.num_classes,
                num_groups=self.num_groups,
                ignore_index=self.ignore_index,
                **options,
            )
        logits = check_scores(self, preds, target)
        if group is not None:
            check.check_labels_tensor(self._name, "group", group, target.shape)
            check.check_device(self._name, "group", group, preds.device, self.preds)
        wrong = None
        if self.preds == "probabilities":
            counted = target != self.ignore_index
            wrong = wrong_probabilities(self, logits, counted if group is None else counted & (group != -1))
            target = torch.where(wrong, self.ignore_index, target)
            logits = logits.double().log()  # softmax(log p) = p; in float64 no two probabilities become one logit
        _, stats = cross_entropy_with_stats(
            logits,
            target,
            group=group,
            num_groups=self.num_groups,
            ignore_index=self.ignore_index,
            differentiable=False,
            **options,
        )
        return stats if wrong is None else replace(stats, invalid=stats.invalid + wrong.sum())

    def _add(self, stats: BatchStats) -> None:
        groups, classes = stats.count.shape
        if classes != self.num_classes or self.num_groups not in (1, groups):
            expected = (self.num_groups, self.num_classes)
            raise ValueError(f"{self._name}: expected statistics of shape {expected}, got {(groups, classes)}")
        check.check_device(self._name, "statistics", stats.count, self.count.device, "metric")
        for name in (*COUNTS, *SUMS):
            value = getattr(stats, name).detach()
            if groups != self.num_groups:
                value = value.sum(0, keepdim=True)
            # Out of place: the members of a MetricCollection hold the same tensors.
            setattr(self, name, getattr(self, name) + value)
        for name in DIAGNOSTICS:
            setattr(self, name, getattr(self, name) + getattr(stats, name))

    def accuracies(self) -> Tensor:
        """``(C,)``, or ``(G, C)`` where G > 1, float64 in [0, 1], NaN for classes without a sample."""
        return self._squeeze(self.correct.double() / self.count)

    def statistics(self) -> BatchStats:
        """What has been added up so far, in this process; inside ``compute``, in all processes that it adds up.

        Marked as ``synced``, so that a penalty of them, in ``compute``, does not add up processes once more.
        """
        states = {name: getattr(self, name) for name in (*COUNTS, *SUMS, *DIAGNOSTICS)}
        return BatchStats(**states, prediction=self.count.new_empty(0), synced=True)

    def _squeeze(self, value: Tensor) -> Tensor:  # (G, ...)
        return value.squeeze(0) if self.num_groups == 1 else value


def check_scores(metric: SummedMetric, preds: Any, target: Any) -> Tensor:
    """Logits or probabilities of this metric's number of classes, with a label for each."""
    if not isinstance(preds, Tensor) or preds.dtype not in check.FLOATS:
        got = preds.dtype if isinstance(preds, Tensor) else type(preds).__name__
        raise TypeError(f"{metric._name}: expected {metric.preds} as a floating tensor, got {got}")
    if preds.dim() < 2 or preds.shape[1] != metric.num_classes:
        raise ValueError(
            f"{metric._name}: expected {metric.preds} of shape (N, {metric.num_classes}) or"
            f" (N, {metric.num_classes}, d1, ...), got {tuple(preds.shape)}"
        )
    check.check_labels_tensor(metric._name, "target", target, (preds.shape[0], *preds.shape[2:]))
    check.check_device(metric._name, "target", target, preds.device, metric.preds)
    return preds


def wrong_probabilities(metric: SummedMetric, scores: Tensor, counted: Tensor) -> Tensor:
    """Which of the counted rows (N, ...) of scores (N, C, ...) are no probabilities; an error where looking is free.

    Not those with a NaN: they are not finite, whatever else they are.
    """
    scores = scores.detach()
    total, least = scores.sum(1, dtype=torch.float64), scores.amin(1)
    tolerance = max(1e-3, torch.finfo(scores.dtype).eps)  # a softmax in bfloat16 is off by up to 0.002
    wrong = counted & ((least < 0) | ((total - 1).abs() > tolerance))  # a value above 1 shows in the sum
    if host_can_look(scores.device) and wrong.any():
        row = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{metric._name}: expected probabilities in [0, 1] with sum 1 (logits are preds='logits'), got a row with"
            f" least value {least[row]:.4g} and sum {total[row]:.4g} at {row[0] if len(row) == 1 else row}"
        )
    return wrong


def host_can_look(device: torch.device) -> bool:
    """Whether the values of a tensor can be read without waiting for its device."""
    return device.type == "cpu"
