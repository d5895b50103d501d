"""Losses: drop-in modules with the keywords of :class:`torch.nn.CrossEntropyLoss`."""

from classfair.losses._buffers import Keywords
from classfair.losses.base import CrossEntropyLoss, FeatureLoss
from classfair.losses.equidistance import equidistance_loss
from classfair.losses.estimated_offset import EstimatedOffsetLoss, center_loss, uniform_constraint
from classfair.losses.isda import ISDALoss
from classfair.losses.logits import ClassBalancedLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss
from classfair.losses.metalad import MetaLADLoss
from classfair.losses.robust import generalized_cross_entropy
from classfair.losses.zero_uniformity import ZeroUniformity, zero_uniformity_loss

__all__ = [
    "ClassBalancedLoss",
    "CrossEntropyLoss",
    "EstimatedOffsetLoss",
    "FeatureLoss",
    "FocalLoss",
    "ISDALoss",
    "Keywords",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "MetaLADLoss",
    "ZeroUniformity",
    "center_loss",
    "equidistance_loss",
    "generalized_cross_entropy",
    "uniform_constraint",
    "zero_uniformity_loss",
]
