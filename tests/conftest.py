"""Back-end × device pairs and NaN-poisoned allocations."""

import pytest
import torch

from classfair import backends

#: Every pair the conformance suite runs over where the machine can; a new back-end is one more pair.
PAIRS = (("native", "cpu"), ("native", "cuda"), ("triton", "cpu"), ("triton", "cuda"), ("reference", "cpu"))


def runnable(primitive: str) -> list[tuple[str, str]]:
    """The pairs that this machine can run for a primitive."""
    present = {"cpu": True, "cuda": torch.cuda.is_available()}
    return [(b, d) for b, d in PAIRS if present[d] and b in backends.available(primitive, d)]


@pytest.fixture(autouse=True)
def _poison():
    """Uninitialised outputs hold NaN, so that an element a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
