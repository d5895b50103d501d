"""Names of classes, groups and files are data: how they are written to terminals and tables."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import unicodedata
from collections.abc import Iterator

#: Characters at the start of a cell that make a spreadsheet compute it.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: Unicode categories that steer a terminal or a reader instead of being read: control, format, surrogate, private,
#: unassigned, and separators of lines and paragraphs.
STEERING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object) -> str:
    r"""The text with everything that is no visible character as an escape sequence of Python.

    >>> printable("cat\x1b[2J\u2028dog")
    'cat\\x1b[2J\\u2028dog'
    """
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in STEERING else c for c in str(text))


def cell(name: str) -> str:
    """The name as a cell of a CSV file that spreadsheets show as it is, and that splits no line.

    >>> cell("=HYPERLINK(...)")
    "'=HYPERLINK(...)"
    >>> cell("-1")
    '-1'
    """
    text = printable(name)
    return f"'{text}" if name.startswith(FORMULA) and not _is_number(name) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def markup(name: str) -> str:
    r"""The name within rich's markup.

    >>> markup("[red]cat[/]")
    '\\[red]cat\\[/]'
    """
    from rich.markup import escape

    return escape(printable(name))


command = "train"  # which one speaks


@contextlib.contextmanager
def speaking_as(name: str) -> Iterator[None]:
    """Messages begin with this command."""
    global command
    kept, command = command, name
    try:
        yield
    finally:
        command = kept


def say(message: object) -> None:
    """One line on stderr, whatever the names in it."""
    print(f"classfair {command}: {printable(message)}", file=sys.stderr)


@functools.cache
def say_once(message: str) -> None:
    """Once, however many runs and processes come to it."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun
        say(message)
