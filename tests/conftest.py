"""Which pairs of back-end and case take minutes, NaN-poisoned allocations, and threads of small trainings."""

import os

import pytest
import torch

#: Cases that meet every kernel and nearly every combination of inputs.
FEATURED = {
    *("plain-3x31", "mixed-stats", "all", "all-many-rows", "all-wide", "mixed-all", "dense-all", "share-all"),
    *("plain-0x5", "strided-3d", "strided-3d-many", "nan", "layout", "layout-narrow"),
    *(
        "3x7x2-variance",
        "17x17x16-ratio",
        "9x1-3",
        "200x31-2",
        "nonfinite",
        "large-offset-many",
        "groups-3x33",
        "cells-zeros",
        "3x33",
        "perfect",
    ),
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


TRAINING = ("training", "project")  # folders


@pytest.fixture(autouse=True, scope="module")
def _small_models_on_one_thread(request):
    """On a busy machine two threads wait for each other at every layer of a tiny model, and take forever."""
    if request.module.__name__.split(".")[-2] not in TRAINING:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
