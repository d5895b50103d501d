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


TRAINING = (
    "test_training",
    "test_cli",
    "test_image_folder",
    "test_resume",
    "test_recipes",
    "test_docs",
    "test_orderings",
)


@pytest.fixture(autouse=True, scope="module")
def _small_models_on_one_thread(request):
    """On a busy machine two threads wait for each other at every layer of a tiny model, and take forever."""
    if request.module.__name__.rpartition(".")[2] not in TRAINING:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
