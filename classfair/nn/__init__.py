"""What belongs to the model: classifiers, and features beside logits from one forward pass."""

from classfair.nn.etf import ETFLinear
from classfair.nn.features import WithFeatures, replace_head, with_features
from classfair.nn.heads import CosineLinear, EstimatedOffsetLinear
from classfair.nn.scaled import ScaledLinear

__all__ = [
    "CosineLinear",
    "ETFLinear",
    "EstimatedOffsetLinear",
    "ScaledLinear",
    "WithFeatures",
    "replace_head",
    "with_features",
]
