"""Batches and their order."""

from classfair.data.collate import MixedTargetCollate
from classfair.data.samplers import (
    ClassBalancedSampler,
    UnpaddedDistributedSampler,
    UpweightedSampler,
    balanced_subset,
)

__all__ = [
    "ClassBalancedSampler",
    "MixedTargetCollate",
    "UnpaddedDistributedSampler",
    "UpweightedSampler",
    "balanced_subset",
]
