"""What ``--data`` names: a data set, and where its files are."""

from __future__ import annotations

import os
from typing import Any

DIGITS = ("digits", "digits-groups")
MNIST = ("mnist-lt", "mnist-colour")
IMAGES = {"imagefolder": "DIR", "list": "FILE", "csv": "FILE.csv"}  # kinds of image files, and what follows the colon
HEAD_COUNTS = {"digits": 80, "digits-groups": 80, "mnist-lt": 5000, "mnist-colour": 5000}  # of the largest class
FORMS = (*DIGITS, *(f"{kind}[:DIR]" for kind in MNIST), *(f"{kind}:{place}" for kind, place in IMAGES.items()))


def kind_of(data: str) -> str:
    """The part before the colon if ``data`` is of a known form, else nothing.

    >>> kind_of("imagefolder:/data/plants"), kind_of("digits"), kind_of("imagefolder:"), kind_of("digits:8")
    ('imagefolder', 'digits', '', '')
    """
    kind, colon, place = data.partition(":")
    known = kind in DIGITS and not colon
    known |= kind in MNIST and bool(place) == bool(colon)
    return kind if known or (kind in IMAGES and place) else ""


def place_of(data: str) -> str:
    """The folder or file, nothing if none is named."""
    return data.partition(":")[2]


def with_absolute_place(data: str) -> str:
    kind, place = kind_of(data), place_of(data)
    return f"{kind}:{os.path.abspath(place)}" if kind and place else data


def default_kinds(data: str) -> tuple[str, ...]:
    """Under which names an option may have a default for that data set, the most particular one first."""
    kind = kind_of(data)
    own = {"digits-groups": ("groups",), "mnist-lt": ("mnist",), "mnist-colour": ("colour", "mnist")}
    return (*own.get(kind, ("images",) if kind in IMAGES else ()), "default")


def source_rules(config: Any) -> dict[str, tuple[bool, str]]:
    """Where image files and their labels are: by option, whether it holds and what is expected."""
    kind, rules = config.kind, {}
    used = {"val_dir": ("imagefolder",), "val_list": ("list",), "image_root": ("list", "csv")}
    used |= {"label_column": ("csv",), "split_column": ("csv",), "groups": ("imagefolder", "list")}
    for name, kinds in used.items():
        forms = either(tuple(f"{k}:{IMAGES[k]}" for k in kinds))
        rules[name] = (not getattr(config, name) or kind in kinds, f"with --data {forms}")
    needed: dict[str, tuple[str, ...]] = {"list": ("image_root",), "csv": ("image_root", "label_column")}
    for name in needed.get(kind, ()):
        rules[name] = (bool(getattr(config, name)), f"with --data {kind}:{IMAGES[kind]}")
    others = [name for name in ("val_dir", "val_list", "split_column") if getattr(config, name)]
    if config.split and others:
        rules["split"] = (False, f"to be left out with {others[0]}")
    if kind in needed and not (config.split or others):
        other = "val_list" if kind == "list" else "split_column"
        rules["split"] = (False, f"above 0, or {other}, with --data {kind}:{IMAGES[kind]}")
    return rules


def either(known: tuple[str, ...]) -> str:
    return f"{', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else known[0]
