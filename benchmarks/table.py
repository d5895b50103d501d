"""The tables of the documents from a result: ``python -m benchmarks.table benchmarks/results/FILE.json``."""

import argparse
import json
from pathlib import Path
from typing import Any

from .providers import YARDSTICK
from .workloads import OBJECTIVES


def caption(result: dict[str, Any]) -> str:
    """What the numbers mean, and where they are from."""
    machine, versions = result["machine"], result["versions"]
    where = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in machine.items() if k not in ("name", "vectors"))
    lines = [
        f"{machine['name']} ({where}), torch {versions['torch']}, {result['date']}, commit {result['commit']}.",
        f"Forward plus backward, median, as a multiple of plain eager `{YARDSTICK}` on the same logits",
        "in the same run; below 1 is faster.",
    ]
    if any(r["default_malloc"] for r in result["results"]):
        lines.append("In brackets the same with glibc's default malloc setting instead of a pinned one.")
    return "\n".join(lines)


def objective_table(name: str, results: list[dict[str, Any]]) -> str:
    """Rows are workloads, columns are providers."""
    providers = list(dict.fromkeys(r["provider"] for r in results if r["provider"] != YARDSTICK))
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in results:
        key = (f"{r['workload']} ({r['rows']}, {r['classes']})", r["dtype"])
        cases.setdefault(key, {})[r["provider"]] = r
    header = ["logits", "dtype", f"`{YARDSTICK}`", *providers]
    lines = [f"**{name}**: {OBJECTIVES[name].reason}", "", _row(header), _row(["---"] * len(header))]
    for key, by_provider in cases.items():
        yardstick = f"{by_provider[YARDSTICK]['median_ms']:.2f} ms"
        cells = [_ratio(by_provider.get(p)) for p in providers]
        lines.append(_row([*key, yardstick, *cells]))
    return "\n".join(lines)


def memory_table(results: list[dict[str, Any]]) -> str:
    """Peak memory of the largest workload, where it matters; the results of a step are part of it."""
    largest = max(r["logits_bytes"] for r in results if r["objective"] != "plain")  # a GPU's largest has that alone
    shown = [r for r in results if r["logits_bytes"] == largest and r["peak_bytes"] is not None]
    peaks: dict[str, dict[str, str]] = {}
    for r in shown:
        multiple = f"{r['peak_bytes'] / r['logits_bytes']:.1f}"
        peaks.setdefault(r["objective"], {})[r["provider"]] = multiple
    providers = max(peaks.values(), key=len)  # "plain" has no formulation beside the yardstick
    title = f"**Extra memory** of a step at the largest logits ({largest / 1e6:.0f} MB), as a multiple of them"
    header = ["objective", *(f"`{p}`" if p == YARDSTICK else p for p in providers)]
    lines = [title, "", _row(header), _row(["---"] * len(header))]
    lines += [_row([name, *(by.get(p, "") for p in providers)]) for name, by in peaks.items()]
    return "\n".join(lines)


def composed_table(result: dict[str, Any]) -> str:
    """Losses on top of the primitives: rows are shapes and losses, columns are providers."""
    rows, yardstick = result["results"], next(r["provider"] for r in result["results"] if r["ratio"] == 1.0)
    providers = [p for p in dict.fromkeys(r["provider"] for r in rows) if p != yardstick]
    loss = "penalty" if "penalty" in rows[0] else "objective"
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in rows:
        cases.setdefault((r["shape"], r[loss]), {})[r["provider"]] = r
    header = ["shape", loss, yardstick, *providers]
    lines = [_row(header), _row(["---"] * len(header))]
    for (shape, name), by in cases.items():
        sizes = ", ".join(map(str, result["shapes"][shape]))
        cells = [_composed(by.get(p)) for p in providers]
        lines.append(_row([f"{shape} ({sizes})", name, f"{by[yardstick]['median_ms']:.2f} ms", *cells]))
    return "\n".join(lines)


def _composed(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    ratio = f"{result['ratio']:.2f}" if result["ratio"] < 100 else f"{result['ratio']:.0f}"
    return ratio + (f", {result['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in result else "")


def _ratio(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    default = result["default_malloc"]
    return f"{result['ratio']:.2f}" + (f" ({default['ratio']:.2f})" if default else "")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    result = json.loads(parser.parse_args().file.read_text())
    if "shapes" in result:
        print(composed_table(result))
        return
    names = dict.fromkeys(r["objective"] for r in result["results"])
    tables = [objective_table(n, [r for r in result["results"] if r["objective"] == n]) for n in names]
    print("\n\n".join([caption(result), *tables, memory_table(result["results"])]))


if __name__ == "__main__":
    main()
