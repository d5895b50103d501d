"""Timing and peak memory, in a process of their own: ``in_child`` starts it with the malloc setting to measure under.

glibc reads that setting once, at start. With the default one, large buffers go back to the system after every step
and come again as page faults, which moves the time of eager torch threefold from run to run.
"""

import argparse
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import machine, providers
from .workloads import Case, Inputs, Objective, make_inputs

MALLOC = {
    "pinned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 34), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)},
    "default": {},
    # Every buffer is returned at once, so that resident memory tells what is in use.
    "returned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)},
}

#: Linux counts resident memory to a few hundred kB: the peak of smaller logits on the CPU would be noise.
MIN_LOGITS_BYTES_FOR_PEAK = 4_000_000

#: One sample of a provider lasts at least this long; a call takes 0.2 ms to 1 s.
SAMPLE_SECONDS = 1e-2
MIN_ROUNDS, MAX_ROUNDS = 10, 300


def synchronize(device: str) -> None:
    """Wait for a GPU, which would otherwise only have queued its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def stepper(provider: providers.Provider, inputs: Inputs, device: str) -> Callable[[], Any]:
    """A step without arguments. On a GPU the logits take turns, so that none is still in L2 from the last step."""
    copies = [inputs]
    if device == "cuda":
        cache = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        count = -(-cache // inputs.logits.nbytes)
        copies += [inputs.map(torch.clone, provider.objective) for _ in range(count)]
    turn = itertools.cycle(copies)
    return lambda: provider.step(next(turn))


def seconds_per_call(step: Callable[[], Any], calls: int, device: str) -> float:
    """One sample."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def calls_per_sample(step: Callable[[], Any], device: str) -> int:
    """Calls for a sample of ``SAMPLE_SECONDS``, from warm calls."""
    seconds_per_call(step, 3, device)
    return max(1, round(SAMPLE_SECONDS / seconds_per_call(step, 3, device)))


def interleave(steps: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """Samples of every provider in turn, so that drift of the machine hits all alike; every other round backwards."""
    calls = {name: calls_per_sample(step, device) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    end = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in list(steps)[:: 1 if done % 2 else -1]:
            samples[name].append(seconds_per_call(steps[name], calls[name], device))
    return samples


def model_bytes(objective: Objective, inputs: Inputs) -> int:
    """Bytes that a step must move: logits read twice and their gradient written once, used pair rows likewise."""
    size = 3 * inputs.logits.nbytes
    if objective.pair:
        used = int(inputs.pair.num_slots) * inputs.pair.rows[0].nbytes
        size += (3 if objective.trains_terms else 2) * used
    return size


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written: the most that this machine's memory gives a step."""
    source = torch.ones(1 << 27, device=device)  # 0.5 GB, larger than any cache
    target = torch.empty_like(source)
    times = [seconds_per_call(lambda: target.copy_(source), 1, device) for _ in range(12)]
    return 2 * source.nbytes / min(times)


def peak_extra_bytes(step: Callable[[], Any], device: str) -> int:
    """Memory that one step needs on top of its inputs, its results included; on the CPU under "returned" malloc."""
    step()
    synchronize(device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def measure_time(steps: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, Any]:
    """Median, interquartile range and number of rounds of each provider, and its ratio to the yardstick."""
    samples = interleave(steps, seconds, device)
    yardstick = statistics.median(samples[providers.YARDSTICK])
    result = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = {
            "median_ms": 1e3 * middle,
            "iqr_ms": 1e3 * (high - low),
            "rounds": len(values),
            "ratio": middle / yardstick,
        }
    return result


def measure_case(what: str, case: Case, names: Iterable[str], seconds: float, device: str) -> dict[str, dict[str, Any]]:
    """Gate, then measure; by provider."""
    inputs = make_inputs(case, device)
    steps, models = {}, {}
    for name in names:
        provider = providers.make(name, case)
        providers.verify(provider, case, inputs)
        steps[name] = stepper(provider, inputs, device)
        models[name] = model_bytes(provider.objective, inputs)
    if what == "memory":
        return {name: {"peak_bytes": peak_extra_bytes(step, device)} for name, step in steps.items()}
    times = measure_time(steps, seconds, device)
    result = {name: {**times[name], "model_bytes": models[name]} for name in steps}
    if device == "cuda":  # its allocator counts every byte: no process of its own for that
        for name, step in steps.items():
            result[name]["peak_bytes"] = peak_extra_bytes(step, device)
    return result


def in_process(module: str, *arguments: str, malloc: str = "pinned") -> Any:
    """What a module prints as JSON, in a process of its own with that malloc setting."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | MALLOC[malloc]
    command = [sys.executable, "-m", module, *arguments]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def keep(result: dict[str, Any], what: str) -> None:
    """Write a result under ``benchmarks/results/``."""
    name = f"{machine.slug(result['machine'])}-{what}-{result['date']}.json"
    path = Path(__file__).parent / "results" / name
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def in_child(
    what: str,
    cases: Iterable[Case],
    *,
    malloc: str = "pinned",
    device: str = "cpu",
    seconds: float = 1.0,
    kernels_only: bool = False,
) -> dict[Case, dict[str, dict[str, Any]]]:
    """Measure in a process with a malloc setting: by case, by provider."""
    command = [sys.executable, "-m", "benchmarks.measure", what, *(case.key for case in cases)]
    command += ["--device", device, "--seconds", str(seconds)]
    command += ["--kernels-only"] if kernels_only else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= MALLOC[malloc]
    results = {}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            key, result = json.loads(line)
            print(f"{what}, {malloc} malloc: {key}", file=sys.stderr, flush=True)
            results[Case.parse(key)] = result
    if child.returncode:
        raise SystemExit(f"benchmarks: the measuring process failed (exit status {child.returncode})")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("cases", nargs="*", type=Case.parse)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of a case")
    parser.add_argument("--kernels-only", action="store_true", help="the yardstick and our kernels")
    options = parser.parse_args()
    kernels_only = (providers.YARDSTICK, *providers.kernels(options.device))
    for case in options.cases:
        names = kernels_only if options.kernels_only else providers.names(case, options.device)
        result = measure_case(options.what, case, names, options.seconds, options.device)
        print(json.dumps([case.key, result]), flush=True)


if __name__ == "__main__":
    main()
