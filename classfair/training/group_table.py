"""Which group every image belongs to, from a table of attributes."""

from __future__ import annotations

import csv
import hashlib
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classfair.training.schema import check_regular

MAX_GROUPS = 1000  # more values are names of images rather than of groups
NO_GROUP = -1
MIN_IMAGES = 2  # of a group with a penalty, in training
#: What tables have in the place of a missing value; case does not matter. Those that pandas reads as one, and two more.
MISSING = {
    *("nan", "-nan", "na", "n/a", "#n/a", "#n/a n/a", "#na", "<na>", "none", "null", "nil", "nat"),
    *("-1.#ind", "-1.#qnan", "1.#ind", "1.#qnan"),
}
PATH_COLUMNS = ("file", "image")


@dataclass(frozen=True)
class Groups:
    """The group of every image of one seed, -1 for none: in the loss and the totals, in no group's and no penalty."""

    names: list[str]
    train: Tensor  # (N,) int64
    val: Tensor  # (M,) int64

    @property
    def incomplete(self) -> bool:
        """Whether an image has no group."""
        return any(bool((part == NO_GROUP).any()) for part in (self.train, self.val))

    @property
    def digest(self) -> str:
        """What tells another assignment from this one: of every image's group, in the order of the images."""
        digest = hashlib.sha256()
        for part in (self.train, self.val):
            digest.update(len(part).to_bytes(8, "little") + part.to(torch.int64).cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Table:
    """Two columns of a file."""

    values: dict[str, str]  # by normalised path
    lines: dict[str, int]  # likewise
    path_column: str
    example: str  # a path as it is written there


def read_groups(
    file: Path, column: str, root: Path, train: list[str], val: list[str], *, missing_is_blank: bool = False
) -> Groups:
    """The groups of images by their paths: the distinct values of the column, sorted; ValueError about what is wrong.

    Args:
        file: CSV with a header. Paths in it start at ``root``.
        column: whose values are the groups.
        root: the data folder.
        train, val: paths of the images. Other rows of the file are left alone.
        missing_is_blank: take words that stand for missing values for blanks, instead of refusing them.
    """
    table = _read_columns(file, column, root, example=os.path.relpath(train[0], root))
    images = [os.path.normpath(path) for path in (*train, *val)]
    if missing := [os.path.relpath(path, root) for path in images if path not in table.values]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"expected every image in {file}, got none of {', '.join(missing[:5])}{more} (read from its column"
            f" {table.path_column}, which has paths such as {_told_apart(table.example, missing[0])})"
        )
    values = [_value(table, path, column, file, missing_is_blank=missing_is_blank) for path in images]
    names = sorted(set(values) - {""})
    if not 0 < len(names) <= MAX_GROUPS:
        raise ValueError(f"expected group_column {column} with 1 to {MAX_GROUPS} different values, got {len(names)}")
    _check_spelling(names, column, file)
    number = {name: i for i, name in enumerate(names)} | {"": NO_GROUP}
    groups = torch.tensor([number[value] for value in values])
    parts = groups[: len(train)], groups[len(train) :]
    for part, group in zip(("training", "validation"), parts, strict=True):
        if not (group >= 0).any():
            raise ValueError(f"expected {part} images with a {column} in {file}, got blanks only")
    return Groups(names, *parts)


def _value(table: _Table, path: str, column: str, file: Path, *, missing_is_blank: bool) -> str:
    value = table.values[path]
    if value.casefold() not in MISSING:
        return value
    if missing_is_blank:
        return ""
    raise ValueError(
        f"expected groups as {column} in {file}, got {value} in line {table.lines[path]}, which stands for a missing"
        " value: --missing-groups blank takes such words for blanks; a group needs another name"
    )


