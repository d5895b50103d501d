"""Which images a job has seen on which side, and what has changed when it goes on."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classfair.training.scan import EXAMPLES, Sample, left_out_line

SIDES = ("training", "validation")


@dataclass(frozen=True)
class ImageList:
    """The images of one seed.

    Attributes:
        paths: of both sides, from the folder that has both, or else behind the side's name; ``class/.../file`` within.
        digests: of the paths and labels of each side, by its name.
        left_out: reason -> number of entries and some of them.
        line: what was left out as half a sentence, or nothing.
    """

    paths: frozenset[str]
    digests: dict[str, str]
    left_out: dict[str, Any]
    line: str

    @classmethod
    def of(
        cls, train: list[Sample], val: list[Sample], folders: tuple[Path, Path], left_out: dict[str, list[str]]
    ) -> ImageList:
        """The list of samples below their folders; the same folder twice where one was split."""
        split = folders[0] == folders[1]
        prefixes = ("", "") if split else (f"{SIDES[0]}/", f"{SIDES[1]}/")
        sides = [
            {prefix + os.path.relpath(path, folder): label for path, label in samples}
            for samples, folder, prefix in zip((train, val), folders, prefixes, strict=True)
        ]
        root = Path(os.path.commonpath(folders))
        return cls(
            frozenset(sides[0]) | frozenset(sides[1]),
            {name: _digest(side.items()) for name, side in zip(SIDES, sides, strict=True)},
            {
                reason: {"count": len(paths), "examples": [os.path.relpath(p, root) for p in paths[:EXAMPLES]]}
                for reason, paths in left_out.items()
            },
            left_out_line(left_out, root),
        )

    def as_dict(self) -> dict[str, Any]:
        """For the run folder: files by folder."""
        folders: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            folder, file = os.path.split(path)
            folders.setdefault(folder, []).append(file)
        return {"left_out": self.left_out, "folders": folders}


def paths_of(folders: dict[str, list[str]]) -> frozenset[str]:
    """``ImageList.paths`` from ``as_dict()["folders"]``."""
    return frozenset(os.path.join(folder, file) for folder, files in folders.items() for file in files)


def changes(before: frozenset[str], now: frozenset[str]) -> str:
    """What was added, removed and moved, as half a sentence.

    A file is taken for moved if one of its name was removed and one added, and neither twice.
    """
    added, removed = now - before, before - now
    names = [Counter(map(os.path.basename, part)) for part in (removed, added)]
    moved = {name for name in names[0] if names[0][name] == names[1][name] == 1}
    come = {os.path.basename(path): path for path in added}
    pairs = [f"{path} to {come[os.path.basename(path)]}" for path in removed if os.path.basename(path) in moved]
    parts = {
        "added": [path for path in added if os.path.basename(path) not in moved],
        "removed": [path for path in removed if os.path.basename(path) not in moved],
        "moved": pairs,
    }
    return "; ".join(f"{len(some)} {what} ({_some(some)})" for what, some in parts.items() if some)


def _some(paths: Iterable[str]) -> str:
    paths = sorted(paths)
    return ", ".join(paths[:EXAMPLES]) + (", ..." if len(paths) > EXAMPLES else "")


def _digest(side: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for path, label in sorted(side):
        digest.update(f"{label} {path}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
