"""What every torchmetrics class of this package does with its states, however it fills them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors

from classfair import _validate as check
from classfair.statistics import BatchStats

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
