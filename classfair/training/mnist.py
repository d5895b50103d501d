"""MNIST, long-tailed or in colours that training ties to the digits."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from classfair.training.data_option import HEAD_COUNTS
from classfair.training.digits import NUM_CLASSES, long_tailed_counts
from classfair.training.models import MissingPackageError

HEAD_COUNT = HEAD_COUNTS["mnist-lt"]  # every digit has at least 5421 training images
SIDE = 28
MEAN, SD = 0.1307, 0.3081  # of all pixels, with white as 1
TIED = 0.95  # probability of the digit's own colour in training
RAW = Path("MNIST", "raw")  # below the folder that torchvision is given
FILES = {"train": "training", "t10k": "test"}
PALETTE = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.8, 0.0),
    "blue": (0.2, 0.2, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "violet": (0.5, 0.0, 1.0),
    "gray": (0.6, 0.6, 0.6),
    "pink": (1.0, 0.6, 0.8),
}
COLOURS = list(PALETTE)


@dataclass(frozen=True)
class MnistSplit:
    """Training and test images of one seed, as bytes."""

    train_x: Tensor  # (N, 28, 28) uint8
    train_y: Tensor  # (N,) int64
    test_x: Tensor  # (M, 28, 28) uint8
    test_y: Tensor  # (M,) int64


class MnistBatches(Dataset[Any]):
    """Batches of flat, standardised images, made from bytes when they are asked for."""

    def __init__(self, images: Tensor, target: Tensor, colour: Tensor | None = None) -> None:
        self.images, self.target, self.colour = images, target, colour
        self._palette = torch.tensor(list(PALETTE.values()))  # (10, 3)

    def __getitem__(self, request: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        _, indices = request
        images = self.images[indices].float() / 255  # (B, 28, 28)
        if self.colour is not None:
            images = images[:, None] * self._palette[self.colour[indices]][:, :, None, None]  # (B, 3, 28, 28)
        return ((images - MEAN) / SD).flatten(1), self.target[indices]


def mnist_long_tailed(seed: int, imbalance: float, place: str) -> MnistSplit:
    """Training images thinned out to an exponential profile, and all test images.

    Which digit is frequent and which is rare, and which of its images stay, is drawn per seed.

    Args:
        seed: of these draws.
        imbalance: images of the most frequent digit, 5000, per image of the rarest.
        place: folder with torchvision's files; nothing: torchvision downloads them.
    """
    train_x, train_y, test_x, test_y = read_mnist(place)
    rng = np.random.default_rng(seed)
    labels = train_y.numpy()
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in zip(rng.permutation(NUM_CLASSES), long_tailed_counts(imbalance, HEAD_COUNT), strict=True)
    ]
    kept = torch.from_numpy(np.concatenate(chosen))
    return MnistSplit(train_x[kept], train_y[kept], test_x, test_y)


def colours(split: MnistSplit, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The colour of every training and of every test image.

    Each digit has a colour of its own, drawn. A training image has it with a probability of 0.95, or else one of the
    other nine; a test image has any of the ten. So a classifier gains in training from naming the colour, and fails
    wherever the colour is not the digit's.
    """
    own = torch.from_numpy(rng.permutation(len(COLOURS)))
    number = len(split.train_y)
    shift = torch.from_numpy(rng.integers(1, len(COLOURS), number))
    tied = torch.from_numpy(rng.random(number) < TIED)
    train = (own[split.train_y] + torch.where(tied, 0, shift)) % len(COLOURS)
    return train, torch.from_numpy(rng.integers(0, len(COLOURS), len(split.test_y)))


def read_mnist(place: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (60000, 28, 28) uint8 and labels, then those of the test; an error without the files."""
    folder = Path(place) if place else _downloaded()
    raw = folder / RAW if (folder / RAW).is_dir() else folder
    parts = [part for name, side in FILES.items() for part in _read_side(raw, name, side)]
    return parts[0], parts[1], parts[2], parts[3]


def _read_side(raw: Path, name: str, side: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    paths = [raw / f"{name}-images-idx3-ubyte", raw / f"{name}-labels-idx1-ubyte"]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(_both_ways(f"there is no {missing[0]}"))
    try:
        images, labels = read_image_file(str(paths[0])), read_label_file(str(paths[1]))
    except Exception as error:  # the reader asserts, and unpacks what it finds
        raise ValueError(f"expected {side} images and labels of MNIST in {raw}, got damaged files ({error})") from None
    counts = torch.bincount(labels, minlength=NUM_CLASSES) if len(labels) else torch.zeros(NUM_CLASSES)
    enough = HEAD_COUNT if side == "training" else 1
    if images.shape != (len(labels), SIDE, SIDE) or len(counts) != NUM_CLASSES or int(counts.min()) < enough:
        raise ValueError(f"expected {side} images and labels of MNIST in {raw}, got others")
    return images, labels


def _downloaded() -> Path:
    """The folder that torchvision has downloaded MNIST into.

    Each process downloads into a folder of its own, which it renames: none sees half of another's files.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "classfair"
    if (cache / RAW).is_dir():
        return cache
    from torchvision.datasets import MNIST

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            MNIST(folder, download=True)
            (cache / RAW.parent).mkdir(exist_ok=True)
            try:
                (Path(folder) / RAW).rename(cache / RAW)
            except OSError:
                if not (cache / RAW).is_dir():  # another process came first
                    raise
    except Exception as error:  # of network, archive or disk
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise MissingPackageError(_both_ways(f"a download failed ({reason})")) from None
    return cache


def _both_ways(what: str) -> str:
    return (
        f"expected MNIST, but {what}: name a folder with torchvision's files (--data mnist-lt:DIR, with "
        f"DIR/{RAW}/train-images-idx3-ubyte and the other three), or leave the folder out where there is a network, "
        "and torchvision downloads them"
    )
