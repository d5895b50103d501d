"""A table of images: a CSV file with a header, one row per image, some columns by name."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from classfair.training.schema import check_regular

#: What tables have in the place of a missing value; case does not matter. Those that pandas reads as one, and two more.
MISSING = {
    *("nan", "-nan", "na", "n/a", "#n/a", "#n/a n/a", "#na", "<na>", "none", "null", "nil", "nat"),
    *("-1.#ind", "-1.#qnan", "1.#ind", "1.#qnan"),
}
PATH_COLUMNS = ("file", "image")


@dataclass
class Table:
    """Some columns of a file."""

    path_column: str
    example: str = ""  # a path as it is written there
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by normalised path
    lines: dict[str, int] = field(default_factory=dict)  # likewise


def read_table(file: Path, columns: dict[str, str], root: Path, what: str, example: str = "") -> Table:
    """Values by path; ValueError about what is wrong.

    Args:
        file: CSV in UTF-8 with a header. Its column file, or image, or else the first one has paths from ``root``.
        columns: name of a column by the option that names it.
        root: where paths start.
        what: the table is of, for errors.
        example: a path as it should be.
    """
    table: Table | None = None
    try:
        check_regular(file)
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = csv.reader(text, strict=True)
            header = [name.strip() for name in next(rows, [])]
            path_at, values_at = _columns(file, columns, header)
            for row in rows:
                if not row:  # an empty line
                    continue
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"expected {len(header)} columns in {where}, got {len(row)}")
                path = os.path.normpath(os.path.join(root, row[path_at]))
                table = table or Table(header[path_at], row[path_at])
                if path in table.values:
                    bare = os.path.basename(row[path_at]) == row[path_at] and example
                    hint = f": paths start at the data folder, such as {example}" if bare else ""
                    raise ValueError(f"expected one row per image, got {row[path_at]} again in {where}{hint}")
                table.values[path] = tuple(row[at].strip() for at in values_at)
                table.lines[path] = rows.line_num
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"expected {what} in a CSV file in UTF-8, got {file} ({error})") from None
    if table is None:
        raise ValueError(f"expected a row per image in {file}, got none")
    return table


def check_spelling(names: Iterable[str], column: str, file: Path) -> None:
    """ValueError where one value is two by its spelling: 1 and 1.0, or an accent composed and not."""
    seen: dict[Any, str] = {}
    for name in names:
        try:
            key: Any = float(name)
        except ValueError:
            key = unicodedata.normalize("NFKC", name)
        if key in seen:
            one, other = seen[key], told_apart(name, seen[key])
            raise ValueError(f"expected one spelling of every {column} in {file}, got {one} and {other}, which are one")
        seen[key] = name


def told_apart(text: str, other: str) -> str:
    """The text, as escapes where it looks like the other one."""
    alike = text != other and unicodedata.normalize("NFKC", text) == unicodedata.normalize("NFKC", other)
    return ascii(text) if alike else text


def _columns(file: Path, columns: dict[str, str], header: list[str]) -> tuple[int, list[int]]:
    """Where the paths are, and where the values."""
    if not header:
        raise ValueError(f"expected a header in {file}, got an empty file or line")
    if len(header) == 1 and (other := next((mark for mark in (";", "\t") if mark in header[0]), None)):
        name = "semicolons" if other == ";" else "tabs"
        raise ValueError(f"expected columns separated by commas in {file}, got {name}")
    path = next((name for name in PATH_COLUMNS if name in header), header[0])
    for option, column in columns.items():
        if header.count(column) != 1:
            raise ValueError(f"expected {option} as one of {', '.join(header)} in {file}, got {column}")
        if path == column:
            raise ValueError(f"expected {option} other than the paths of images in {file}, got {column}")
    return header.index(path), [header.index(column) for column in columns.values()]
