"""The pairs of back-end and device that a machine can run."""

import torch

from classfair import backends

#: Every pair the conformance suite runs over where the machine can; a new back-end is one more pair.
PAIRS = (("native", "cpu"), ("native", "cuda"), ("triton", "cpu"), ("triton", "cuda"), ("reference", "cpu"))
#: Its compiler places a tile's elements by strides and alignment, and sums follow: other layouts are as accurate, not
#: the same bits.
CHOOSES_ORDER_BY_LAYOUT = ("triton", "cuda")


def runnable(primitive: str) -> list[tuple[str, str]]:
    """The pairs that this machine can run for a primitive."""
    assert primitive in backends.PRIMITIVES, primitive
    present = {"cpu": True, "cuda": torch.cuda.is_available()}
    # A penalty has no kernel for GPUs: there it is torch operators.
    pairs = (*PAIRS, ("reference", "cuda")) if primitive == "penalties" else PAIRS
    return [(b, d) for b, d in pairs if present[d] and b in backends.usable(primitive, torch.device(d))]
