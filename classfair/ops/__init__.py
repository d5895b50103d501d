"""The primitives: schema, fake kernel and autograd Function of one each."""

from classfair._schema import SoftmaxLoss
from classfair.ops.class_moments import SlotMoments, class_moments, class_moments_merge
from classfair.ops.label_index import Cells, LabelIndex, contested_cells, label_index
from classfair.ops.pair_terms import PairTermRows, log_distance_ratio, pair_terms
from classfair.ops.penalties import Penalty, dependence, iou_penalty
from classfair.ops.softmax_loss import softmax_loss

__all__ = [
    "Cells",
    "LabelIndex",
    "PairTermRows",
    "Penalty",
    "SlotMoments",
    "SoftmaxLoss",
    "class_moments",
    "class_moments_merge",
    "contested_cells",
    "dependence",
    "iou_penalty",
    "label_index",
    "log_distance_ratio",
    "pair_terms",
    "softmax_loss",
]
