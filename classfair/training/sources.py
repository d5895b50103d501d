"""The images that a configuration names."""

from __future__ import annotations

import numpy as np

from classfair.training.batches import Data, Draw, TensorBatches, derived_seed
from classfair.training.config import TrainConfig
from classfair.training.digits import GROUP_NAMES, NUM_CLASSES, digits_long_tailed, in_groups
from classfair.training.group_table import Groups
from classfair.training.image_folder import load_image_folder
from classfair.training.meta_learning import meta_indices


def load_data(config: TrainConfig, seed: int) -> Data:
    """The data set of one seed."""
    if config.image_folder is not None:
        return load_image_folder(config, config.image_folder, seed)
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
