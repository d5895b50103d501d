"""Class-fair losses and statistics for image classifiers, at the price of plain cross-entropy."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from classfair import backends as _backends
from classfair import data as data
from classfair import nn as nn
from classfair.fairness import (
    binary_logits,
    demographic_parity_loss,
    equalized_odds_loss,
    intersection_over_union,
    iou_loss,
)
from classfair.functional import cross_entropy
from classfair.functional_stats import cross_entropy_with_stats
from classfair.losses import (
    ClassBalancedLoss,
    CrossEntropyLoss,
    EstimatedOffsetLoss,
    FocalLoss,
    ISDALoss,
    LDAMLoss,
    LogitAdjustedLoss,
    MetaLADLoss,
    ZeroUniformity,
    center_loss,
    equidistance_loss,
    generalized_cross_entropy,
    uniform_constraint,
    zero_uniformity_loss,
)
from classfair.methods import MetaLADStep, RelativeDifficulty
from classfair.nn.etf import dot_regression_loss
from classfair.pair import PairTerms, distance_margin, mean_class_distance, pair_variance
from classfair.priors import (
    effective_counts,
    effective_number_weights,
    ldam_margins,
    logit_adjustment,
    posthoc_logit_adjustment,
    tau_normalize,
)
from classfair.schedules import DeferredReweighting, ISDARamp, Warmup
from classfair.statistics import (
    BatchStats,
    ClassMoments,
    ClassStatistics,
    JointRows,
    boundary_distance,
    class_moments,
    effective_frequency,
    empirical_offset,
    prediction_bias,
)
from classfair.targets import MixedTarget, class_counts, total_weight

__version__ = "0.1.0"

__all__ = [
    "BatchStats",
    "ClassBalancedLoss",
    "ClassMoments",
    "ClassStatistics",
    "CrossEntropyLoss",
    "DeferredReweighting",
    "EstimatedOffsetLoss",
    "FocalLoss",
    "ISDALoss",
    "ISDARamp",
    "JointRows",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "MetaLADLoss",
    "MetaLADStep",
    "MixedTarget",
    "PairTerms",
    "RelativeDifficulty",
    "Warmup",
    "ZeroUniformity",
    "binary_logits",
    "boundary_distance",
    "center_loss",
    "class_counts",
    "class_moments",
    "cross_entropy",
    "cross_entropy_with_stats",
    "demographic_parity_loss",
    "distance_margin",
    "dot_regression_loss",
    "effective_counts",
    "effective_frequency",
    "effective_number_weights",
    "empirical_offset",
    "equalized_odds_loss",
    "equidistance_loss",
    "generalized_cross_entropy",
    "intersection_over_union",
    "iou_loss",
    "ldam_margins",
    "logit_adjustment",
    "mean_class_distance",
    "pair_variance",
    "posthoc_logit_adjustment",
    "prediction_bias",
    "tau_normalize",
    "total_weight",
    "uniform_constraint",
    "zero_uniformity_loss",
]

_backends.load_compiled()
_backends.discover()


def __getattr__(name: str) -> _ModuleType:
    """``classfair.metrics``, imported when it is first asked for."""
    if name == "metrics":
        return _import_module("classfair.metrics")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
