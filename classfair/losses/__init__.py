"""Losses: drop-in modules with the keywords of :class:`torch.nn.CrossEntropyLoss`."""

from classfair.losses.base import CrossEntropyLoss, Keywords
from classfair.losses.features import FeatureLoss
from classfair.losses.isda import ISDALoss
from classfair.losses.logits import ClassBalancedLoss, FocalLoss, LDAMLoss, LogitAdjustedLoss
from classfair.losses.metalad import MetaLADLoss

__all__ = [
    "ClassBalancedLoss",
    "CrossEntropyLoss",
    "FeatureLoss",
    "FocalLoss",
    "ISDALoss",
    "Keywords",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "MetaLADLoss",
]
