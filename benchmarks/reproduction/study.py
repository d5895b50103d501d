"""Measures parts seed by seed in two processes, and keeps what is done in a file."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.reproduction import papers
from benchmarks.reproduction.claims import MIN_SEEDS, Part
from benchmarks.reproduction.runs import Runs

#: By claim, its value of each seed that is done.
Values = dict[str, list[float]]


def measure_seed(name: str, seed: int, mnist: str | None) -> dict[str, Any]:
    """All claims of a part with one seed; the value of a claim is None where a run that it needs diverges."""
    torch.set_num_threads(1)
    runs = Runs(seed, None if mnist is None else Path(mnist))
    start, processor = time.perf_counter(), time.process_time()
    values: dict[str, float | None] = {}
    for claim in papers.PARTS[name].claims:
        assert claim.measure is not None
        try:
            value = float(claim.measure(runs))
        except FloatingPointError:
            value = math.nan
        values[claim.name] = value if math.isfinite(value) else None
    times = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    return {"part": name, "seed": seed, **times, "values": values}


def measure_all(
    parts: Sequence[Part],
    cache: Path,
    head: dict[str, Any],
    mnist: Path | None,
    *,
    seeds: int = 0,
    workers: int = 2,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """What :func:`measure_seed` gives for all seeds of all parts, the first seed of all before the second of any.

    Args:
        parts: to measure.
        cache: file with one line for each seed of a part that is done, under a line with ``head``. It is gone on with
            if its head is the same.
        head: what the values depend on besides the claims: the commit.
        mnist: folder of MNIST; without it, parts that need it are left out.
        seeds: of every part; 0: as many as the part says.
        workers: processes, of one thread each.
        seconds: of the whole; seeds that have not begun by then are left out.
        say: called with progress.
    """
    done = _begin(cache, head)
    known = {(line["part"], line["seed"]) for line in done}
    spent: dict[str, float] = defaultdict(float)
    for line in done:
        spent[line["part"]] += line["processor"]
    able = [part for part in parts if mnist is not None or not part.needs_mnist]
    waiting = [
        (part, seed)
        for seed in range(max((p.seeds for p in able), default=0))
        for part in able
        if seed < (seeds or part.seeds)
    ]
    waiting = [(part, seed) for part, seed in waiting if (part.name, seed) not in known]
    end, running = time.monotonic() + seconds, set[Future[dict[str, Any]]]()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, cache.open("a") as file:
        while waiting or running:
            while waiting and len(running) < workers:
                part, seed = waiting.pop(0)
                late = time.monotonic() > end or spent[part.name] > part.seconds
                if not (late and seed >= MIN_SEEDS):
                    running.add(pool.submit(measure_seed, part.name, seed, None if mnist is None else str(mnist)))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                line = future.result()
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                done.append(line)
                spent[line["part"]] += line["processor"]
                say(f"{line['part']}, seed {line['seed']}: {line['seconds']:.0f} s, {len(waiting)} to begin")
    return done


def _begin(cache: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of an earlier measurement with the same head, which was interrupted, but a last one that is not whole."""
    lines = cache.read_text().splitlines(keepends=True) if cache.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    done = whole[1:] if whole[:1] == [head] else []
    cache.parent.mkdir(parents=True, exist_ok=True)
    new = cache.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in (head, *done)))
    new.replace(cache)
    return done


def by_claim(lines: Sequence[dict[str, Any]]) -> Values:
    """Values of each claim, in the order of seeds; nan where there is none."""
    values: Values = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["seed"]):
        for name, value in line["values"].items():
            values[name].append(math.nan if value is None else value)
    return dict(values)
