"""Triton kernels, installed as ``classfair.kernels``. Importing it serves ``torch.ops.classfair_triton``.

They run on CUDA devices, and on CPU tensors too where Triton interprets (``TRITON_INTERPRET=1`` before the import).
"""

import torch
import triton

from . import class_moments, label_index, pair_terms, softmax_loss


def _register() -> None:
    devices = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
    for name, kernel in (
        ("softmax_loss_fwd", softmax_loss.softmax_loss_fwd),
        ("softmax_loss_bwd", softmax_loss.softmax_loss_bwd),
        ("label_index", label_index.label_index),
        ("class_moments", class_moments.class_moments),
        ("class_moments_merge", class_moments.class_moments_merge),
        ("pair_terms_fwd", pair_terms.pair_terms_fwd),
        ("pair_terms_bwd", pair_terms.pair_terms_bwd),
    ):
        torch.library.register_kernel(f"classfair_triton::{name}", devices, kernel)


_register()
