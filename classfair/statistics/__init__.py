"""Statistics by class: of a batch's predictions, and running moments of features."""

from classfair.statistics.batch import BatchStats, JointRows
from classfair.statistics.classes import COVARIANCES, ClassMoments, ClassStatistics, class_moments
from classfair.statistics.offsets import boundary_distance, empirical_offset
from classfair.statistics.prediction import NORMALIZE, PredictionBias, effective_frequency, prediction_bias

__all__ = [
    "COVARIANCES",
    "NORMALIZE",
    "BatchStats",
    "ClassMoments",
    "ClassStatistics",
    "JointRows",
    "PredictionBias",
    "boundary_distance",
    "class_moments",
    "effective_frequency",
    "empirical_offset",
    "prediction_bias",
]
