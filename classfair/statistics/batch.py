"""Batch statistics that come out of the loss's own pass over the logits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from classfair.backends import transformed
from classfair.ops.label_index import label_index
from classfair.ops.softmax_loss import count_table
from classfair.statistics import _processes as processes


class JointRows(NamedTuple):
    """Sums of p(c|x) over the samples of each (label, group) cell of the batch.

    M = min(N, C * G) whatever the labels, so that nobody waits for a number; for contested cells on the CPU in eager
    mode M = num_cells.
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

    A pytree of tensors: ``torch.utils._pytree`` maps over it, and compiled functions may return it.

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
        """Of what the primitive returns. Views of ``counts`` are made when they are asked for.

        A view costs as much as a small kernel, and a penalty needs one of the five.
        """
        if transformed():
            tables, rows = counts.split_with_sizes([counts.numel() - 2, 2])
            count, correct, predicted = tables.view(3, *mass.shape).unbind()
            invalid, nonfinite = rows.unbind()
            integers = (count, correct, predicted, prediction, invalid, nonfinite)
            return cls(mass, hit, *integers, joint=joint, confusion=confusion, contested=contested)
        stats = object.__new__(cls)
        stats.__dict__.update(mass=mass, hit=hit, _counts=counts, prediction=prediction, joint=joint)
        stats.__dict__.update(confusion=confusion, contested=contested, synced=False)
        return stats

    def __getattr__(self, name: str) -> Tensor:
        """A view of ``_counts``, of which the instance keeps hold."""
        counts = self.__dict__.get("_counts")
        if counts is None or name not in _VIEWS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        shape, position = self.mass.shape, _VIEWS.index(name)
        view = count_table(counts, shape, position) if position < 3 else counts[3 * shape.numel() + position - 3]
        if not transformed():  # whose tensors must not outlive them
            self.__dict__[name] = view
        return view

    def detach(self) -> "BatchStats":
        """The same values without gradient."""
        return pytree.tree_map(lambda t: t.detach(), self)

    def __add__(self, other: "BatchStats") -> "BatchStats":
        """Statistics of both batches together; predictions and joint rows belong to one batch and are dropped."""
        if not isinstance(other, BatchStats):
            return NotImplemented
        if self.mass.shape != other.mass.shape:
            raise ValueError(
                f"BatchStats: expected statistics of shape {tuple(self.mass.shape)}, got {tuple(other.mass.shape)}"
            )
        if self.synced != other.synced:
            raise ValueError("BatchStats: expected both of all processes or both of this one, got one of each")
        summed: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        both = self.confusion is not None and other.confusion is not None
        confusion = self.confusion + other.confusion if both else None  # type: ignore[operator]
        empty = self.prediction.new_empty(0)
        return BatchStats(**summed, prediction=empty, confusion=confusion, synced=self.synced)

    def all_reduce(self, group: Any = None) -> "BatchStats":
        """Statistics of all processes of ``group`` (None: the default group) together, with gradient.

        Sums, and of ``joint`` the rows of all cells that any process has. The gradient of a sum is the sum of the
        gradients, so that DDP's averaging gives the gradient of one process on the whole batch. Every process must
        call it; two collectives, and with ``joint`` three more, one of which is waited for: how many cells there are
        at most. Without an initialised process group it returns the statistics unchanged. ``prediction`` belongs to
        one process and is dropped.
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
        named: dict[str, Any] = dict(zip(_SUMMED, summed, strict=True))
        empty = self.prediction.new_empty(0)
        return BatchStats(**named, prediction=empty, joint=joint, confusion=confusion, synced=True)

    def summary(self) -> dict[str, float]:
        """Scalars for a log; reads the device once (the one synchronisation of this class on one process).

        ``accuracy``, ``balanced_accuracy`` (mean over the classes present), ``best_class_accuracy`` and
        ``worst_class_accuracy`` in [0, 1]; ``samples``, ``invalid`` and ``nonfinite`` as numbers of samples. Without
        a sample the accuracies are NaN.
        """
        count, correct = self.count.sum(0), self.correct.sum(0)
        accuracy = correct / count  # NaN for absent classes
        present = count > 0
        values = torch.stack(
            [
                correct.sum() / count.sum(),
                accuracy.nanmean(),
                torch.where(present, accuracy, -torch.inf).amax(),
                torch.where(present, accuracy, torch.inf).amin(),
                count.sum().to(accuracy.dtype),
                self.invalid.to(accuracy.dtype),
                self.nonfinite.to(accuracy.dtype),
            ]
        ).tolist()
        names = ("accuracy", "balanced_accuracy", "best_class_accuracy", "worst_class_accuracy")
        result = dict(zip((*names, "samples", "invalid", "nonfinite"), values, strict=True))
        if not result["samples"]:
            result.update(dict.fromkeys(names, float("nan")))
        return result


_VIEWS = ("count", "correct", "predicted", "invalid", "nonfinite")  # in the order of the primitive's counts
_SUMMED = ("mass", "hit", *_VIEWS)
_INTEGERS = (*_VIEWS, "confusion")
_FLAGS = ("contested", "synced")
_TENSORS = tuple(f.name for f in fields(BatchStats) if f.name not in _FLAGS)


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
