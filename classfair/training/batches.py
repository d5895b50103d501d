"""Training and validation images as batches, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from classfair import BatchStats
from classfair.data import ClassBalancedSampler, UnpaddedDistributedSampler
from classfair.training.config import TrainConfig
from classfair.training.distributed import Processes
from classfair.training.group_table import Groups
from classfair.training.image_list import ImageList

IGNORED = -100  # label of an image that counts for nothing

#: What a batch is asked for with: the epoch, and the indices of its images.
Request = tuple[int, list[int]]


@dataclass(frozen=True)
class Data:
    """The images of one seed. Both data sets answer a :data:`Request` with ``(images, target)``."""

    train: Dataset[Any]
    val: Dataset[Any]
    train_targets: Tensor  # (N,) int64
    num_val: int
    class_names: list[str]
    groups: Groups | None = None
    images: ImageList | None = None  # of a folder
    train_plain: Dataset[Any] | None = None  # training images prepared as those of validation, where that differs
    meta: Dataset[Any] | None = None  # on which omega is learnt
    num_meta: int = 0


class TensorBatches(Dataset[Any]):
    """Images that fit in memory."""

    def __init__(self, images: Tensor, target: Tensor) -> None:
        self.images, self.target = images, target

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        _, indices = request
        return self.images[indices], self.target[indices]


class Draw(IntEnum):
    """What random numbers are drawn for."""

    ORDER, IMAGE, MIX, DROPOUT, HEAD, GROUP, META, STAGE, BIASED, TRIAL = range(10)


def derived_seed(purpose: Draw, *parts: int) -> int:
    """A seed of its own for every purpose and combination of numbers, e.g. seed, epoch and process."""
    return int(np.random.SeedSequence((purpose, *parts)).generate_state(1, np.uint64)[0])


class TrainingOrder(Sampler[Request]):
    """Requests of one process for one epoch, the same number on every process.

    An optimiser step takes the next ``world * batch_size * grad_accum`` images of the epoch's order, the last step
    what is left, and deals them out as evenly as it can: to forward passes, and those of one pass to processes. So what
    a step computes does not depend on how many processes and forward passes share it, nor what a pass of all processes
    together computes on their number. A part without an image gets one that counts for nothing (see :meth:`counts`),
    because every process must take part in every collective. Batch norm cannot do with one image, so that parts have
    two at least; a last step of a single image joins the one before.

    ``order`` takes the place of the order of ``config.sampler``.
    """

    def __init__(
        self,
        targets: Tensor,
        config: TrainConfig,
        seed: int,
        epoch: int,
        processes: Processes,
        order: Tensor | None = None,
    ) -> None:
        self.epoch = epoch
        if order is None:
            order = _order(targets, config, seed, epoch)
        steps = list(order.split(config.grad_accum * processes.world * config.batch_size))
        least = min(2, config.batch_size)
        if len(steps) > 1 and len(steps[-1]) < least:
            steps[-2:] = [torch.cat(steps[-2:])]
        self._filler = order[:least]
        self._requests = [
            [_deal(images, processes.world, least)[processes.rank] for images in _deal(step, config.grad_accum, least)]
            for step in steps
        ]

    def counts(self, step: int, part: int) -> bool:
        """Whether the images of a forward pass count, or only stand in for none."""
        return len(self._requests[step][part]) > 0

    @property
    def steps(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        for step in self._requests:
            for indices in step:
                yield self.epoch, (indices if len(indices) else self._filler).tolist()

    def __len__(self) -> int:
        return sum(map(len, self._requests))


def _order(targets: Tensor, config: TrainConfig, seed: int, epoch: int) -> Tensor:
    """Indices of the training images of an epoch."""
    if config.sampler == "class-balanced":
        sampler = ClassBalancedSampler(targets, seed=seed, num_replicas=1, rank=0)
        sampler.set_epoch(epoch)
        return torch.tensor(list(sampler))
    generator = torch.Generator().manual_seed(derived_seed(Draw.ORDER, seed, epoch))
    return torch.randperm(len(targets), generator=generator)


def ignored(target: Any) -> Any:
    """The same target, counting for nothing."""
    if isinstance(target, Tensor):
        return torch.full_like(target, IGNORED)
    return target._replace(y_a=ignored(target.y_a), y_b=ignored(target.y_b))


def _deal(step: Tensor, parts: int, least: int) -> list[Tensor]:
    """Parts of nearly equal size and at least that many images; some may be empty for it."""
    filled = max(1, min(parts, len(step) // least))
    return [*step.tensor_split(filled), *[step[:0]] * (parts - filled)]


class EvaluationOrder(Sampler[Request]):
    """Requests of one process that together cover every image exactly once; a process may have none."""

    def __init__(self, num_images: int, batch_size: int, processes: Processes) -> None:
        world, rank = processes.world, processes.rank
        mine = UnpaddedDistributedSampler(range(num_images), num_replicas=world, rank=rank)
        self._batches = BatchSampler(mine, batch_size, drop_last=False)

    def __iter__(self) -> Iterator[Request]:
        yield from ((0, indices) for indices in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def loader(
    dataset: Dataset[Any], order: Sampler[Request], config: TrainConfig, device: torch.device
) -> DataLoader[Any]:
    """A loader for one epoch: a fresh one each time, so that nothing of its state needs saving."""
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,  # requests are whole batches
        collate_fn=_as_it_is,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # unused, but else drawn from the global random state
    )


class ResourceError(RuntimeError):
    """Something that the machine has too little of: memory, processes."""


@contextlib.contextmanager
def resource_errors() -> Iterator[None]:
    """ResourceError in one sentence where a loader's process dies, at any moment, or memory is out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[-1] if "Original Traceback" in str(error) else lines[0]
        if "DataLoader worker" in str(error):
            hint = "out of memory, or killed; fewer --workers need less"
            raise ResourceError(
                f"expected the processes that load images to live, one ended ({reason}): {hint}"
            ) from None
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise ResourceError(f"expected memory enough ({reason}): a smaller --batch-size needs less") from None
        raise


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


def counted(stats: BatchStats, target: Tensor, group: Tensor | None) -> Tensor:
    """(G, C) images of a batch that are not ignored, with those that statistics leave out."""
    groups, classes = stats.count.shape
    there = target != IGNORED
    cell = torch.where(there, target if group is None else group * classes + target, 0)
    count = torch.zeros(groups * classes, dtype=torch.int64, device=target.device)
    return count.scatter_add_(0, cell, there.long()).view(groups, classes)
