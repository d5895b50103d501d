"""The folder a run leaves behind: every file appears complete or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from classfair.training.totals import CLASS_COLUMNS, Epoch

CHECKPOINT_VERSION = 2
GROUPS_VERSION = 3  # with groups: an earlier classfair would go on without them and their penalty
CONFIG = "config.json"
COLUMNS = [f"{part}_{column}" for part in ("train", "val") for column in CLASS_COLUMNS]
STATISTICS = ",".join(["epoch", "class", *COLUMNS]) + "\n"
GROUP_STATISTICS = ",".join(["epoch", "group", "class", *COLUMNS]) + "\n"


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on with."""


class RunFolder:
    """The folder of one job. A job that fails before its first checkpoint leaves nothing of a new one.

    Raises OSError with a one-line message if a new folder holds files, or any cannot be written to.

    Use it as a context manager around the job:

        with RunFolder(path) as folder:
            folder.write_json("config.json", {...})
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self.finished: list[str] = []
        self.has_checkpoint = resume
        self._created: list[Path] = []
        self._written: list[Path] = []
        try:
            self._created += [p for p in (path, *path.parents) if not p.exists()]  # deepest first
            path.mkdir(parents=True, exist_ok=True)
            if not resume and (entries := sorted(entry.name for entry in path.iterdir())):
                raise FileExistsError(f"expected a new or empty output folder, got {path}, which holds {entries[0]}")
            tempfile.TemporaryFile(dir=path).close()
            for unfinished in path.rglob(".*.[0-9]*"):  # a kill left them
                unfinished.unlink()
        except OSError as error:
            self._remove_created()
            if error.strerror is None:
                raise
            reason = error.strerror.lower()
            raise type(error)(f"expected a writable output folder, got {path} ({reason})") from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if board := self.__dict__.get("_board"):
            board.close()
        if kind is not None and not self.has_checkpoint:
            for path in self._written:
                path.unlink(missing_ok=True)
            self._remove_created()

    def write(self, name: str, content: bytes | Callable[[BinaryIO], object]) -> Path:
        """Write to a temporary neighbour, force it to disk, then rename: never half a file."""
        target = self._place(name)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:  # an interrupt too
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
        return target

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(json_ready(content), indent=2, allow_nan=False)
        self.write(name, text.encode() + b"\n")

    def write_checkpoint(self, name: str, state: dict[str, Any], *, last: bool) -> None:
        """Replace the checkpoint of a run, keeping the one before until the run is finished."""
        target, previous = _checkpoints(self.path, name)
        if target.exists():
            target.replace(previous)
        self.write(str(target.relative_to(self.path)), lambda file: torch.save(state, file))
        self.has_checkpoint = True
        if last:
            previous.unlink(missing_ok=True)
            self.finished.append(name)

    def begin(self, name: str, epoch: int, *, finished: bool) -> None:
        """Start or go on with a run after that epoch: what was logged later was lost with its weights."""
        if finished:
            self.finished.append(name)
        for file, header in ((f"{name}.csv", STATISTICS), (f"{name}-groups.csv", GROUP_STATISTICS)):
            log = self.path / "statistics" / file
            if not log.exists():
                continue
            rows = log.read_text(errors="replace").splitlines(keepends=True)
            number = re.compile(r"(\d+),.*\n")  # a kill leaves half a row, or a header that never reached the disk
            kept = [row for row in rows if (found := number.fullmatch(row)) and int(found[1]) <= epoch]
            self.write(f"statistics/{file}", (header + "".join(kept)).encode())

    def log(self, name: str, now: Epoch) -> None:
        """Statistics of an epoch by class and by group, and its scalars for TensorBoard where that is installed."""
        pairs = enumerate(zip(now.train.rows(), now.val.rows(), strict=True))
        self._append(f"statistics/{name}.csv", STATISTICS, [[now.epoch, c, *train, *val] for c, (train, val) in pairs])
        if now.groups:
            parts = zip(now.train.group_rows(), now.val.group_rows(), strict=True)
            groups = zip(now.groups, parts, strict=False)  # what follows the named ones are images without a group
            rows = [
                [now.epoch, group, c, *train, *val]
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
        with log.open("a") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())

    def _log_scalars(self, name: str, now: Epoch) -> None:
        if self._board is not None:
            for key, value in now.summary().items():
                self._board.add_scalar(f"{name}/{key}", value, now.epoch)

    @cached_property
    def _board(self) -> Any:
        """TensorBoard's writer, None where it is not installed: looked for at the first epoch, not at each."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        board = SummaryWriter(str(self.path / "tensorboard"))
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

    def _remove_created(self) -> None:
        for path in self._created:
            try:
                path.rmdir()
            except OSError:  # never made, or something else lives in it by now
                continue


def _checkpoints(path: Path, name: str) -> tuple[Path, Path]:
    folder = path / "checkpoints"
    return folder / f"{name}.pt", folder / f"{name}.previous.pt"


def _sync_folder(path: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(path: Path, loss: str, seed: int) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, None if there is none; CheckpointError for one of another version."""
    name = f"{loss}-seed{seed}"
    files = [file for file in _checkpoints(path, name) if file.exists()]
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load checks no checksum
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch.load fails in many ways on what is no checkpoint, and refuses pickled code
            state = None
        if not isinstance(state, dict):
            print(f"classfair train: {file} is damaged", file=sys.stderr)
            continue
        version = state.get("format_version")
        if version not in (CHECKPOINT_VERSION, GROUPS_VERSION):
            age = "a newer" if isinstance(version, int) and version > GROUPS_VERSION else "an older"
            raise CheckpointError(
                f"expected a checkpoint of format {CHECKPOINT_VERSION} or {GROUPS_VERSION}, got {file} of format"
                f" {version}, which {age} classfair wrote"
            )
        if (state.get("loss"), state.get("seed")) != (loss, seed):
            raise CheckpointError(f"expected a checkpoint of {name}, got {file} of another run")
        return state
    if files:
        raise CheckpointError(f"expected a whole checkpoint of {name} in {path}, got damaged ones only")
    return None


def json_ready(value: Any) -> Any:
    """Strict JSON has no nan: it becomes null."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
