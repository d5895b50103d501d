"""Distributed tensors of torch: which of them the losses take, and as what.

``torch.distributed.tensor`` takes a second to import; who has a DTensor has imported it.
"""

import sys
from typing import Any

from torch import Tensor, nn

from classfair.targets import MixedTarget


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor."""
    if type(value) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole_weight(weight: Any) -> Any:
    """A classifier's weight or bias with the rows of all processes; anything but a DTensor as it is.

    Each process has the loss of its own samples, whose gradients data parallelism averages. Where processes share their
    samples, as in tensor parallelism, their gradients are equal and so is the average.
    """
    if not is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def _whole_rows(value: Any) -> Any:
    """Samples of all processes; each computes the loss of all of them, so that its gradient needs no reduction."""
    if isinstance(value, MixedTarget):
        return MixedTarget(*(_whole_rows(part) for part in value))
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Replicate

    return value.full_tensor(grad_placements=[Replicate()] * value.device_mesh.ndim)


def whole_batch(function: str, logits: Any, *others: Any) -> tuple[Any, ...]:
    """Logits, and what goes with them, with the samples of all processes; ValueError where classes are sharded."""
    classes = min(1, logits.dim() - 1)
    for placement in logits.placements:
        if getattr(placement, "dim", None) == classes and placement.is_shard():
            raise ValueError(
                f"{function}: expected logits with all classes on each process, got a DTensor with placements"
                f" {logits.placements}; logits.redistribute(placements=[Replicate()]) gathers them"
            )
    return tuple(_whole_rows(value) for value in (logits, *others))
