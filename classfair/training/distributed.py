"""Several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import classfair


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def leave(self, code: int) -> None:
        """End this process if it is one of several, at once.

        After an error others may wait in a collective, and only the exit of this one tells torchrun. And threads of
        gloo that DDP keeps alive can abort an interpreter that is being torn down.
        """
        if self.world > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def broadcast_(self, values: Iterable[Tensor]) -> None:
        """The main process's values to all, in place."""
        if self.world > 1:
            for value in values:
                dist.broadcast(value, 0)

    def sum_(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value


def parallel(model: nn.Module, config: Any, device: torch.device, processes: Processes) -> nn.Module:
    """What the training step calls: the model, its gradients averaged over all processes."""
    net = model
    if processes.world > 1 and config.sync_bn:
        if device.type != "cuda":
            raise ValueError(f"expected sync_bn on GPUs only, got device {device}")
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place, because no model is a batch norm itself
    if config.zero_uniformity:  # each process has its own probe
        net = classfair.ZeroUniformity(net, config.probe)
    if processes.world > 1:
        net = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    return torch.compile(net) if config.compile else net  # type: ignore[return-value]


def local_device(device: torch.device) -> torch.device:
    """Under torchrun ``cuda`` means the GPU of this process."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


SINGLE = Processes()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did.

    A process that fails leaves without a word to the others: torchrun notices and ends them, whatever they wait for.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield SINGLE
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    yield Processes(dist.get_rank(), world)
    dist.barrier()  # no process leaves while another one still needs it
    dist.destroy_process_group()
