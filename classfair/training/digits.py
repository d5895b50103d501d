"""digits-LT: scikit-learn's bundled handwritten digits, made long-tailed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classfair.training.data_option import HEAD_COUNTS

NUM_CLASSES = 10
GROUP_NAMES = ["coarse", "sharp"]
COARSE_SHARE = 0.9  # of the training images of one half of the digits; of the other half 1 - 0.9
BLOCK = 4  # pixels in a row or column of the 8 that a coarse image has one value for
HEAD_COUNT = HEAD_COUNTS["digits"]  # half of the digits has at least 87 of each


@dataclass(frozen=True)
class Split:
    """Training and test images of one seed."""

    train_x: Tensor  # (N, 64) float32, standardised per pixel
    train_y: Tensor  # (N,) int64
    test_x: Tensor  # (M, 64) float32
    test_y: Tensor  # (M,) int64
    meta_x: Tensor  # (K, 64) float32, what was held out of the training images
    meta_y: Tensor  # (K,) int64

    def to(self, device: torch.device) -> Split:
        return replace(self, **{name: x.to(device) for name, x in vars(self).items()})


def long_tailed_counts(imbalance: float, head_count: int = HEAD_COUNT) -> NDArray[np.int64]:
    """Training images per class from head to tail: an exponential profile, rounded down.

    >>> long_tailed_counts(40).tolist()
    [80, 53, 35, 23, 15, 10, 6, 4, 3, 2]
    """
    if not 1 <= imbalance <= head_count:
        raise ValueError(
            f"expected imbalance from 1 to {head_count}, so that the smallest class keeps an image, got {imbalance:g}"
        )
    rank = np.arange(NUM_CLASSES) / (NUM_CLASSES - 1)
    # The last entry is head_count / imbalance up to rounding: 1.9999999 must stay 2.
    return np.floor(head_count * imbalance**-rank + 1e-6).astype(np.int64)


def digits_long_tailed(seed: int, imbalance: float, held_out: int = 0) -> Split:
    """A stratified 50/50 split whose training half is thinned out to the long-tailed profile.

    Which digit is frequent and which is rare is drawn per seed, so that the mean over seeds does
    not mix up rarity with how hard a digit is. The test half stays balanced.

    So many images of every class are held out of the training half before it is thinned out; a frequent class may have
    a few images less for it, and others the same ones.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
    rng = np.random.default_rng(seed)
    classes = rng.permutation(NUM_CLASSES)
    kept, meta = [], []
    for label, count in zip(classes, long_tailed_counts(imbalance), strict=True):
        order = rng.permutation(np.flatnonzero(train_y == label))
        rest = len(order) - held_out
        if rest < 1:
            raise ValueError(f"expected meta_per_class below {len(order)}, the images of {label}, got {held_out}")
        kept.append(order[: min(count, rest)])
        meta.append(order[rest:])
    meta_x, meta_y = train_x[np.concatenate(meta)], train_y[np.concatenate(meta)]
    train_x, train_y = train_x[np.concatenate(kept)], train_y[np.concatenate(kept)]
    mean, sd = train_x.mean(axis=0), train_x.std(axis=0)
    sd[sd == 0] = 1.0  # border pixels that are blank in every training image

    def images(a: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy((a - mean) / sd).float()

    def labels(a: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(a.astype(np.int64))

    pairs = [(images(x), labels(y)) for x, y in ((train_x, train_y), (test_x, test_y), (meta_x, meta_y))]
    return Split(*(part for pair in pairs for part in pair))


def in_groups(split: Split, rng: np.random.Generator) -> tuple[Split, Tensor, Tensor]:
    """The same digits in two groups, and the group of every training and of every test image.

    A coarse image (group 0) is four values, the means of its quarters: too few to tell all digits apart or to learn
    the training images by heart. In training five of the digits, drawn at random, are coarse with a probability of
    0.9 and the others of 0.1, in the test half all with 0.5. So a classifier gains in training from guessing the digit
    by the group, and is unfair in the test half: to coarse images, and to sharp ones of digits that mostly were coarse.
    """
    share = np.full(NUM_CLASSES, 1 - COARSE_SHARE)
    share[rng.permutation(NUM_CLASSES)[: NUM_CLASSES // 2]] = COARSE_SHARE
    train = torch.from_numpy((rng.random(len(split.train_y)) >= share[split.train_y.numpy()]).astype(np.int64))
    test = torch.from_numpy((rng.random(len(split.test_y)) >= 0.5).astype(np.int64))
    train_x, test_x = _coarse(split.train_x, train == 0), _coarse(split.test_x, test == 0)
    return replace(split, train_x=train_x, test_x=test_x), train, test


def _coarse(images: Tensor, chosen: Tensor) -> Tensor:
    blocks = images.view(-1, 8 // BLOCK, BLOCK, 8 // BLOCK, BLOCK)
    coarse = blocks.mean((2, 4), keepdim=True).expand_as(blocks).reshape(images.shape)
    return torch.where(chosen[:, None], coarse, images)
