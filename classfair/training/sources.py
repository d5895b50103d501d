"""The images that a configuration names."""

from __future__ import annotations

import numpy as np
import torch

from classfair.training.batches import Data, Draw, TensorBatches, derived_seed
from classfair.training.config import TrainConfig
from classfair.training.data_option import MNIST
from classfair.training.digits import GROUP_NAMES, NUM_CLASSES, digits_long_tailed, in_groups
from classfair.training.group_table import Groups
from classfair.training.image_folder import load_images
from classfair.training.meta_learning import meta_indices
from classfair.training.mnist import COLOURS, MnistBatches, colours, mnist_long_tailed


def load_data(config: TrainConfig, seed: int) -> Data:
    """The data set of one seed."""
    if config.reads_images:
        return load_images(config, seed)
    if config.kind in MNIST:
        return _mnist(config, seed)
    held_out = config.meta_per_class if config.meta_from == "heldout" else 0
    split, groups = digits_long_tailed(seed, config.imbalance, held_out), None
    meta = TensorBatches(split.meta_x, split.meta_y)
    if config.meta_per_class and not held_out:
        chosen = meta_indices(config, split.train_y, seed, [str(digit) for digit in range(NUM_CLASSES)])
        meta = TensorBatches(split.train_x[chosen], split.train_y[chosen])
    if config.has_groups:
        split, *parts = in_groups(split, np.random.default_rng(derived_seed(Draw.GROUP, seed)))
        groups = Groups(GROUP_NAMES, *parts)
    return Data(
        train=TensorBatches(split.train_x, split.train_y),
        val=TensorBatches(split.test_x, split.test_y),
        train_targets=split.train_y,
        num_val=len(split.test_y),
        class_names=[str(digit) for digit in range(NUM_CLASSES)],
        groups=groups,
        meta=meta if len(meta.target) else None,
        num_meta=len(meta.target),
    )


def _mnist(config: TrainConfig, seed: int) -> Data:
    split = mnist_long_tailed(seed, config.imbalance, config.place)
    names = [str(digit) for digit in range(NUM_CLASSES)]
    x, y, meta = split.train_x, split.train_y, None
    if config.meta_per_class:
        chosen = meta_indices(config, y, seed, names)
        meta = MnistBatches(x[chosen], y[chosen])
        if config.meta_from == "heldout":
            kept = torch.ones(len(y), dtype=torch.bool).index_fill(0, chosen, False)
            x, y = x[kept], y[kept]
    train_colour = test_colour = groups = None
    if config.has_groups:
        train_colour, test_colour = colours(split, np.random.default_rng(derived_seed(Draw.GROUP, seed)))
        groups = Groups(COLOURS, train_colour, test_colour)
    return Data(
        train=MnistBatches(x, y, train_colour),
        val=MnistBatches(split.test_x, split.test_y, test_colour),
        train_targets=y,
        num_val=len(split.test_y),
        class_names=names,
        groups=groups,
        meta=meta,
        num_meta=0 if meta is None else len(meta.target),
    )