def _check_spelling(names: list[str], column: str, file: Path) -> None:
    """One group is not two by its spelling: 1 and 1.0, or an accent composed and not."""
    seen: dict[Any, str] = {}
    for name in names:
        try:
            key: Any = float(name)
        except ValueError:
            key = unicodedata.normalize("NFKC", name)
        if key in seen:
            one, other = seen[key], _told_apart(name, seen[key])
            raise ValueError(f"expected one spelling of every {column} in {file}, got {one} and {other}, which are one")
        seen[key] = name


def _told_apart(text: str, other: str) -> str:
    """The text, as escapes where it looks like the other one."""
    alike = text != other and unicodedata.normalize("NFKC", text) == unicodedata.normalize("NFKC", other)
    return ascii(text) if alike else text


def check_for_penalty(groups: Groups) -> None:
    """ValueError where a penalty has nothing to compare, or groups so small that it is chance."""
    counts = torch.bincount(groups.train[groups.train != NO_GROUP], minlength=len(groups.names)).tolist()
    present = [name for name, count in zip(groups.names, counts, strict=True) if count]
    if len(present) < 2:
        raise ValueError(f"expected two groups or more among training images for a penalty, got {present[0]}")
    least = min(counts)
    if least < MIN_IMAGES:
        raise ValueError(
            f"expected {MIN_IMAGES} training images or more of every group for a penalty, got {len(counts)} groups, of "
            f"which {groups.names[counts.index(least)]} has {least}: numbers must be binned first, rare values merged "
            "or left blank"
        )


def group_state(groups: Groups | None) -> dict[str, Any]:
    """What a checkpoint says of the groups."""
    return {} if groups is None else {"group_names": groups.names, "group_digest": groups.digest}


def check_same_groups(groups: Groups | None, state: dict[str, Any]) -> None:
    """ValueError for a checkpoint of other groups, or of the same ones with other images."""
    now = group_state(groups)
    if state.get("group_names") != now.get("group_names"):
        raise ValueError("expected a checkpoint with the groups of the data, got other groups")
    if state.get("group_digest") != now.get("group_digest"):
        raise ValueError(
            "expected every image in the group that it had before the interruption: the groups of images changed"
        )


def _read_columns(file: Path, column: str, root: Path, example: str) -> _Table:
    """Values by path, whose form an example shows."""
    table: _Table | None = None
    try:
        check_regular(file)
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = csv.reader(text, strict=True)
            header = [name.strip() for name in next(rows, [])]
            path_at, value_at = _columns(file, column, header)
            for row in rows:
                if not row:  # an empty line
                    continue
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"expected {len(header)} columns in {where}, got {len(row)}")
                path = os.path.normpath(os.path.join(root, row[path_at]))
                table = table or _Table({}, {}, header[path_at], row[path_at])
                if path in table.values:
                    bare = os.path.basename(row[path_at]) == row[path_at]
                    hint = f": paths start at the data folder, such as {example}" if bare else ""
                    raise ValueError(f"expected one row per image, got {row[path_at]} again in {where}{hint}")
                table.values[path], table.lines[path] = row[value_at].strip(), rows.line_num
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"expected groups in a CSV file in UTF-8, got {file} ({error})") from None
    if table is None:
        raise ValueError(f"expected a row per image in {file}, got none")
    return table


def _columns(file: Path, column: str, header: list[str]) -> tuple[int, int]:
    """Where the paths are, and where the groups."""
    if not header:
        raise ValueError(f"expected a header in {file}, got an empty file or line")
    if len(header) == 1 and (other := next((mark for mark in (";", "\t") if mark in header[0]), None)):
        name = "semicolons" if other == ";" else "tabs"
        raise ValueError(f"expected columns separated by commas in {file}, got {name}")
    if header.count(column) != 1:
        raise ValueError(f"expected group_column as one of {', '.join(header)} in {file}, got {column}")
    path = next((name for name in PATH_COLUMNS if name in header), header[0])
    if path == column:
        raise ValueError(f"expected group_column other than the paths of images in {file}, got {column}")
    return header.index(path), header.index(column)
