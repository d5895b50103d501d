"""Forward plus backward of every provider under pytest-benchmark: ``pytest benchmarks --benchmark-enable``.

pytest-benchmark times one provider after the other, in one process with the malloc setting of the shell. That is good
for looking at one case (``-k``) and for its JSON and comparison of runs. Ratios need more: providers in turn, in a
process with malloc pinned. ``benchmarks.run`` and ``benchmarks.check`` measure so, with the same cases, providers and
gate.

With benchmarks disabled, as in the project's default options, only the gate runs.
"""

import os
import time
from functools import lru_cache

import pytest
import torch

from . import machine, providers
from .measure import model_bytes, stepper
from .workloads import CASES, make_inputs

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

PARAMETERS = [
    pytest.param(device, case, name, id=f"{device}-{case.key}-{name}")
    for device in DEVICES
    for case in CASES
    for name in providers.names(case, device)
]

_inputs = lru_cache(maxsize=1)(make_inputs)
_description = lru_cache(machine.describe)


def device_timer() -> float:
    """Seconds, once a GPU has done what was queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=device_timer, warmup=True)
@pytest.mark.parametrize(("device", "case", "name"), PARAMETERS)
def test_forward_backward(device, case, name, benchmark):
    if name == "torch.compile" and benchmark.disabled:
        pytest.skip("a compilation takes seconds, and its correctness is torch's")
    inputs = _inputs(case, device)
    provider = providers.make(name, case)
    providers.verify(provider, case, inputs)
    benchmark.group = f"{device}/{case.key}"
    benchmark.extra_info |= {
        **_description(device),
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "model_bytes": model_bytes(provider.objective, inputs),
    }
    benchmark(stepper(provider, inputs, device))
