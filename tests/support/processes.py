"""Tests in several processes of one gloo group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(task, world, folder, *args):
    """What ``task(rank, *args)`` returns in each of ``world`` processes, by rank. ``folder`` holds the results."""
    mp.spawn(_process, (task, world, str(folder), args), nprocs=world)
    return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world)]


def _result(folder, rank):
    return os.path.join(folder, f"rank{rank}.pt")


def _process(rank, task, world, folder, args):
    rendezvous = f"file://{os.path.join(folder, 'rendezvous')}"
    limit = timedelta(minutes=2)  # an error instead of waiting for ever
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
    torch.save(task(rank, *args), _result(folder, rank))
    dist.barrier()  # no process leaves while another one still needs it
    dist.destroy_process_group()
    # A thread of gloo may still hold a tensor of Python. Where it lets go of it while the interpreter ends, torch
    # aborts the process ("terminate called without an active exception"), so the process skips that phase.
    os._exit(0)
