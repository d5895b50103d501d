"""Back-end × device pairs, what of them takes minutes, and NaN-poisoned allocations."""

import os

import pytest
import torch

from classfair import backends

#: Every pair the conformance suite runs over where the machine can; a new back-end is one more pair.
PAIRS = (("native", "cpu"), ("native", "cuda"), ("triton", "cpu"), ("triton", "cuda"), ("reference", "cpu"))
#: Its compiler places a tile's elements by strides and alignment, and sums follow: other layouts are as accurate, not
#: the same bits.
CHOOSES_ORDER_BY_LAYOUT = ("triton", "cuda")


def runnable(primitive: str) -> list[tuple[str, str]]:
    """The pairs that this machine can run for a primitive."""
    present = {"cpu": True, "cuda": torch.cuda.is_available()}
    return [(b, d) for b, d in PAIRS if present[d] and b in backends.usable(primitive, torch.device(d))]


#: Cases that meet every kernel and nearly every combination of inputs.
FEATURED = {
    *("plain-3x31", "mixed-stats", "all", "all-many-rows", "all-wide", "mixed-all", "dense-all", "share-all"),
    *("plain-0x5", "strided-3d", "strided-3d-many", "nan", "layout", "layout-narrow"),
    *("9x1-3", "200x31-2", "nonfinite", "large-offset-many", "groups-3x33", "cells-zeros", "3x33", "perfect"),
}


def pytest_collection_modifyitems(items):
    """Triton compiles for seconds per kernel, dtype and combination of inputs, a thousand in all. On a GPU ``make
    test-gpu`` runs every case in the dtypes that people train in, and in the others the featured ones."""
    for item in items:
        given = getattr(item, "callspec", None) and item.callspec.params
        if not given or (given.get("backend"), given.get("device")) != ("triton", "cuda") or "case" not in given:
            continue
        if given.get("dtype", torch.float64) in (torch.float64, torch.float16) and given["case"].id not in FEATURED:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _poison():
    """Uninitialised outputs hold NaN, so that an element a kernel forgets is seen; compute-sanitizer sees it itself."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = "CLASSFAIR_TEST_UNPOISONED" not in os.environ
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
