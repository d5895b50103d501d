"""Which images an epoch has, and in what order: class-balanced sets, repeated samples, unequal parts of processes."""

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from classfair import _validate as check
from classfair.targets import _label_tensor, _stored_targets


class ClassBalancedSampler(Sampler[int]):
    """Every class equally often: draws a class that is present, then one of its samples, both uniformly.

    With replacement, so that an epoch leaves out samples of frequent classes and repeats those of rare ones. All
    processes draw the same indices, and each takes every ``num_replicas``-th of them. Call :meth:`set_epoch` before
    each epoch, as for :class:`torch.utils.data.DistributedSampler`; without it every epoch is the same.
    Source: Kang et al. 2020, "Decoupling representation and classifier", section 4.1, eq. 1 with q = 0.

    Args:
        dataset_or_targets: integer labels, or a data set that keeps them, as for :func:`classfair.class_counts`.
        num_classes: C, to refuse labels from C on; None accepts any label >= 0.
        num_samples: indices of an epoch over all processes, rounded up to a multiple of their number; None: as many
            as there are labels.
        seed: >= 0, of the draws, together with the epoch; the same on every process.
        num_replicas, rank: number of processes and the one this is; None: those of the default process group, or 1
            and 0 without one.

    Returns:
        Iterates over ``len(sampler)`` indices, the same number on every process.

    Raises:
        TypeError: no labels found, or they are no integers.
        ValueError: no sample at all, a label out of range (it names the first), or numbers out of range.

    Example:
        >>> labels = [0] * 98 + [1] * 2
        >>> sampler = classfair.data.ClassBalancedSampler(labels, num_samples=1000)
        >>> drawn = torch.tensor([labels[i] for i in sampler])
        >>> 450 < int(drawn.sum()) < 550
        True
    """

    def __init__(
        self,
        dataset_or_targets: Any,
        num_classes: int | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        function = "ClassBalancedSampler"
        labels = _labels(function, dataset_or_targets, num_classes)
        self._replicas, self._rank = _replicas_and_rank(function, num_replicas, rank)
        total = len(labels) if num_samples is None else num_samples
        check.check_count(function, "num_samples", total)
        check.check_count(function, "seed", seed, 0)
        self._len = -(-total // self._replicas)
        self.seed, self.epoch = seed, 0
        # Samples sorted by class: those of the k-th class present are _order[_start[k] : _start[k] + _count[k]].
        self._order = labels.argsort(stable=True)
        self._count = labels.unique(return_counts=True)[1]
        self._start = self._count.cumsum(0) - self._count

    def set_epoch(self, epoch: int) -> None:
        """Draw other indices in the next iteration: a function of seed and epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        # Seed and epoch are hashed, not added: epoch 1 of seed 0 is not epoch 0 of seed 1.
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        draws = (self._len * self._replicas,)
        k = torch.randint(len(self._count), draws, generator=generator)
        # The remainder of so large a number is uniform to one in 2^62 / count, whatever the count is.
        within = torch.randint(1 << 62, draws, generator=generator) % self._count[k]
        yield from self._order[self._start[k] + within][self._rank :: self._replicas].tolist()


def balanced_subset(
    dataset_or_targets: Any,
    per_class: int,
    *,
    seed: int,
    num_classes: int | None = None,
    allow_fewer: bool = False,
) -> Tensor:
    """Indices of as many samples of every class, e.g. of a meta set for :class:`classfair.MetaLADStep`.

    Args:
        dataset_or_targets: integer labels, or a data set that keeps them, as for :func:`classfair.class_counts`.
        per_class: samples of each class, drawn without replacement.
        seed: >= 0, of the draw; the same on every process.
        num_classes: C; None: one more than the largest label.
        allow_fewer: take all samples of a class that has fewer, at least one.

    Returns:
        ``(C * per_class,)`` int64 in ascending order, on the CPU. Those of a smaller ``per_class`` and the same seed
        are a part of them.

    Raises:
        TypeError: no labels found, or they are no integers.
        ValueError: a class with fewer samples, by its number; a label or argument out of range.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
        >>> chosen = classfair.data.balanced_subset(labels, 2, seed=0)
        >>> labels[chosen]
        tensor([0, 0, 1, 1, 2, 2])
    """
    function = "balanced_subset"
    labels = _labels(function, dataset_or_targets, num_classes)
    check.check_size(function, "per_class", per_class)
    check.check_number(function, "seed", seed, 0)
    count = torch.bincount(labels, minlength=num_classes or 0)
    least = 1 if allow_fewer else per_class
    if bool((count < least).any()):
        c = int((count < least).nonzero()[0])
        raise ValueError(f"{function}: expected {least} or more samples of every class, got {count[c]} of class {c}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    start = count.cumsum(0) - count
    rank = torch.arange(len(labels)) - start[labels[order]]  # of a sample within its class
    return order[rank < per_class].sort().values


class UnpaddedDistributedSampler(Sampler[int]):
    """Evaluation over several processes: every index exactly once, in order, none added.

    :class:`torch.utils.data.DistributedSampler` fills up the last processes with the first samples again. In an image
    folder those are all of one class, whose accuracy then is off while the mean hardly moves. Here lengths differ by
    at most one, and a process may have nothing: sum counts over processes after the loop
    (:meth:`classfair.BatchStats.all_reduce`), and do not wrap the model in DDP for evaluation, whose collectives in
    each forward pass would wait for a process without a batch.

    Args:
        dataset: anything with a length.
        num_replicas, rank: as for :class:`ClassBalancedSampler`.

    Returns:
        Iterates over ``rank``, ``rank + num_replicas``, ... below ``len(dataset)``.

    Raises:
        TypeError, ValueError: no length, or rank or number of processes out of range.

    Example:
        >>> [list(classfair.data.UnpaddedDistributedSampler(range(5), num_replicas=2, rank=r)) for r in (0, 1)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Sized, *, num_replicas: int | None = None, rank: int | None = None) -> None:
        function = "UnpaddedDistributedSampler"
        if not isinstance(dataset, Sized):
            raise TypeError(f"{function}: expected dataset with a length, got {type(dataset).__name__}")
        self.dataset = dataset
        self._replicas, self._rank = _replicas_and_rank(function, num_replicas, rank)

    def _indices(self) -> range:
        return range(self._rank, len(self.dataset), self._replicas)

    def __len__(self) -> int:
        return len(self._indices())

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())


def _labels(function: str, source: Any, num_classes: int | None) -> Tensor:  # (N,) int64
    stored = _stored_targets(source)
    if stored is None:
        kind = type(source).__name__
        raise TypeError(f"{function}: expected labels or a data set with .targets, .labels or .tensors, got {kind}")
    shape = tuple(np.shape(stored.cpu() if isinstance(stored, Tensor) else stored))
    if len(shape) != 1:  # one-hot rows, or labels of pixels
        raise ValueError(f"{function}: expected one label per sample, got labels of shape {shape}")
    labels = _label_tensor(function, stored, num_classes)
    if labels.numel() == 0:
        raise ValueError(f"{function}: expected at least one sample, got none")
    return labels


class UpweightedSampler(Sampler[int]):
    """Every sample once in an epoch, and some of them more often: the second training of "just train twice".

    All samples are shuffled together. All processes draw the same order, and each takes every ``num_replicas``-th of
    it; where that does not come out even, the last processes begin again with the first of the order. Call
    :meth:`set_epoch` before each epoch.
    Source: Liu et al. 2021, "Just train twice: improving group robustness without training group information", section
    4; a sample of the error set is seen ``1 + times`` times, as in their code.

    Args:
        dataset: anything with a length, N.
        upweighted: ``(N,)`` bool, which samples are repeated.
        times: >= 0, how often each of them is added.
        seed: >= 0, of the order, together with the epoch; the same on every process.
        num_replicas, rank: as for :class:`classfair.data.ClassBalancedSampler`.

    Returns:
        Iterates over ``len(sampler)`` indices, the same number on every process.

    Raises:
        TypeError, ValueError: no length, no samples, a mask that is none or of another length, numbers out of range.

    Example:
        >>> sampler = classfair.data.UpweightedSampler(range(4), torch.tensor([False, True, False, False]), times=2)
        >>> sorted(sampler)
        [0, 1, 1, 1, 2, 3]
    """

    def __init__(
        self,
        dataset: Sized,
        upweighted: Any,
        times: int,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        name = "UpweightedSampler"
        if not isinstance(dataset, Sized):
            raise TypeError(f"{name}: expected dataset with a length, got {type(dataset).__name__}")
        mask = torch.as_tensor(upweighted).cpu()
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected upweighted as booleans, one for each sample, got {mask.dtype}")
        if not len(dataset) or mask.shape != (len(dataset),):
            raise ValueError(f"{name}: expected upweighted for {len(dataset)} > 0 samples, got {tuple(mask.shape)}")
        check.check_range(name, "times", check.integer(name, "times", times), 0)
        check.check_range(name, "seed", seed, 0)
        self._replicas, self._rank = _replicas_and_rank(name, num_replicas, rank)
        self._every = torch.cat([torch.arange(len(mask)), mask.nonzero().flatten().repeat(times)])
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Another order in the next iteration: a function of seed and epoch."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """The indices of the epoch, of all processes."""
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        return self._every[torch.randperm(len(self._every), generator=generator)]

    def __len__(self) -> int:
        return (len(self._every) + self._replicas - 1) // self._replicas

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        at = torch.arange(self._rank, len(self) * self._replicas, self._replicas) % len(order)
        yield from order[at].tolist()


def _replicas_and_rank(function: str, num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """What is given, else that of the default process group, else 1 and 0."""
    grouped = dist.is_available() and dist.is_initialized()
    num_replicas = (dist.get_world_size() if grouped else 1) if num_replicas is None else num_replicas
    rank = (dist.get_rank() if grouped else 0) if rank is None else rank
    check.check_range(function, "num_replicas", num_replicas, 1)
    check.check_range(function, "rank", rank, 0, num_replicas - 1)
    return num_replicas, rank
