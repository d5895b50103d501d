"""``label_index``: the labels present in a batch, in fixed-capacity slots, sorted once."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from classfair import _library, backends, reference
from classfair import _validate as check


class LabelIndex(NamedTuple):
    """Rows of a batch grouped by label, or by (label, group).

    ``M = min(N, C * G)`` slots, of which ``num_slots`` are used. Rows without a slot (ignored, or group -1) have
    slot -1 and come last in ``order``.
    """

    slot: Tensor  # (N,) int64 in [-1, M)
    key_of_slot: Tensor  # (M,) int64: label * num_groups + group; 0 where unused
    order: Tensor  # (N,) int64: rows sorted by slot, stable
    start: Tensor  # (M + 1,) int64: slot s owns order[start[s]:start[s + 1]]
    num_slots: Tensor  # () int64
    num_keys: int  # C * G: whoever reads rows of a table by key_of_slot knows that it has as many


def check_index(function: str, index: LabelIndex, num_classes: int, device: torch.device) -> None:
    """Whether an index is of these classes, without groups: keys of others would lead out of a table of them."""
    if index.num_keys != num_classes:
        raise ValueError(f"{function}: expected a LabelIndex of {num_classes} classes, got one of {index.num_keys}")
    if index.slot.device != device:
        raise ValueError(f"{function}: expected a LabelIndex on {device}, got one on {index.slot.device}")


def _fake(
    target: Tensor, group: Tensor | None, num_classes: int, num_groups: int, ignore_index: int
) -> tuple[Tensor, ...]:
    rows = target.shape[0]
    capacity = torch.sym_min(rows, num_classes * num_groups)
    new = target.new_empty
    return new(rows), new(capacity), new(rows), new(capacity + 1), new(())


_library.define(
    "label_index(Tensor target, Tensor? group, int num_classes, int num_groups, int ignore_index)"
    " -> (Tensor slot, Tensor key_of_slot, Tensor order, Tensor start, Tensor num_slots)",
    _fake,
)


def label_index(
    target: Tensor,  # (N,)
    num_classes: int,
    group: Tensor | None = None,  # (N,)
    num_groups: int = 1,
    *,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LabelIndex:
    """Group the rows of a batch by label, without a host synchronisation on GPUs.

    Args:
        target: ``(N,)`` int64 or uint8, in ``[0, num_classes)`` or ``ignore_index``.
        num_classes: number of classes C.
        group: ``(N,)`` int64 in ``[0, num_groups)``, or -1 for "in no group".
        num_groups: number of groups G.
        ignore_index: label of rows that get no slot.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the default (see :mod:`classfair.backends`).

    Returns:
        A :class:`LabelIndex`; every tensor is int64 on the device of ``target``. No gradient.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape, device or size (C * G is at most 2^60).
        IndexError: on the CPU, for a label or group out of range, naming the first such row. On other devices such
            rows get slot -1.

    Determinism: bitwise, any number of threads.

    Example:
        >>> index = label_index(torch.tensor([2, 0, 2, 1]), num_classes=5)
        >>> index.slot.tolist(), index.key_of_slot.tolist(), index.num_slots.item()
        ([2, 0, 2, 1], [0, 1, 2, 0], 3)
    """
    check.check_labels_tensor("label_index", "target", target, None, check.LABELS)
    check.check_keys("label_index", num_classes, num_groups)
    ignore_index = check.integer("label_index", "ignore_index", ignore_index)
    if group is not None:
        check.check_labels_tensor("label_index", "group", group, target.shape)
        check.check_device("label_index", "group", group, target.device, "target")
        group = group.contiguous()
    name = backends.choose("label_index", target.device, backend)
    arguments = (target.long().contiguous(), group, num_classes, num_groups, ignore_index)
    operator = reference.label_index if name == "reference" else backends.namespace(name).label_index
    return LabelIndex._make((*operator(*arguments), num_classes * num_groups))


class Cells(NamedTuple):
    """The (label, group) cells of a batch, in ``M`` places of which ``num_cells`` are used."""

    slot: Tensor  # (N,) int64 in [-1, M)
    key: Tensor  # (M,) int64: label * num_groups + group, ascending; 0 where unused
    num_cells: Tensor  # () int64


def contested_cells(index: LabelIndex, num_groups: int) -> Cells:
    """Of the cells in ``index``, by label and group, those whose label the batch has in another group too; unchecked.

    Rows of the others get slot -1. On the CPU in eager mode M is the number of cells in use; elsewhere it is that of
    ``index``, because nobody may wait for the number.

    Example:
        >>> label, group = torch.tensor([2, 0, 2]), torch.tensor([0, 0, 1])
        >>> contested_cells(label_index(label, 3, group, 2), 2).slot.tolist()
        [0, -1, 1]
    """
    slot, key_of_slot, capacity = index.slot, index.key_of_slot, index.key_of_slot.shape[0]
    if slot.device.type == "cpu" and not backends.transformed():
        return _contested_cells_on_the_host(index, num_groups)
    place = torch.arange(capacity, device=slot.device)
    label = torch.where(place < index.num_slots, key_of_slot // num_groups, -1 - place)  # unused places share none
    same = (label[1:] == label[:-1]).to(torch.int64)
    none = same.new_zeros(min(capacity, 1))
    contested = torch.cat([none, same]) + torch.cat([same, none]) > 0
    number = torch.cumsum(contested, 0) - 1
    spare = slot.new_full((1,), -1)  # of rows without a slot
    slot = torch.cat([torch.where(contested, number, -1), spare])[slot]
    key = key_of_slot.new_zeros(capacity + 1).scatter_(0, torch.where(contested, number, capacity), key_of_slot)
    return Cells(slot, key[:capacity], contested.sum())


def _contested_cells_on_the_host(index: LabelIndex, num_groups: int) -> Cells:
    """The same in NumPy, where 256 labels take 16 microseconds; those operators of torch take 107."""
    key = index.key_of_slot.numpy()[: int(index.num_slots)]
    label = key // num_groups
    same, last = label[1:] == label[:-1], len(key)
    contested = np.zeros(last + 1, dtype=bool)  # the last place is that of rows without a slot
    contested[1:last] = same
    contested[: last - 1] |= same
    number = np.where(contested, np.cumsum(contested) - 1, -1)
    kept = key[contested[:last]]
    return Cells(torch.from_numpy(number[index.slot.numpy()]), torch.from_numpy(kept), torch.tensor(len(kept)))
