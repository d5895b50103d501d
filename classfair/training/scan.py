"""Which files of a folder are images of its classes, and what is left out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

Sample = tuple[str, int]  # path and label

#: What images are called; case does not matter. As in torchvision.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EXAMPLES = 3  # of every reason, in the line about what was left out


@dataclass
class Scan:
    """Folders of images, whose real folders are visited once: across all of them, and whatever links there are.

    Attributes:
        roots: folders whose own subfolders are visited as themselves, not through links.
        left_out: what is no image of a class, by reason.
    """

    roots: tuple[Path, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._real = [os.path.realpath(root) for root in self.roots]

    def classes(self, folder: Path) -> list[str]:
        """Names of the classes, in the order of their labels."""
        names = []
        for entry in self._entries(folder):
            if _is_folder(entry):
                names.append(entry.name)
            else:
                self._leave_out("outside of class folders", entry.path)
        return sorted(names)

    def samples(self, folder: Path, names: list[str]) -> list[Sample]:
        """Images of the classes by name, sorted: a class that is missing here must not shift the labels of others."""
        top = {entry.name: entry for entry in self._entries(folder, quiet=True)}
        found: list[Sample] = []
        for label, name in enumerate(names):
            if name in top and _is_folder(top[name]) and self._is_new(top[name]):
                found += [(path, label) for path in sorted(self._images(top[name].path), key=os.path.split)]
        return found

    def _images(self, folder: str) -> Iterable[str]:
        stack = [folder]
        while stack:
            for entry in self._entries(stack.pop()):
                if _is_folder(entry):
                    if self._is_new(entry):
                        stack.append(entry.path)
                elif not _is_file(entry):
                    self._leave_out("not regular files", entry.path)
                elif not entry.name.lower().endswith(EXTENSIONS):
                    self._leave_out("of unknown extensions", entry.path)
                else:
                    yield entry.path

    def _entries(self, folder: str | Path, *, quiet: bool = False) -> list[os.DirEntry[str]]:
        """What is in a folder, but for dot entries."""
        try:
            with os.scandir(folder) as entries:
                everything = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            self._leave_out("unreadable folders", str(folder))
            return []
        visible = [entry for entry in everything if not entry.name.startswith(".")]
        if not quiet:
            for entry in everything:
                if entry.name.startswith("."):
                    self._leave_out("hidden", entry.path)
        return visible

    def _is_new(self, folder: os.DirEntry[str]) -> bool:
        """Whether a folder is visited here, not elsewhere under its own name or another one."""
        try:
            status = folder.stat()
        except OSError:
            self._leave_out("unreadable folders", folder.path)
            return False
        identity = status.st_dev, status.st_ino
        if identity in self._seen or (folder.is_symlink() and self._is_visited_as_itself(os.path.realpath(folder))):
            self._leave_out("folders visited once already", folder.path)
            return False
        self._seen.add(identity)
        return True

    def _is_visited_as_itself(self, real: str) -> bool:
        """Whether the folder is a part of a root that no dot entry hides, or contains a root."""
        for root in self._real:
            common = os.path.commonpath([root, real])
            if common == real or (common == root and not any(p.startswith(".") for p in _parts(real, root))):
                return True
        return False

    def _leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(path)


def left_out_line(left_out: dict[str, list[str]], root: Path) -> str:
    """What was left out as half a sentence; nothing if nothing was."""
    parts = []
    for reason, paths in left_out.items():
        some = ", ".join(os.path.relpath(path, root) for path in paths[:EXAMPLES])
        parts.append(f"{len(paths)} {reason} ({some}{', ...' if len(paths) > EXAMPLES else ''})")
    return ", ".join(parts)


def _parts(path: str, root: str) -> tuple[str, ...]:
    return Path(os.path.relpath(path, root)).parts


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
