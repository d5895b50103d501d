"""A run folder has one owner: its lock, and the names of files that are not finished."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import socket
from pathlib import Path

from classfair._names import say

LOCK = ".lock"
UNFINISHED = re.compile(r"\.classfair-tmp-(\d+)-([0-9a-f]{8})-.+")

_held: set[int] = set()  # descriptors


class Lock:
    """Held until :meth:`release` or the end of this process, however it ends.

    Raises:
        BlockingIOError: another job has it.
        OSError: no file can be made in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        while not self._acquire(folder):
            pass

    def _acquire(self, folder: Path) -> bool:
        """False where the owner before removed the file between our opening and locking it."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._descriptor, 200).decode(errors="replace") or "another one"
            os.close(self._descriptor)
            raise BlockingIOError(
                f"expected a run folder that no other job writes to, got {folder}, which {owner} writes to"
            ) from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): see to it that no two jobs write to it")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                os.truncate(self._descriptor, 0)
                os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                _held.add(self._descriptor)
                return True
        os.close(self._descriptor)
        return False

    def release(self) -> None:
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            self._path.unlink(missing_ok=True)  # before others can have it
            os.close(self._descriptor)


def _forget() -> None:
    """A process that loads images must not keep the lock of one that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def unfinished_name(name: str) -> str:
    """What a file is called until it is whole."""
    return f".classfair-tmp-{os.getpid()}-{_host()}-{name}"


def remove_unfinished(folder: Path) -> None:
    """Remove what dead processes of this machine left half-written, and nothing else."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        found = UNFINISHED.fullmatch(entry.name)
        if found and found[2] == _host() and not _lives(int(found[1])) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether another process has that number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
