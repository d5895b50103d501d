"""Batch statistics that come out of the loss's own pass over the logits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from classfair import backends
from classfair.ops.label_index import label_index
from classfair.statistics import _processes as processes
from classfair.statistics import rates


class JointRows(NamedTuple):
    """Sums of p(c|x) over the samples of each (label, group) cell of the batch.

    There are M = min(N, C * G) rows whatever the labels are, so that nobody waits for a number. For contested cells on
    the CPU in eager mode there are num_cells.
    """

    rows: Tensor  # (M, C); zero where unused; differentiable
    cell: Tensor  # (M,) int64: label * num_groups + group; 0 where unused
    num_cells: Tensor  # () int64, cells in use


@dataclass(frozen=True, eq=False)
class BatchStats:
    """Statistics of one batch by group g and class c, with p the softmax of the logits the model predicts with.

    Samples that are ignored, invalid, non-finite or in group -1 are in none of them.

    Attributes:
        mass: ``(G, C)`` sum of p(c|x) over the samples of a group. Differentiable.
        hit: ``(G, C)`` sum of p(c|x) over the samples of a group with label c; under ``MixedTarget`` each label's
            probability weighted by its share. Differentiable.
        count: ``(G, C)`` int64, samples with label c; under ``MixedTarget`` the label of the larger share.
        correct: ``(G, C)`` int64, of these the ones predicted as c.
        predicted: ``(G, C)`` int64, samples predicted as c.
        prediction: ``(N,)`` or ``(N, d1, ...)`` int64, argmax of the logits, of every sample; empty in a sum.
        invalid: ``()`` int64, samples whose label or group is out of range (always 0 on the CPU: an error there).
        nonfinite: ``()`` int64, samples whose logits have no finite log-sum-exp.
        joint: :class:`JointRows`, or None where not asked for and in a sum of batches.
        confusion: ``(C, C)`` int64, rows true, columns predicted, or None.
        contested: whether ``joint`` leaves out labels that the batch has in one group only.
        synced: whether they are those of all processes already, as :meth:`all_reduce` makes them.

    The class is a pytree of tensors: ``torch.utils._pytree`` maps over it, and compiled functions may return it.

    Example:
        >>> logits, target = torch.eye(3) * 4, torch.tensor([0, 1, 1])
        >>> loss, stats = classfair.cross_entropy_with_stats(logits, target)
        >>> stats.count.tolist(), stats.correct.tolist()
        ([[1, 2, 0]], [[1, 1, 0]])
        >>> round((stats + stats).summary()["accuracy"], 4)
        0.6667
    """

    mass: Tensor
    hit: Tensor
    count: Tensor
    correct: Tensor
    predicted: Tensor
    prediction: Tensor
    invalid: Tensor
    nonfinite: Tensor
    joint: JointRows | None = None
    confusion: Tensor | None = None
    contested: bool = False
    synced: bool = False

    @classmethod
    def of_pass(
        cls,
        mass: Tensor,  # (G, C)
        hit: Tensor,  # (G, C)
        counts: Tensor,  # (3 * G * C + 2,) int64
        prediction: Tensor,
        joint: JointRows | None = None,
        confusion: Tensor | None = None,
        contested: bool = False,
    ) -> "BatchStats":
        """The statistics of what the primitive returns, whose integers are views of one tensor.

        Where nobody looks at them, as in a training step that uses ``mass`` and ``hit`` only, they are never made: at
        (8, 1000) making them takes 30 of 160 microseconds.
        """
        given: dict[str, Any] = {
            "mass": mass,
            "hit": hit,
            "prediction": prediction,
            "joint": joint,
            "confusion": confusion,
        }
        if torch.compiler.is_compiling():
            return cls(**given, **_integers(counts, mass.shape), contested=contested)
        stats = cls.__new__(cls)
        stats.__dict__.update(given, contested=contested, synced=False, _counts=counts)
        return stats

    def __getattr__(self, name: str) -> Tensor:
        """A field that :meth:`of_pass` has put off."""
        if name not in _COUNTS or "_counts" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        integers = _integers(self._counts, self.mass.shape)
        if not backends.transformed():  # whose tensors do not outlive it
            self.__dict__.update(integers)
        return integers[name]

    def check(self, function: str) -> None:
        """TypeError or ValueError where a map over the tensors has changed what a penalty trusts."""
        shape, device = self.mass.shape, self.mass.device
        if len(shape) != 2:
            raise ValueError(f"{function}: expected stats.mass of shape (G, C), got {tuple(shape)}")
        tables: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
            ("mass", self.mass, shape, torch.float64 if self.mass.dtype == torch.float64 else torch.float32),
            ("hit", self.hit, shape, self.mass.dtype),
            ("count", self.count, shape, torch.int64),
        ]
        if self.joint is not None:
            rows, cell, num_cells = self.joint
            tables.append(("joint.rows", rows, (*cell.shape[:1], shape[1]), self.mass.dtype))
            tables.append(("joint.cell", cell, cell.shape[:1], torch.int64))
            tables.append(("joint.num_cells", num_cells, (), torch.int64))
        for name, table, wanted, dtype in tables:
            if table.dtype != dtype:
                raise TypeError(f"{function}: expected stats.{name} of dtype {dtype}, got {table.dtype}")
            if table.shape != wanted:
                raise ValueError(
                    f"{function}: expected stats.{name} of shape {tuple(wanted)}, got {tuple(table.shape)}"
                )
            if table.device != device:
                raise ValueError(f"{function}: expected stats.{name} on {device}, got {table.device}")

    @classmethod
    def zeros(cls, num_groups: int, num_classes: int, device: torch.device | None = None) -> "BatchStats":
        """The statistics of no sample, which a sum starts from."""
        mass, hit = torch.zeros(2, num_groups, num_classes, dtype=torch.float64, device=device).unbind()
        counts = torch.zeros(3 * num_groups * num_classes + 2, dtype=torch.int64, device=device)
        return cls.of_pass(mass, hit, counts, counts.new_empty(0))

    def detach(self) -> "BatchStats":
        """The same values without gradient."""
        return pytree.tree_map(lambda t: t.detach(), self)

    def __add__(self, other: "BatchStats") -> "BatchStats":
        """The statistics of both together: ``mass`` and ``hit`` in float64, so that a sum of many batches stays exact.

        Predictions and joint rows belong to one batch and are dropped. Gradient: ``mass`` and ``hit`` of both.
        """
        if not isinstance(other, BatchStats):
            return NotImplemented
        if self.mass.shape != other.mass.shape:
            raise ValueError(
                f"BatchStats: expected statistics of shape {tuple(self.mass.shape)}, got {tuple(other.mass.shape)}"
            )
        if self.synced != other.synced:
            raise ValueError("BatchStats: expected both of all processes or both of this one, got one of each")
        summed: dict[str, Any] = {name: getattr(self, name).double() + getattr(other, name) for name in SUMS}
        summed |= {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        both = self.confusion is not None and other.confusion is not None
        confusion = self.confusion + other.confusion if both else None  # type: ignore[operator]
        empty = self.prediction.new_empty(0)
        return BatchStats(**summed, prediction=empty, confusion=confusion, synced=self.synced)

    def all_reduce(self, group: Any = None) -> "BatchStats":
        """Statistics of all processes of ``group`` (None: the default group) together, with gradient.

        All tables are added up, and ``joint`` gets the rows of all cells that any process has. The gradient of a sum
        is the sum of the gradients, so that DDP's averaging gives the gradient of one process on the whole batch.
        Every process must call it. It needs two collectives, and with ``joint`` three more; the host waits for one of
        these, which tells how many cells a process has at most. Without an initialised process group it returns the
        statistics unchanged. ``prediction`` belongs to one process and is dropped.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        if self.synced:
            raise ValueError("BatchStats.all_reduce: expected statistics of this process, got those of all")
        if self.joint is not None and self.contested and dist.get_world_size(group) > 1:
            raise ValueError(
                "BatchStats.all_reduce: expected joint=True, got joint='contested': another process may have a label in"
                " another group"
            )
        integers = [getattr(self, name) for name in _INTEGERS if getattr(self, name) is not None]
        summed = [
            *processes.sum_with_gradient((self.mass, self.hit), group),
            *processes.sum_with_gradient(integers, group),
        ]
        confusion = summed.pop() if self.confusion is not None else None
        joint = None if self.joint is None else _merge_joint(self.joint, self.mass, group)
        named: dict[str, Any] = dict(zip(SUMMED, summed, strict=True))
        empty = self.prediction.new_empty(0)
        return BatchStats(**named, prediction=empty, joint=joint, confusion=confusion, synced=True)

    def summary(self) -> dict[str, float]:
        """Scalars for a log. On one process this is the only method that waits for the device, and it does so once.

        ``accuracy``, ``balanced_accuracy`` (mean over the classes present), ``best_class_accuracy`` and
        ``worst_class_accuracy`` are in [0, 1], and NaN without a sample; ``samples``, ``invalid`` and ``nonfinite`` are
        numbers of samples.
        """
        tables = self.count.sum(0), self.correct.sum(0), torch.stack([self.invalid, self.nonfinite])
        count, correct, (invalid, nonfinite) = torch.cat(tables).cpu().split([*(self.mass.shape[1],) * 2, 2])
        accuracy = rates.accuracies(correct, count)
        return {
            "accuracy": float(correct.sum().double() / count.sum()),
            "balanced_accuracy": float(rates.mean(accuracy)),
            "best_class_accuracy": float(rates.best(accuracy)),
            "worst_class_accuracy": float(rates.worst(accuracy)),
            "samples": float(count.sum()),
            "invalid": float(invalid),
            "nonfinite": float(nonfinite),
        }


