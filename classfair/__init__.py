"""Class-fair losses and statistics for image classifiers, at the price of plain cross-entropy."""

from classfair import backends as _backends
from classfair.functional import cross_entropy, cross_entropy_with_stats
from classfair.losses import (
    CrossEntropyLoss,
    LogitAdjustedLoss,
    logit_adjustment,
    posthoc_logit_adjustment,
)
from classfair.moments import ClassMoments, ClassStatistics, class_moments
from classfair.pair import PairTerms
from classfair.statistics import BatchStats, JointRows
from classfair.targets import MixedTarget, class_counts

__version__ = "0.1.0"

__all__ = [
    "BatchStats",
    "ClassMoments",
    "ClassStatistics",
    "CrossEntropyLoss",
    "JointRows",
    "LogitAdjustedLoss",
    "MixedTarget",
    "PairTerms",
    "class_counts",
    "class_moments",
    "cross_entropy",
    "cross_entropy_with_stats",
    "logit_adjustment",
    "posthoc_logit_adjustment",
]

_backends.load_compiled()
_backends.discover()
