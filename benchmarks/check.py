"""``make bench-check``: have our kernels become slower against torch, on the same machine in the same minute?

Compares ratios to plain eager F.cross_entropy with ``baseline.json``. ``--update`` rewrites it: commit that together
with what changed the speed.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from . import machine
from .measure import in_child
from .providers import YARDSTICK
from .workloads import CASES, Case

_BASELINE = Path(__file__).parent / "baseline.json"

#: A ratio may be this much worse than its baseline: medians of a busy machine move by a tenth.
MARGIN = 1.25
SECONDS = 3.0

CHECKED = [c for c in CASES if c.dtype == "float32" and c.objective in ("plain", "all-on")]


def measure(cases: list[Case]) -> dict[str, float]:
    """Ratios by ``case/back-end``."""
    measured = in_child("time", cases, seconds=SECONDS, kernels_only=True)
    return {
        f"{case.key}/{name}": result["ratio"]
        for case, by_provider in measured.items()
        for name, result in by_provider.items()
        if name != YARDSTICK
    }


def worse(ratios: dict[str, float], baseline: dict[str, float]) -> list[str]:
    """Entries beyond the margin; one that can no longer be measured is the worst of all."""
    return [k for k, b in baseline.items() if ratios.get(k, float("inf")) > MARGIN * b]


def update(ratios: dict[str, float]) -> None:
    """Replace the baseline in one step: an interrupted update leaves the old one whole."""
    content: dict[str, Any] = {**machine.describe("cpu"), "ratios": ratios}
    temporary = _BASELINE.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, _BASELINE)


def print_table(ratios: dict[str, float], baseline: dict[str, float], failed: list[str]) -> None:
    """Baseline and present ratio of every entry."""
    print(f"{'time as a share of F.cross_entropy':44}{'baseline':>10}{'now':>8}")
    for key in {**baseline, **ratios}:
        before = f"{baseline[key]:.2f}" if key in baseline else "new"
        now = f"{ratios[key]:.2f}" if key in ratios else "missing"
        print(f"{key:44}{before:>10}{now:>8}{'  SLOWER' if key in failed else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="make the present ratios the baseline")
    options = parser.parse_args()
    if not (options.update or _BASELINE.exists()):
        raise SystemExit(f"benchmarks: no {_BASELINE.name} to compare with; make one with --update")
    ratios = measure(CHECKED)
    if options.update:
        update(ratios)
        print_table(ratios, {}, [])
        return 0
    recorded = json.loads(_BASELINE.read_text())
    baseline = recorded["ratios"]
    failed = worse(ratios, baseline)
    again = [case for case in CHECKED if any(key.startswith(f"{case.key}/") for key in failed)]
    if again:
        ratios |= measure(again)
        failed = worse(ratios, baseline)
    print(f"baseline: {recorded['machine']}")
    print(f"here:     {machine.describe('cpu')['machine']}")
    print_table(ratios, baseline, failed)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
