"""Batches with mixed targets that never become dense probabilities."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from classfair.targets import MixedTarget


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
