"""The primitives: schema, fake kernel and autograd Function of one each."""

from classfair.ops.label_index import LabelIndex, label_index
from classfair.ops.softmax_loss import SoftmaxLoss, softmax_loss

__all__ = ["LabelIndex", "SoftmaxLoss", "label_index", "softmax_loss"]
