"""What belongs to the model: classifiers, and features beside logits from one forward pass."""

from classfair.nn.features import WithFeatures, replace_head, with_features
from classfair.nn.heads import CosineLinear, EstimatedOffsetLinear

__all__ = ["CosineLinear", "EstimatedOffsetLinear", "WithFeatures", "replace_head", "with_features"]
