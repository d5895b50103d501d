"""Learning from failure: how much harder an image is for a model than for one that learns what is easiest."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from classfair import _validate as check
from classfair.statistics._processes import gather_rows
from classfair.targets import _label_tensor

TINY = 1e-8


class RelativeDifficulty(nn.Module):
    r"""Weights of samples from the losses of two models: :math:`W = \ell_B / (\ell_B + \ell_D)`.

    :math:`\ell_B` is the loss of the biased model (see :func:`classfair.generalized_cross_entropy`), :math:`\ell_D`
    that of the model that is wanted: near 1 where the biased model fails, near 0 where it knows. Both are moving
    averages of the image's own losses, the first value as it is, divided by the largest of the image's class over the
    data set: so an average follows its image through all batches, whoever else is in them.
    Source: Nam et al. 2020, "Learning from failure: training debiased classifier from biased classifier", algorithm 1
    and their code.

    Args:
        targets: ``(N,)`` labels of the whole training set, as for :func:`classfair.class_counts`.
        num_classes: C.
        momentum: in [0, 1), share of the past in the averages.

    State: ``average`` ``(2, N)`` float32, of the biased and of the other model, and ``seen`` ``(N,)`` bool: buffers.
        ``target`` is not saved. No parameters.

    Raises:
        IndexError: an index out of range, on the CPU.
        TypeError, ValueError: labels that are no integers below C, or a momentum out of range.

    Example:
        >>> difficulty = classfair.RelativeDifficulty([0, 0, 1, 1], num_classes=2)
        >>> index = torch.tensor([0, 1])  # of the images of a batch
        >>> difficulty.update(index, torch.tensor([4.0, 1.0]), torch.tensor([2.0, 2.0])).tolist()
        [0.5, 0.20000000298023224]
    """

    average: Tensor
    seen: Tensor
    target: Tensor

    def __init__(self, targets: Any, num_classes: int, momentum: float = 0.7) -> None:
        super().__init__()
        name = "RelativeDifficulty"
        check.check_size(name, "num_classes", num_classes)
        check.check_number(name, "momentum", momentum, 0.0, 1.0)
        if momentum == 1:
            raise ValueError(f"{name}: expected momentum below 1, got {momentum}")
        target = _label_tensor(name, targets, num_classes)
        self.num_classes, self.momentum = num_classes, float(momentum)
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("average", torch.zeros(2, len(target)))
        self.register_buffer("seen", torch.zeros(len(target), dtype=torch.bool))

    @torch.no_grad()
    def update(
        self, index: Tensor, biased: Tensor, debiased: Tensor, *, process_group: Any = None, sync: bool = True
    ) -> Tensor:
        """Take in the losses of a batch, and return the weights ``(B,)`` of its images.

        Args:
            index: ``(B,)`` int64, of the images in the training set, none twice in the batches of all processes; -1:
                no image, weight 0.
            biased, debiased: ``(B,)`` losses of the two models, without gradient.
            process_group: whose batches are taken in together; None: the default group if there is one.
            sync: False: this process's batch alone.

        Losses that are not finite are left out; an image without any has weight 0. Nobody waits for the device on one
        process.
        """
        name = "RelativeDifficulty.update"
        check.check_labels_tensor(name, "index", index, None)
        for which, losses in (("biased", biased), ("debiased", debiased)):
            check.check_floats(name, which, losses, index.shape)
        if index.device.type == "cpu" and index.numel() and int(index.max()) >= len(self.target):
            raise IndexError(f"{name}: expected index below {len(self.target)}, got {int(index.max())}")
        losses = torch.stack([biased, debiased], 1).float()  # (B, 2)
        every, where = losses, index
        if sync and dist.is_available() and dist.is_initialized():
            every, where = gather_rows(losses, index, -1, process_group, None)
        self._take_in(every, where)
        b, d = self.normalized(index.clamp_min(0))
        weight = b / (b + d + TINY)
        return torch.where((index >= 0) & self.seen[index.clamp_min(0)], weight, 0.0)

    def normalized(self, index: Tensor) -> Tensor:
        """(2, B) averages as shares of the largest of their class."""
        largest = self.average.new_zeros(2, self.num_classes)
        largest.scatter_reduce_(1, self.target.expand(2, -1), self.average, "amax")
        own = largest[:, self.target[index]]
        return self.average[:, index] / torch.where(own > 0, own, 1.0)

    def _take_in(self, losses: Tensor, index: Tensor) -> None:  # (B, 2), (B,)
        known = (index >= 0) & losses.isfinite().all(1)
        # What is left out writes into one more column than there are images.
        images = len(self.target)
        at = torch.where(known, index, images)
        average = torch.cat([self.average, self.average.new_zeros(2, 1)], 1)
        seen = torch.cat([self.seen, self.seen.new_zeros(1)])
        share = torch.where(seen[at], self.momentum, 0.0)
        average[:, at] = share * average[:, at] + (1 - share) * losses.T
        seen[at] = True
        self.average.copy_(average[:, :images])
        self.seen.copy_(seen[:images])

    def extra_repr(self) -> str:
        return f"images={len(self.target)}, num_classes={self.num_classes}, momentum={self.momentum}"
