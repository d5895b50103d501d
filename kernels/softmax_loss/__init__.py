"""``softmax_loss``: ``launch`` starts the kernels of ``forward`` and ``backward``. Those are written in terms of
``rows`` (how samples are addressed), ``terms`` (mathematics of one sample), ``gradient`` (of one row) and ``sums``
(over rows, in a fixed order)."""

from .launch import softmax_loss_bwd, softmax_loss_fwd

__all__ = ["softmax_loss_bwd", "softmax_loss_fwd"]
