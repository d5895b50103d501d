"""Metrics of class fairness, in two forms.

Functions of counts and accuracies (:mod:`classfair.metrics.counts`) need nothing else. The classes are
``torchmetrics.Metric`` and need ``pip install "classfair[metrics]"``; they are imported when first asked for.
``docs/metrics.md`` has a table of all of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from classfair.metrics.counts import (
    balanced_accuracy,
    best_class_accuracy,
    cumulative_false_positives,
    difficulty_accuracy,
    geometric_mean_accuracy,
    per_class_accuracy,
    shot_accuracy,
    wilson_interval,
    worst_class_accuracy,
)

if TYPE_CHECKING:
    from classfair.metrics.accuracy import (
        BalancedAccuracy,
        BestClassAccuracy,
        GeometricMeanAccuracy,
        PerClassAccuracy,
        WorstClassAccuracy,
    )
    from classfair.metrics.base import ClassMetric
    from classfair.metrics.bias import (
        ConfusionMatrix,
        CumulativeFalsePositives,
        EffectiveFrequency,
        PredictionBias,
    )
    from classfair.metrics.groups import DemographicParity, EqualizedOdds, GroupIoU
    from classfair.metrics.splits import DifficultyAccuracy, ShotAccuracy
    from classfair.metrics.wrappers import BatchAverage, StatsMetric

_MODULE = {  # of each class that needs torchmetrics
    "BalancedAccuracy": "accuracy",
    "BatchAverage": "wrappers",
    "BestClassAccuracy": "accuracy",
    "ClassMetric": "base",
    "ConfusionMatrix": "bias",
    "CumulativeFalsePositives": "bias",
    "DemographicParity": "groups",
    "DifficultyAccuracy": "splits",
    "EffectiveFrequency": "bias",
    "EqualizedOdds": "groups",
    "GeometricMeanAccuracy": "accuracy",
    "GroupIoU": "groups",
    "PerClassAccuracy": "accuracy",
    "PredictionBias": "bias",
    "ShotAccuracy": "splits",
    "StatsMetric": "wrappers",
    "WorstClassAccuracy": "accuracy",
}

__all__ = [
    "BalancedAccuracy",
    "BatchAverage",
    "BestClassAccuracy",
    "ClassMetric",
    "ConfusionMatrix",
    "CumulativeFalsePositives",
    "DemographicParity",
    "DifficultyAccuracy",
    "EffectiveFrequency",
    "EqualizedOdds",
    "GeometricMeanAccuracy",
    "GroupIoU",
    "PerClassAccuracy",
    "PredictionBias",
    "ShotAccuracy",
    "StatsMetric",
    "WorstClassAccuracy",
    "balanced_accuracy",
    "best_class_accuracy",
    "cumulative_false_positives",
    "difficulty_accuracy",
    "geometric_mean_accuracy",
    "per_class_accuracy",
    "shot_accuracy",
    "wilson_interval",
    "worst_class_accuracy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchmetrics":
            raise
        message = f'classfair.metrics.{name}: expected torchmetrics, got none; pip install "classfair[metrics]"'
        raise ModuleNotFoundError(message, name="torchmetrics") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
