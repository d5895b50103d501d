"""Files that are whole or not there, however a job and its disk end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from classfair.training.ownership import unfinished_name


def write_whole(target: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write to a temporary neighbour, force it to disk, then rename."""
    temporary = target.with_name(unfinished_name(target.name))
    with _named(target):
        try:
            with temporary.open("xb") as file:
                if callable(content):
                    _call(content, file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:  # an interrupt too
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


def append_whole(target: Path, text: str) -> None:
    """Append all of it or nothing."""
    with _named(target), target.open("ab", buffering=0) as file:
        size, rest = file.seek(0, os.SEEK_END), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """OSError with the name of the file."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"expected to write {target}, got {error.strerror or error}") from None


def _call(write: Callable[[BinaryIO], object], file: BinaryIO) -> None:
    """torch.save turns the errors of a file into a RuntimeError about positions."""
    errors: list[OSError] = []

    class Noting:
        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                errors.append(error)
                raise

        flush = file.flush

    try:
        write(cast(BinaryIO, Noting()))
    except RuntimeError:
        if errors:
            raise errors[0] from None
        raise


def _sync_folder(path: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
