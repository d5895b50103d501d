"""Which group every image belongs to, from a table of attributes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classfair.training.csv_table import MISSING, Table, check_spelling, read_table, told_apart

MAX_GROUPS = 1000  # more values are names of images rather than of groups
NO_GROUP = -1
MIN_IMAGES = 2  # of a group with a penalty, in training


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
    table = read_table(file, {"group_column": column}, root, "groups", example=os.path.relpath(train[0], root))
    images = [os.path.normpath(path) for path in (*train, *val)]
    if missing := [os.path.relpath(path, root) for path in images if path not in table.values]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"expected every image in {file}, got none of {', '.join(missing[:5])}{more} (read from its column"
            f" {table.path_column}, which has paths such as {told_apart(table.example, missing[0])})"
        )
    values = [_value(table, path, column, file, missing_is_blank=missing_is_blank) for path in images]
    names = sorted(set(values) - {""})
    if not 0 < len(names) <= MAX_GROUPS:
        raise ValueError(f"expected group_column {column} with 1 to {MAX_GROUPS} different values, got {len(names)}")
    check_spelling(names, column, file)
    number = {name: i for i, name in enumerate(names)} | {"": NO_GROUP}
    groups = torch.tensor([number[value] for value in values])
    parts = groups[: len(train)], groups[len(train) :]
    for part, group in zip(("training", "validation"), parts, strict=True):
        if not (group >= 0).any():
            raise ValueError(f"expected {part} images with a {column} in {file}, got blanks only")
    return Groups(names, *parts)


def _value(table: Table, path: str, column: str, file: Path, *, missing_is_blank: bool) -> str:
    (value,) = table.values[path]
    if value.casefold() not in MISSING:
        return value
    if missing_is_blank:
        return ""
    raise ValueError(
        f"expected groups as {column} in {file}, got {value} in line {table.lines[path]}, which stands for a missing"
        " value: --missing-groups blank takes such words for blanks; a group needs another name"
    )


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
