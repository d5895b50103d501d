"""``label_index``: the labels present in a batch, in fixed-capacity slots, sorted once."""

from typing import NamedTuple

import torch
from torch import Tensor

from classfair import backends, reference
from classfair._validate import check_labels_tensor
from classfair.ops import _library
from classfair.ops._autograd import transformed


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


def _contested_fake(slot: Tensor, key_of_slot: Tensor, num_slots: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    return torch.empty_like(slot), torch.empty_like(key_of_slot), torch.empty_like(num_slots)


_library.define(
    "contested_cells(Tensor slot, Tensor key_of_slot, Tensor num_slots, int num_groups)"
    " -> (Tensor slot, Tensor key_of_slot, Tensor num_slots)",
    _contested_fake,
)


class Cells(NamedTuple):
    """The (label, group) cells of a batch, in ``M`` places of which ``num_cells`` are used."""

    slot: Tensor  # (N,) int64 in [-1, M)
    key: Tensor  # (M,) int64: label * num_groups + group, ascending; 0 where unused
    num_cells: Tensor  # () int64


def contested_cells(index: LabelIndex, num_groups: int, *, backend: str | None = None) -> Cells:
    """Of the cells in ``index``, by label and group, those whose label the batch has in another group too; unchecked.

    Rows of the others get slot -1. On the CPU in eager mode M is the number of cells in use; elsewhere it is that of
    ``index``, because nobody may wait for the number.

    Example:
        >>> label, group = torch.tensor([2, 0, 2]), torch.tensor([0, 0, 1])
        >>> contested_cells(label_index(label, 3, group, 2), 2).slot.tolist()
        [0, -1, 1]
    """
    arguments = (index.slot, index.key_of_slot, index.num_slots, num_groups)
    # A kernel on the CPU only, where a dozen small operators cost as much as they save.
    if index.slot.device.type == "cpu" and backends.choose("label_index", index.slot.device, backend) == "native":
        cells = Cells(*backends.namespace("native").contested_cells(*arguments))
    else:
        cells = Cells(*reference.contested_cells(*arguments))
    if index.slot.device.type != "cpu" or transformed():
        return cells
    return cells._replace(key=cells.key[: int(cells.num_cells)])


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
        target: ``(N,)`` int64 in ``[0, num_classes)`` or ``ignore_index``.
        num_classes: number of classes C.
        group: ``(N,)`` int64 in ``[0, num_groups)``, or -1 for "in no group".
        num_groups: number of groups G.
        ignore_index: label of rows that get no slot.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the default (see :mod:`classfair.backends`).

    Returns:
        A :class:`LabelIndex`; every output is int64 on the device of ``target``. No gradient.

    Raises:
        IndexError: on the CPU, for a label or group out of range, naming the first such row. On other devices such
            rows get slot -1.

    Determinism: bitwise, any number of threads.

    Example:
        >>> index = label_index(torch.tensor([2, 0, 2, 1]), num_classes=5)
        >>> index.slot.tolist(), index.key_of_slot.tolist(), index.num_slots.item()
        ([2, 0, 2, 1], [0, 1, 2, 0], 3)
    """
    check_labels_tensor("label_index", "target", target, target.shape[:1])
    if group is not None:
        check_labels_tensor("label_index", "group", group, target.shape)
    name = backends.choose("label_index", target.device, backend)
    group = None if group is None else group.contiguous()
    arguments = (target.contiguous(), group, num_classes, num_groups, ignore_index)
    if name == "reference":
        return LabelIndex(*reference.label_index(*arguments))
    return LabelIndex(*backends.namespace(name).label_index(*arguments))
