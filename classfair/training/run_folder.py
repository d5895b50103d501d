"""The folder a run leaves behind: every file appears complete or not at all."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import re
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from classfair._names import cell, printable, say
from classfair.training.image_list import ImageList
from classfair.training.ownership import LOCK, Lock, remove_unfinished
from classfair.training.totals import CLASS_COLUMNS, Epoch
from classfair.training.whole_files import append_whole, write_whole

CHECKPOINT_VERSION = 4
IMAGES_VERSION = 1
CONFIG = "config.json"
IMAGES = "images.json.gz"
COLUMNS = [f"{part}_{column}" for part in ("train", "val") for column in CLASS_COLUMNS]
STATISTICS = ",".join(["epoch", "class", *COLUMNS]) + "\n"
FOLDERS = ("checkpoints", "statistics")
NUMBER = r"(?:[0-9.e+-]+|nan|inf)"
GROUP_STATISTICS = ",".join(["epoch", "group", "class", *COLUMNS]) + "\n"


class RunFolder:
    """The folder of one job. A job that fails before its first checkpoint leaves nothing of a new one.

    Raises OSError with a one-line message if a new folder holds files, or any cannot be written to.

    Use it as a context manager around the job:

        with RunFolder(path) as folder:
            folder.write_json("config.json", {...})
    """

    def __init__(self, path: Path, *, resume: bool = False, unique: bool = False) -> None:
        """``unique``: take another name, with a number, where this one exists."""
        self.finished: list[str] = []
        self.has_checkpoint = resume
        self._created: list[Path] = []
        self._written: list[Path] = []
        self._lock: Lock | None = None
        self._images_kept = False
        try:
            self.path = self._make(path, unique=unique)
            self._lock = Lock(self.path)
            if not resume and (entries := sorted({entry.name for entry in self.path.iterdir()} - {LOCK})):
                raise FileExistsError(f"expected a new or empty output folder, got {path}, which holds {entries[0]}")
            tempfile.TemporaryFile(dir=self.path).close()
            for folder in (self.path, *(self.path / name for name in FOLDERS)):
                remove_unfinished(folder)
        except OSError as error:
            self._leave()
            if error.strerror is None:
                raise
            reason = error.strerror.lower()
            raise type(error)(f"expected a writable output folder, got {path} ({reason})") from None

    def _make(self, path: Path, *, unique: bool) -> Path:
        self._created += [p for p in path.parents if not p.exists()]  # deepest first
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted, number = path, 1
        while True:
            try:
                path.mkdir()
                self._created.insert(0, path)
                return path
            except FileExistsError:
                if not unique:
                    path.mkdir(exist_ok=True)  # an error for a file
                    return path
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if board := self.__dict__.get("_board"):
                with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):  # the first one counts
                    board.close()
        finally:
            keep = kind is None or self.has_checkpoint
            if not keep:
                for path in self._written:
                    path.unlink(missing_ok=True)
            self._leave(keep=keep)

    def _leave(self, *, keep: bool = False) -> None:
        if self._lock is not None:
            self._lock.release()
        if keep:
            return
        for path in self._created:
            try:
                path.rmdir()
            except OSError:  # never made, or something else lives in it by now
                continue

    def write(self, name: str, content: bytes | Callable[[BinaryIO], object]) -> None:
        """Write a file of that name, never half of it."""
        write_whole(self._place(name), content)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(json_ready(content), indent=2, allow_nan=False)
        self.write(name, text.encode() + b"\n")

    def write_checkpoint(self, name: str, state: dict[str, Any], *, last: bool) -> None:
        """Replace the checkpoint of a run, keeping the one before until the run is finished."""
        target, previous = checkpoint_files(self.path, name)
        if target.exists():
            target.replace(previous)
        self.write(str(target.relative_to(self.path)), lambda file: torch.save(state, file))
        self.has_checkpoint = True
        if last:
            previous.unlink(missing_ok=True)
            self.finished.append(name)

    def keep_images(self, images: ImageList) -> None:
        """Keep the list of images for a resume, and say what is not in it; once for all runs."""
        if self._images_kept:
            return
        self._images_kept = True
        if images.line:
            say(f"left out {images.line}")
        if not (self.path / IMAGES).exists():
            text = json.dumps({"format_version": IMAGES_VERSION, **images.as_dict()}, indent=0)
            self.write(IMAGES, gzip.compress(text.encode(), mtime=0))

    def begin(self, name: str, epoch: int, classes: int, groups: list[str], *, finished: bool) -> None:
        """Start or go on with a run after that epoch: what was logged later was lost with its weights."""
        if finished:
            self.finished.append(name)
        expected = [str(c) for c in range(classes)]
        self._cut(f"{name}.csv", STATISTICS, epoch, expected)
        by_group = [f"{text},{c}" for text in map(_csv_text, groups) for c in expected]
        self._cut(f"{name}-groups.csv", GROUP_STATISTICS, epoch, by_group)

    def _cut(self, file: str, header: str, epoch: int, keys: list[str]) -> None:
        """Keep the rows of a log up to an epoch; a damaged one is kept beside it, by name."""
        log = self.path / "statistics" / file
        if not keys or not (log.exists() or epoch):
            return
        text = log.read_bytes().decode(errors="replace") if log.is_file() else ""
        numbers = "," + ",".join([NUMBER] * len(COLUMNS))
        due = {f"{e},{key}" for e in range(1, epoch + 1) for key in keys}
        kept = {}
        for row in text.split("\n")[:-1]:  # a kill leaves half a row, or a header that never reached the disk
            found = re.fullmatch(f"(.*){numbers}", row)
            if found and found[1] in due:
                kept[found[1]] = f"{row}\n"
        if lost := len(due) - len(kept):
            aside = f"statistics/{file}.damaged"
            self.write(aside, text.encode())
            say(f"{log} lacks {lost} of {len(due)} rows up to epoch {epoch}; what it had is in {self.path / aside}")
        self.write(f"statistics/{file}", (header + "".join(kept.values())).encode())

    def log(self, name: str, now: Epoch) -> None:
        """Statistics of an epoch by class and by group, and its scalars for TensorBoard where that is installed."""
        pairs = enumerate(zip(now.train.rows(), now.val.rows(), strict=True))
        self._append(f"statistics/{name}.csv", STATISTICS, [[now.epoch, c, *train, *val] for c, (train, val) in pairs])
        if now.groups:
            parts = zip(now.train.group_rows(), now.val.group_rows(), strict=True)
            groups = zip(now.groups, parts, strict=False)  # what follows the named ones are images without a group
            rows = [
                [now.epoch, cell(group), c, *train, *val]
                for group, both in groups
                for c, (train, val) in enumerate(zip(*both, strict=True))
            ]
            self._append(f"statistics/{name}-groups.csv", GROUP_STATISTICS, rows)
        self._log_scalars(name, now)

    def _append(self, name: str, header: str, rows: list[list[Any]]) -> None:
        log = self._place(name)
        text = io.StringIO()
        if not log.exists():
            text.write(header)
        csv.writer(text, lineterminator="\n").writerows(rows)
        append_whole(log, text.getvalue())

    def _log_scalars(self, name: str, now: Epoch) -> None:
        if self._board is not None:
            for key, value in now.summary().items():
                self._board.add_scalar(f"{name}/{printable(key)}", value, now.epoch)

    @cached_property
    def _board(self) -> Any:
        """TensorBoard's writer, None where it is not installed: looked for at the first epoch, not at each."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        try:
            board = SummaryWriter(str(self.path / "tensorboard"))
        except UnicodeEncodeError:  # a path that is not of the locale's encoding
            say(f"no TensorBoard: it cannot write to {self.path}")
            return None
        self._written += (self.path / "tensorboard").iterdir()
        self._created.insert(0, self.path / "tensorboard")
        return board

    def _place(self, name: str) -> Path:
        target = self.path / name
        if not target.parent.exists():
            target.parent.mkdir()
            self._created.insert(0, target.parent)
        if not target.exists():
            self._written.append(target)
        return target


def checkpoint_files(path: Path, name: str) -> tuple[Path, Path]:
    """The newest checkpoint of a run, and the one before it."""
    folder = path / "checkpoints"
    return folder / f"{name}.pt", folder / f"{name}.previous.pt"


def _csv_text(text: str) -> str:
    """As a cell of a row that is written."""
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow([cell(text)])
    return row.getvalue()


def json_ready(value: Any) -> Any:
    """Strict JSON has no nan: it becomes null."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
