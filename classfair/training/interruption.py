"""Ctrl-C: noted where it comes, acted on between batches; a second one acts at once.

An exception at any place whatever may come while a loader starts its workers, where it is swallowed or leaves them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_noted = threading.Event()


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Note interrupts while this lasts."""
    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield
        return
    _noted.clear()
    previous = signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _note(number: int, frame: FrameType | None) -> None:
    if _noted.is_set():
        raise KeyboardInterrupt
    _noted.set()


def check() -> None:
    """KeyboardInterrupt if one was noted."""
    if _noted.is_set():
        raise KeyboardInterrupt
