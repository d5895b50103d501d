"""Batches of several processes together, each process with the same result: a constant number of collectives."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from classfair.ops import LabelIndex, SlotMoments, class_moments, class_moments_merge, label_index


def world_size(group: Any) -> int:
    """Processes of a group; 1 where none was initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def agree_on_rows(features: Tensor, group: Any, max_batch: int | None) -> int:
    """A number of rows that the batch of no process exceeds, the same for all."""
    rows = features.shape[0]
    if max_batch is not None:
        if rows > max_batch:
            raise ValueError(f"ClassStatistics.update: expected at most max_batch={max_batch} samples, got {rows}")
        return max_batch
    largest = torch.tensor(rows, device=features.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)


def _padded(value: Tensor, rows: int, fill: float = 0) -> Tensor:
    out = value.new_full((rows, *value.shape[1:]), fill)
    out[: value.shape[0]] = value
    return out


def _all_gather(value: Tensor, group: Any) -> Tensor:
    """(...) of each process to (processes, ...), in rank order."""
    out = value.new_empty((dist.get_world_size(group), *value.shape))
    dist.all_gather(list(out.unbind(0)), value, group=group)
    return out


def gather_rows(
    features: Tensor, target: Tensor, ignore_index: int, group: Any, max_batch: int | None
) -> tuple[Tensor, Tensor]:
    """Features (P * rows, D) and labels of all processes; what fills up a smaller batch is ignored."""
    rows = agree_on_rows(features, group, max_batch)
    every_target = _all_gather(_padded(target, rows, ignore_index), group)
    return _all_gather(_padded(features.detach(), rows), group).flatten(0, 1), every_target.flatten()


def gather_moments(batch: SlotMoments, key: Tensor, slots: int, group: Any) -> tuple[list[SlotMoments], Tensor]:
    """The rows of every process, (slots, D) each, and their classes (P, slots), -1 where there is none."""
    integers = torch.cat([_padded(batch.count, slots), _padded(key, slots), batch.nonfinite[None]])
    floats = [_padded(batch.mean, slots)]
    if batch.variance is not None:
        floats.append(_padded(batch.variance, slots))
    every_integer = _all_gather(integers, group)
    every_float = _all_gather(torch.stack(floats), group)
    count, keys, nonfinite = every_integer.split([slots, slots, 1], 1)
    batches = []
    for p in range(count.shape[0]):
        mean, *variance = every_float[p]
        batches.append(SlotMoments(count[p], mean, variance[0] if variance else None, nonfinite[p, 0]))
    return batches, torch.where(count > 0, keys, -1)


def merge_processes(
    batch: SlotMoments, features: Tensor, index: LabelIndex, group: Any, max_batch: int | None, backend: str | None
) -> tuple[SlotMoments, Tensor]:
    """One batch from those of all processes, and the classes of its rows; ``batch`` is of this process's features."""
    slots = min(agree_on_rows(features, group, max_batch), index.num_keys)
    batches, keys = gather_moments(batch, index.key_of_slot, slots, group)
    return merge_batches(batches, keys, index.num_keys, backend)


def batch_means(
    features: Tensor, index: LabelIndex, *, process_group: Any, sync: bool, max_batch: int | None
) -> tuple[SlotMoments, Tensor]:
    """Counts and means by class of a batch, of all processes together, and the classes of the rows; unchecked."""
    batch = class_moments(features, index, variance=False)
    if sync and world_size(process_group) > 1:
        return merge_processes(batch, features, index, process_group, max_batch, None)
    return batch, index.key_of_slot


def merge_batches(
    batches: list[SlotMoments], keys: Tensor, num_classes: int, backend: str | None
) -> tuple[SlotMoments, Tensor]:
    """One batch from those of all processes, merged in rank order, and the classes of its rows.

    An exponential state fades once a step, however many processes: they are merged with each other before.
    """
    index = label_index(keys.flatten(), num_classes, ignore_index=-1)
    slot, slots = index.slot.view_as(keys), index.key_of_slot.shape[0]
    mean = batches[0].mean.new_zeros(slots, batches[0].mean.shape[1])
    variance = None if batches[0].variance is None else torch.zeros_like(mean)
    count = keys.new_zeros(slots)
    for p, batch in enumerate(batches):
        class_moments_merge(batch, slot[p], count, mean, variance, backend=backend)
    nonfinite = torch.stack([batch.nonfinite for batch in batches]).sum()
    return SlotMoments(count, mean, variance, nonfinite), index.key_of_slot


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, group: Any) -> Tensor:
        value = value.contiguous().clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, group: Any) -> Tensor:
        return _all_gather(value.contiguous(), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group)[dist.get_rank(ctx.group)], None


def sum_with_gradient(values: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Sums over processes of tensors of one dtype, in one exchange. The gradient of a sum is the sum of the gradients:
    each process has a loss of the whole."""
    flat = _Sum.apply(torch.cat([v.reshape(-1) for v in values]), group)
    parts = flat.split_with_sizes([v.numel() for v in values])
    return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]


def gather_with_gradient(rows: Tensor, key: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Rows (P, M, C) and their keys (P, M) of all processes; what fills up those of a smaller batch has key -1."""
    most = agree_on_rows(rows, group, None)
    keys = _all_gather(_padded(key, most, -1), group)
    pad = rows.new_zeros(most - rows.shape[0], rows.shape[1])
    return _Gather.apply(torch.cat([rows, pad]), group), keys
