"""Statistics by class: of a batch's predictions, and running moments of features."""

from classfair.statistics.batch import BatchStats, JointRows
from classfair.statistics.classes import COVARIANCES, ClassMoments, ClassStatistics, class_moments
from classfair.statistics.prediction import NORMALIZE, PredictionBias, effective_frequency, prediction_bias

__all__ = [
    "COVARIANCES",
    "NORMALIZE",
    "BatchStats",
    "ClassMoments",
    "ClassStatistics",
    "JointRows",
    "PredictionBias",
    "class_moments",
    "effective_frequency",
    "prediction_bias",
]
