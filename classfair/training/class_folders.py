"""Images in folders, one for each class."""

from __future__ import annotations

from pathlib import Path

from classfair._names import printable
from classfair.training.config import TrainConfig
from classfair.training.image_samples import Samples, check_complete, some, split_samples
from classfair.training.scan import Scan, left_out_line


def image_folders(config: TrainConfig) -> tuple[Path, Path]:
    """Where the folders of classes are, for training and for validation; the same one where it is split."""
    folder = Path(config.place)
    if config.split:
        return folder, folder
    return (folder, Path(config.val_dir)) if config.val_dir else (folder / "train", folder / "val")


def check_output(config: TrainConfig, output: Path) -> None:
    """ValueError for a run folder among the folders of classes, where it would be one."""
    for folder in image_folders(config) if config.kind == "imagefolder" else ():
        if output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"expected output outside of the folders of classes, got {output} in {folder}: name one with --output"
            )


def folder_samples(config: TrainConfig, seed: int) -> Samples:
    """Training and validation images of a folder; ValueError about what is missing."""
    train_dir, val_dir = folders = image_folders(config)
    _check_apart(config, train_dir, val_dir)
    scan = Scan(folders)
    names = _class_folders(scan, train_dir)
    train = scan.samples(train_dir, names)
    if config.split:
        left_out = left_out_line(scan.left_out, train_dir)
        why = f" (left out: {left_out})" if left_out else ""
        check_complete(train, names, f"training images of every class in {train_dir}", why)
        train, val = split_samples(train, config.split, seed)
    else:
        if unknown := sorted(set(_class_folders(scan, val_dir)) - set(names)):
            raise ValueError(f"expected classes of {train_dir} in {val_dir}, got {some(unknown)} as well")
        val = scan.samples(val_dir, names)
    return Samples(names, train, val, folders, scan.left_out).check(config.allow_missing)


def _check_apart(config: TrainConfig, train_dir: Path, val_dir: Path) -> None:
    """ValueError unless both folders are there, and neither within the other."""
    if config.split:
        return
    if not config.val_dir and not (train_dir.is_dir() and val_dir.is_dir()):
        raise ValueError(f"expected val_dir, split, or folders train and val in {config.place}, got none of them")
    if val_dir.resolve() == train_dir.resolve():
        raise ValueError(f"expected validation images other than those of training, got {val_dir} for both")
    for inner, outer in ((val_dir, train_dir), (train_dir, val_dir)):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise ValueError(f"expected validation images apart from those of training, got {inner} in {outer}")


def _class_folders(scan: Scan, folder: Path) -> list[str]:
    """Names of the classes, in the order of their labels."""
    if not folder.is_dir():
        raise ValueError(
            f"expected a folder of images, got {folder}, which is {'a file' if folder.exists() else 'missing'}"
        )
    names = scan.classes(folder)
    for name in names:
        if printable(name) != name:
            raise ValueError(f"expected class folders with printable names in UTF-8 in {folder}, got {name!r}")
    if not names:
        raise ValueError(f"expected one folder of images per class in {folder}, got none")
    return names