SUMS = ("mass", "hit")
_COUNTS = ("count", "correct", "predicted", "invalid", "nonfinite")
SUMMED = (*SUMS, *_COUNTS)
_INTEGERS = (*_COUNTS, "confusion")
_FLAGS = ("contested", "synced")
_TENSORS = tuple(f.name for f in fields(BatchStats) if f.name not in _FLAGS)


def _integers(counts: Tensor, shape: torch.Size) -> dict[str, Any]:
    """The integer statistics in one tensor (3 * G * C + 2,)."""
    tables, rows = counts.split_with_sizes([counts.numel() - 2, 2])
    return dict(zip(_COUNTS, (*tables.view(3, *shape).unbind(), *rows.unbind()), strict=True))


def _flatten(stats: BatchStats) -> tuple[list[Any], tuple[tuple[bool, ...], tuple[str, ...]]]:
    names = tuple(n for n in _TENSORS if getattr(stats, n) is not None)  # so that every leaf is a tensor
    return [getattr(stats, n) for n in names], (tuple(getattr(stats, n) for n in _FLAGS), names)


def _unflatten(values: Iterable[Any], context: tuple[tuple[bool, ...], tuple[str, ...]]) -> BatchStats:
    flags, names = context
    named: dict[str, Any] = dict(zip((*names, *_FLAGS), (*values, *flags), strict=True))
    return BatchStats(**named)


def _merge_joint(joint: JointRows, mass: Tensor, group: Any) -> JointRows:
    """Rows of every cell that any process has, ascending by cell."""
    used = torch.arange(joint.cell.shape[0], device=joint.cell.device) < joint.num_cells
    rows, cells = processes.gather_with_gradient(joint.rows, torch.where(used, joint.cell, -1), group)  # (P, M, ...)
    index = label_index(cells.flatten(), mass.numel(), ignore_index=-1)
    spare = index.key_of_slot.shape[0]  # where unused rows, which are zero, go
    slot = torch.where(index.slot < 0, spare, index.slot).view_as(cells)
    merged = rows.new_zeros(spare + 1, rows.shape[2])
    for own, place in zip(rows, slot, strict=True):  # in rank order; the cells of a process are distinct
        merged = merged.index_add(0, place, own)
    return JointRows(merged[:spare], index.key_of_slot, index.num_slots)


pytree.register_pytree_node(BatchStats, _flatten, _unflatten, serialized_type_name="classfair.BatchStats")
