"""Images that a list or a table names, as data sets for long tails and with attributes are published."""

from __future__ import annotations

import os
from pathlib import Path

from classfair._names import printable
from classfair.training.config import TrainConfig
from classfair.training.csv_table import MISSING, Table, check_spelling, read_table
from classfair.training.image_samples import Samples, check_complete, some, split_samples
from classfair.training.scan import Sample
from classfair.training.schema import check_regular

SIDES = {"train": 0, "training": 0, "0": 0, "val": 1, "valid": 1, "validation": 1, "1": 1}


def listed_samples(config: TrainConfig, seed: int) -> Samples:
    """Images of lists of paths and labels; ValueError about what is wrong with them.

    Labels are numbers from 0 on, which are the names of their classes too.
    """
    root, file = Path(config.image_root), Path(config.place)
    train = _read_list(file, root)
    names = [str(label) for label in range(_number_of_classes(train, file))]
    if config.split:
        check_complete(train, names, f"training images of every class in {file}", "")
        train, val = split_samples(train, config.split, seed)
    else:
        val = _read_list(Path(config.val_list), root)
        if unknown := sorted({label for _, label in val if label >= len(names)}):
            raise ValueError(
                f"expected classes of {file} in {config.val_list}, got {some([*map(str, unknown)])} as well"
            )
    return _checked(Samples(names, train, val, (root, root), {}), config)


def table_samples(config: TrainConfig, seed: int) -> Samples:
    """Images of a CSV table with a column of labels, on sides that it names or that are split by seed."""
    root, file = Path(config.image_root), Path(config.place)
    columns = {"label_column": config.label_column}
    if config.split_column:
        columns["split_column"] = config.split_column
    table = read_table(file, columns, root, "labels")
    names = _class_names(table, config.label_column, file)
    label = {name: i for i, name in enumerate(names)}
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    others: list[str] = []
    for path, (name, *side) in table.values.items():
        number = SIDES.get(side[0].casefold(), -1) if side else 0
        if number < 0:
            others.append(path)
        else:
            sides[number].append((path, label[name]))
    train, val = sides
    left_out = {"of another side": others} if others else {}
    if config.split:
        check_complete(train, names, f"training images of every class in {file}", "")
        train, val = split_samples(train, config.split, seed)
    return _checked(Samples(names, train, val, (root, root), left_out), config)


def _checked(samples: Samples, config: TrainConfig) -> Samples:
    """ValueError unless every class is there, no image is on both sides, and every file exists below the root."""
    samples.check(config.allow_missing)
    root = samples.folders[0]
    if both := sorted({path for path, _ in samples.train} & {path for path, _ in samples.val}):
        raise ValueError(
            f"expected validation images other than those of training, got {_short(both, root)} on both sides"
        )
    paths = [path for path, _ in (*samples.train, *samples.val)]
    if outside := [path for path in paths if os.path.relpath(path, root).split(os.sep)[0] == os.pardir]:
        raise ValueError(f"expected paths of images below {root}, got {_short(outside, root)}")
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise ValueError(f"expected images below {root}, got no file {_short(missing, root)}")
    return samples


def _short(paths: list[str], root: Path) -> str:
    return some([os.path.relpath(path, root) for path in paths])


def _read_list(file: Path, root: Path) -> list[Sample]:
    """Lines of a path and a label, with white space between."""
    samples: dict[str, int] = {}
    try:
        check_regular(file)
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a list of images in UTF-8, got {file} ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        written, _, text = line.strip().replace("\t", " ").rpartition(" ")
        if not written or not (text.isascii() and text.isdigit()):
            raise ValueError(f"expected a path and a label from 0 on in {where}, got {printable(line.strip())[:80]}")
        path = os.path.normpath(os.path.join(root, written.strip()))
        if path in samples:
            raise ValueError(f"expected one line per image, got {printable(written.strip())} again in {where}")
        samples[path] = int(text)
    if not samples:
        raise ValueError(f"expected a line per image in {file}, got none")
    return list(samples.items())


def _number_of_classes(samples: list[Sample], file: Path) -> int:
    """One more than the largest label; ValueError where there are more classes than images."""
    largest = max(label for _, label in samples)
    if largest >= len(samples):
        present = {label for _, label in samples}
        first = next(label for label in range(largest) if label not in present)
        raise ValueError(f"expected training images of every class in {file}, got none of {first}, but label {largest}")
    return largest + 1


def _class_names(table: Table, column: str, file: Path) -> list[str]:
    """The distinct labels: numbers in their order, words in that of the alphabet."""
    for path, (name, *_) in table.values.items():
        if name.casefold() in MISSING or not name or printable(name) != name:
            got = name if name and printable(name) == name else repr(name) if name else "a blank"
            raise ValueError(f"expected a class as {column} in {file}, got {got} in line {table.lines[path]}")
    names = sorted({name for name, *_ in table.values.values()})
    check_spelling(names, column, file)
    if all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=int)
    return names
