"""The number of processes that share a sampler, and which one this is."""

import torch.distributed as dist

from classfair import _validate as check


def replicas_and_rank(function: str, num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """What is given, else that of the default process group, else 1 and 0."""
    grouped = dist.is_available() and dist.is_initialized()
    num_replicas = (dist.get_world_size() if grouped else 1) if num_replicas is None else num_replicas
    rank = (dist.get_rank() if grouped else 0) if rank is None else rank
    check.check_range(function, "num_replicas", num_replicas, 1)
    check.check_range(function, "rank", rank, 0, num_replicas - 1)
    return num_replicas, rank
