"""``make bench``: measure everything, print it and keep it under ``benchmarks/results/``."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import machine
from .measure import MALLOC, MIN_LOGITS_BYTES_FOR_PEAK, copy_bandwidth, in_child
from .workloads import CASES, GPU_CASES, WORKLOADS

_RESULTS = Path(__file__).parent / "results"

#: Time for the rounds of a case; gates and compilation come on top. A GPU is quiet, and lent by the minute.
SECONDS = {"cpu": 3.0, "cuda": 1.0}
QUICK_SECONDS = 0.5


def measure(device: str, quick: bool) -> dict[str, Any]:
    """The whole result, as the file holds it."""
    seconds = QUICK_SECONDS if quick else SECONDS[device]
    bandwidth = copy_bandwidth(device)
    pinned = in_child("time", CASES if device == "cpu" else GPU_CASES, device=device, seconds=seconds)
    # malloc serves tensors on the CPU only; the kernels beside the yardstick tell what its default setting changes.
    default = {}
    if device == "cpu" and not quick:
        default = in_child("time", CASES, malloc="default", seconds=seconds / 4, kernels_only=True)
    large = [c for c in CASES if device == "cpu" and c.logits_bytes >= MIN_LOGITS_BYTES_FOR_PEAK]
    memory = in_child("memory", large, malloc="returned", device=device) if large else {}
    rows = []
    for case, by_provider in pinned.items():
        workload = WORKLOADS[case.workload]
        for provider, result in by_provider.items():
            achieved = result["model_bytes"] / (result["median_ms"] / 1e3)
            rows.append(
                {
                    **case._asdict(),
                    "rows": workload.rows,
                    "classes": workload.classes,
                    "logits_bytes": case.logits_bytes,
                    "provider": provider,
                    "peak_bytes": memory.get(case, {}).get(provider, {}).get("peak_bytes"),
                    **result,
                    "copy_bandwidth_share": achieved / bandwidth,
                    "default_malloc": default.get(case, {}).get(provider),
                }
            )
    head = {**machine.describe(device), "quick": quick, "malloc": MALLOC["pinned"]}
    return {**head, "copy_bandwidth_bytes_per_second": bandwidth, "results": rows}


def print_table(result: dict[str, Any]) -> None:
    """One line per provider; ratios are to F.cross_entropy of the same comparison."""
    print(f"{result['machine']}\n{result['versions']} commit {result['commit']}")
    print(f"copy bandwidth {result['copy_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s")
    columns = ("median ms", "iqr ms", "rounds", "ratio", "(default malloc)", "of copy", "peak MB")
    print(f"{'':16}" + "".join(f"{c:>{max(9, len(c) + 2)}}" for c in columns))
    previous = None
    for r in result["results"]:
        case = f"{r['objective']}, {r['workload']} ({r['rows']}, {r['classes']}), {r['dtype']}"
        if case != previous:
            print(case)
            previous = case
        default = f"({r['default_malloc']['ratio']:.2f})" if r["default_malloc"] else ""
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.1f}"
        print(
            f"  {r['provider']:14}{r['median_ms']:11.3f}{r['iqr_ms']:9.3f}{r['rounds']:9d}{r['ratio']:9.2f}"
            f"{default:>18}{r['copy_bandwidth_share']:9.0%}{peak:>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="short, and kept only where --output says")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/DEVICE-DATE")
    options = parser.parse_args()
    result = measure(options.device, options.quick)
    print_table(result)
    name = f"{machine.slug(result['machine'])}-{result['date']}.json"
    output = options.output or (None if options.quick else _RESULTS / name)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {output}")


if __name__ == "__main__":
    main()
