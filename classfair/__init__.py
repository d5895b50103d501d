"""Class-fair losses and statistics for image classifiers, at the price of plain cross-entropy."""

from classfair import backends as _backends
from classfair.functional import cross_entropy, cross_entropy_with_stats
from classfair.losses import (
    CrossEntropyLoss,
    LogitAdjustedLoss,
    logit_adjustment,
    posthoc_logit_adjustment,
)
from classfair.pair import PairTerms, distance_margin, mean_class_distance, pair_variance
from classfair.statistics import BatchStats, JointRows
from classfair.targets import MixedTarget, class_counts

__version__ = "0.1.0"

__all__ = [
    "BatchStats",
    "CrossEntropyLoss",
    "JointRows",
    "LogitAdjustedLoss",
    "MixedTarget",
    "PairTerms",
    "class_counts",
    "cross_entropy",
    "cross_entropy_with_stats",
    "distance_margin",
    "logit_adjustment",
    "mean_class_distance",
    "pair_variance",
    "posthoc_logit_adjustment",
]

_backends.load_compiled()
_backends.discover()
