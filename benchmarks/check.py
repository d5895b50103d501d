"""``make bench-check BASE=commit``: is this tree slower than another commit, on this machine and today?

Ten pairs of processes, one of each commit, time the steps of ``bench_steps.py``; every other pair runs in reverse
order. A step is slower where the interval of the median ratio lies above 1.05. docs/benchmarks.md tells why.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import commit, machine
from .measure import MALLOC

STEPS = Path(__file__).with_name("bench_steps.py")
PAIRS = 10
#: A step may take this much longer. What loses less than this cannot be told from noise in minutes.
LIMIT = 1.05
CONFIDENCE = 0.95

Times = dict[str, float]  # seconds by step
Pair = tuple[Times, Times]  # of the base and of this tree


class Ratio(NamedTuple):
    """Of the time of this tree to that of the base: the median of the pairs, and where the true one lies."""

    median: float
    low: float
    high: float


def median_ratio(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """Median and its interval between two order statistics, which holds for ratios of any distribution.

    A ratio is below the true median as often as above it. So the k-th smallest of n lies above it with the probability
    of fewer than k heads in n tosses, and k is the largest for which that is at most half of what the confidence
    leaves. Of ten ratios it is the second smallest and the second largest, at a confidence of 97.9 %.

    Raises:
        ValueError: for so few ratios that not even all of them reach the confidence (fewer than 6 at 95 %).
    """
    ordered, n, k, outside = sorted(ratios), len(ratios), 0, 0.0
    while (outside := outside + math.comb(n, k) / 2**n) <= (1 - confidence) / 2:
        k += 1
    if k == 0:
        raise ValueError(f"median_ratio: expected enough ratios for a confidence of {confidence}, got {n}")
    return Ratio(statistics.median(ordered), ordered[k - 1], ordered[-k])


def verdict(ratio: Ratio) -> str:
    """SLOWER where the whole interval lies above LIMIT; "noisy" where it cannot tell."""
    if ratio.low > LIMIT:
        return "SLOWER"
    return "noisy" if ratio.high > LIMIT else "faster" if ratio.high < 1 / LIMIT else ""


class Side(NamedTuple):
    """Of a comparison: an interpreter, and the folder that it must import classfair from."""

    python: Path
    package: Path


def start(side: Side, folder: Path, pipes: tuple[int, int], steps: Sequence[str]) -> subprocess.Popen:
    """A process that measures steps, all unless some are named, and takes turns through the pipes."""
    # A worker of pytest-xdist would tell its child to measure nothing.
    own = ("PYTHONPATH", "MALLOC_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment |= {**MALLOC["pinned"], "BENCH_TURNS": " ".join(map(str, pipes))}
    chosen = [f"{STEPS}::test_step[{step}]" for step in steps] or [str(STEPS)]
    # -P and importlib keep this tree, which has a classfair of its own, off the path; no project's options count.
    command = [str(side.python), "-P", "-m", "pytest", *chosen, "-q", "-c", os.devnull, f"--rootdir={folder}"]
    command += ["-p", "no:cacheprovider", "--import-mode=importlib", f"--benchmark-json={folder / 'times.json'}"]
    folder.mkdir()
    with (folder / "output").open("w") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, pass_fds=pipes)


def least_times(side: Side, folder: Path, status: int) -> Times:
    """What a process has measured. A step that failed is absent: a commit may not know it yet."""
    if status not in (0, 1) or not (folder / "times.json").exists():
        raise SystemExit(f"bench-check: the measuring process failed:\n{(folder / 'output').read_text()}")
    steps = json.loads((folder / "times.json").read_text())["benchmarks"]
    for step in steps:
        if not Path(step["extra_info"]["package"]).is_relative_to(side.package):
            raise SystemExit(f"bench-check: expected classfair in {side.package}, got {step['extra_info']['package']}")
    return {step["param"]: step["stats"]["min"] for step in steps}


def measure_pair(first: Side, second: Side, steps: Sequence[str]) -> list[Times]:
    """Times of two processes that live at once and take turns step by step, so that both meet the same machine."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / "first", Path(temporary) / "second"]
        (read_first, write_first), (read_second, write_second) = os.pipe(), os.pipe()
        os.write(write_first, b".")
        processes = [
            start(first, folders[0], (read_first, write_second), steps),
            start(second, folders[1], (read_second, write_first), steps),
        ]
        for pipe in (read_first, write_first, read_second, write_second):
            os.close(pipe)  # a process that dies must not leave the other one waiting
        statuses = [process.wait() for process in processes]
        return [least_times(*arguments) for arguments in zip((first, second), folders, statuses, strict=True)]


def measure_pairs(base: Side, here: Side, steps: Sequence[str] = ()) -> list[Pair]:
    """Times of the base and of this tree, PAIRS times; every other pair begins with this tree."""
    pairs = []
    for number in range(PAIRS):
        print(f"pair {number + 1} of {PAIRS}", file=sys.stderr, flush=True)
        if number % 2 == 0:
            before, now = measure_pair(base, here, steps)
        else:
            now, before = measure_pair(here, base, steps)
        pairs.append((before, now))
    return pairs


def report(pairs: list[Pair]) -> list[str]:
    """Print every step; the names of those that are slower, or that this tree cannot run."""
    failed = []
    print(f"{'least time of a step':44}{'base ms':>10}{'here ms':>10}{'ratio':>8}  interval")
    for step in dict.fromkeys(key for pair in pairs for times in pair for key in times):
        before, here = ([times[step] for times in side if step in times] for side in zip(*pairs, strict=True))
        cells = "".join(f"{1e3 * min(times):10.3f}" if times else f"{'missing':>10}" for times in (before, here))
        if len(before) == len(here) == len(pairs):
            ratio = median_ratio([h / b for b, h in zip(before, here, strict=True)])
            said = verdict(ratio)
            cells += f"{ratio.median:8.3f}  {ratio.low:.3f} to {ratio.high:.3f}"
        else:
            said = "new" if len(here) == len(pairs) else "FAILS"
        print(f"{step:44}{cells}  {said}".rstrip())
        failed += [step] if said in ("SLOWER", "FAILS") else []
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", help="commit to compare with; default: where this branch left the main one")
    base = commit.resolve(parser.parse_args().base)
    print(f"base: {commit.git('log', '-1', '--format=%h %s', base)}")
    print(f"here: {commit.git('describe', '--always', '--dirty')} on {machine.describe('cpu')['machine']}")
    python = commit.python_of(base)
    sides = Side(python, python.parents[1]), Side(Path(sys.executable), commit.ROOT / "classfair")
    failed = report(measure_pairs(*sides))
    if failed:  # a false alarm hardly comes twice
        print("once more, what failed:")
        failed = report(measure_pairs(*sides, failed))
    print(f"slower than {base[:12]}: {', '.join(failed)}" if failed else f"no step is slower than {base[:12]}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
