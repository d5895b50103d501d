"""A sampler that repeats some samples, such as those that a first model got wrong."""

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from classfair import _validate as check
from classfair._replicas import replicas_and_rank


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
        self._replicas, self._rank = replicas_and_rank(name, num_replicas, rank)
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
