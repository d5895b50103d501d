"""``pair_terms`` by direct differences, which do not cancel where rows are close.

A program owns a tile of outputs and runs through all of what it sums in blocks of (slot, class, feature), so that
nothing is added by two programs. float32 on the ordinary cores: matrix products of rounded factors would cancel.
"""

from .backward import pair_terms_bwd
from .forward import pair_terms_fwd

__all__ = ["pair_terms_bwd", "pair_terms_fwd"]
