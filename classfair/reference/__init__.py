"""The reference back-end: every primitive in plain, readable torch.

In float64 it is the oracle of the conformance suite, and higher derivatives of the fused primitives are derivatives
of these formulas. It runs on every device; autograd differentiates it.
"""

from classfair.reference.class_moments import class_moments, class_moments_merge, merge_weight, usable_rows
from classfair.reference.label_index import label_index
from classfair.reference.pair_terms import (
    pair_terms,
    pair_terms_backward,
    pair_terms_backward_jvp,
    pair_terms_double_backward,
    pair_terms_jvp,
)
from classfair.reference.penalties import dependence, group_iou, iou_penalty, segments
from classfair.reference.softmax_loss import softmax_loss, softmax_loss_backward

__all__ = [
    "class_moments",
    "class_moments_merge",
    "dependence",
    "group_iou",
    "iou_penalty",
    "label_index",
    "merge_weight",
    "pair_terms",
    "pair_terms_backward",
    "pair_terms_backward_jvp",
    "pair_terms_double_backward",
    "pair_terms_jvp",
    "segments",
    "softmax_loss",
    "softmax_loss_backward",
    "usable_rows",
]
