"""Batches and their order: mixed targets without dense probabilities, class-balanced sets, and samplers."""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from classfair import _validate as check
from classfair._replicas import replicas_and_rank
from classfair.targets import MixedTarget, _label_tensor, _stored_targets
from classfair.upweighted import UpweightedSampler as UpweightedSampler


class MixedTargetCollate:
    r"""A ``collate_fn`` that applies MixUp or CutMix and keeps the labels: ``(images, MixedTarget)``.

    The loss from two labels and a share is that from dense probabilities, without an ``(N, C)`` tensor to make, move
    and read; and losses that perturb logits by the label (pair rows, margins) can be mixed.

    Args:
        mix: ``torchvision.transforms.v2.MixUp`` or ``CutMix`` without ``num_classes``, or ``RandomChoice``,
            ``RandomApply`` or ``Compose`` with such; or any function of images ``(N, ...)`` and label rows ``(N, N)``
            that returns both, mixed alike, at most two samples in each.
        collate: makes ``(images, labels)`` of a list of samples; labels are ``(N,)`` integers, -100 included.

    Returns:
        Called with a list of samples: the mixed images, and a :class:`MixedTarget` of int64 ``y_a``, ``y_b`` ``(N,)``
        and float32 ``lam`` ``(N,)``: the share of ``y_a``, which is the larger one. Where nothing is mixed, ``lam`` is
        1 and ``y_b`` is ``y_a``. With CutMix shares are those of the area, after the box was cut off at the borders.

    Random numbers are those that ``mix`` draws: torch's, seeded by the data loader in each worker.

    Raises:
        TypeError, ValueError: ``mix`` is no function or has ``num_classes``; the batch is no pair of images and integer
            labels; a sample is a mixture of more than two.

    Source: Zhang et al. 2018, MixUp; Yun et al. 2019, CutMix.

    Example:
        >>> def swap(images, rows):  # torchvision.transforms.v2.MixUp(alpha=0.8) draws the share
        ...     return 0.75 * images + 0.25 * images.roll(1, 0), 0.75 * rows + 0.25 * rows.roll(1, 0)
        >>> collate = classfair.data.MixedTargetCollate(swap)
        >>> images, target = collate([(torch.zeros(3, 2, 2), 5), (torch.ones(3, 2, 2), 8)])
        >>> target
        MixedTarget(y_a=tensor([5, 8]), y_b=tensor([8, 5]), lam=tensor([0.7500, 0.7500]))
    """

    def __init__(self, mix: Callable[..., Any], collate: Callable[[Any], Any] = default_collate) -> None:
        for name, function in (("mix", mix), ("collate", collate)):
            if not callable(function):
                raise TypeError(f"MixedTargetCollate: expected {name} as a function, got {type(function).__name__}")
        _check_no_num_classes(mix)
        self.mix, self.collate = mix, collate

    def __call__(self, samples: Any) -> tuple[Tensor, MixedTarget]:
        batch = self.collate(samples)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise TypeError(f"MixedTargetCollate: expected batches of images and labels, got {got}")
        images, labels = batch
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
            got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"MixedTargetCollate: expected integer labels of shape (N,), got {got}")
        # As label of sample i, mix gets row i of the identity; what comes back tells which samples it has mixed.
        images, shares = self.mix(images, torch.eye(len(labels), dtype=torch.float32, device=labels.device))
        return images, _mixed_target(labels.long(), shares)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mix})"


def _check_no_num_classes(mix: Any) -> None:
    for part in getattr(mix, "transforms", ()):
        _check_no_num_classes(part)
    num_classes = getattr(mix, "num_classes", None)
    if num_classes is not None:
        raise ValueError(
            f"MixedTargetCollate: expected {type(mix).__name__} without num_classes (no dense labels are made),"
            f" got num_classes={num_classes}; leave it out"
        )


def _mixed_target(labels: Tensor, shares: Tensor) -> MixedTarget:  # (N,), (N, N)
    parts = shares.count_nonzero(1)
    if bool((parts > 2).any()):
        i = int(parts.argmax())
        raise ValueError(f"MixedTargetCollate: expected mixtures of at most two, got {parts[i]} in sample {i}")
    if not len(labels):
        return MixedTarget(labels, labels, shares.new_ones(0))
    share_a, a = shares.max(1)
    share_b, b = shares.scatter(1, a.unsqueeze(1), 0.0).max(1)
    alone = share_b == 0
    return MixedTarget(labels[a], labels[torch.where(alone, a, b)], torch.where(alone, 1.0, share_a))


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
        self._replicas, self._rank = replicas_and_rank(function, num_replicas, rank)
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
        self._replicas, self._rank = replicas_and_rank(function, num_replicas, rank)

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
