"""Batches of image files, through torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from classfair._names import say
from classfair.data import MixedTargetCollate
from classfair.training.batches import IGNORED, Data, Draw, Request, derived_seed
from classfair.training.class_folders import folder_samples
from classfair.training.config import TrainConfig
from classfair.training.group_table import check_for_penalty, read_groups
from classfair.training.image_list import ImageList
from classfair.training.listed_images import listed_samples, table_samples
from classfair.training.meta_learning import meta_indices
from classfair.training.pixels import read_image
from classfair.training.scan import Sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which pretrained models expect
RESIZE = 256 / 224  # shorter side of validation images before the centre crop, in crops
_READERS = {"imagefolder": folder_samples, "list": listed_samples, "csv": table_samples}
LONGEST = 8  # times the shorter side: a longer validation image first loses its ends, which the crop drops anyway


class BadImageError(RuntimeError):
    """An image that cannot be read."""


class ImageBatches(Dataset[Any]):
    """Batches of images read from disk.

    Every image is augmented from a seed of its own (seed, epoch, index): the same in whichever process and batch it is
    read, and however often a job was interrupted.
    """

    def __init__(
        self,
        samples: list[Sample],
        transform: Callable[[Any], Tensor],
        collate: Callable[..., Any],
        seed: int,
        *,
        skip_bad: bool,
    ) -> None:
        self.samples, self.transform, self.collate = samples, transform, collate
        self.seed, self.skip_bad = seed, skip_bad

    def __getitem__(self, request: Request) -> Any:
        epoch, indices = request
        state = torch.get_rng_state()
        try:
            images = [self._read(epoch, index) for index in indices]
            # The first image names the batch.
            torch.default_generator.manual_seed(derived_seed(Draw.MIX, self.seed, epoch, indices[0]))
            return self.collate(images)
        except BadImageError as error:
            return error  # raised in a worker it would arrive wrapped in that worker's traceback
        finally:
            torch.set_rng_state(state)

    def _read(self, epoch: int, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.samples[index]
        torch.default_generator.manual_seed(derived_seed(Draw.IMAGE, self.seed, epoch, index))
        try:
            image = read_image(path)
        except Exception as error:  # decoders fail in their own ways
            reason = str(error) or type(error).__name__
            if not self.skip_bad:
                raise BadImageError(
                    f"expected an image, got {path} ({reason}); --bad-images skip leaves it out"
                ) from None
            say(f"skipped {path} ({reason})")
            image, label = Image.new("RGB", (64, 64)), IGNORED
        return self.transform(image), label


def load_images(config: TrainConfig, seed: int) -> Data:
    """Training and validation images as configured; ValueError about what is missing."""
    samples = _READERS[config.kind](config, seed)
    train, val, groups = samples.train, samples.val, None
    images = ImageList.of(train, val, samples.folders, samples.left_out)
    meta, train = _meta_samples(config, train, samples.names, seed)
    if config.group_table:
        paths = [[path for path, _ in part] for part in (train, val)]
        root = Path(config.place if config.kind == "imagefolder" else config.image_root)
        blank = config.missing_groups == "blank"
        groups = read_groups(Path(config.group_table), config.group_column, root, *paths, missing_is_blank=blank)
        if config.fairness != "none":
            check_for_penalty(groups)
    collate = MixedTargetCollate(_mix(config)) if config.mixup or config.cutmix else default_collate
    skip = config.bad_images == "skip"
    return Data(
        train=ImageBatches(train, _train_transform(config), collate, seed, skip_bad=skip),
        val=ImageBatches(val, _val_transform(config), default_collate, seed, skip_bad=skip),
        train_targets=torch.tensor([label for _, label in train]),
        num_val=len(val),
        class_names=samples.names,
        groups=groups,
        train_plain=ImageBatches(train, _val_transform(config), default_collate, seed, skip_bad=skip),
        images=images,
        meta=ImageBatches(meta, _train_transform(config), default_collate, seed, skip_bad=skip) if meta else None,
        num_meta=len(meta),
    )


def _meta_samples(
    config: TrainConfig, train: list[Sample], names: list[str], seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Images of the meta set, and those to train on."""
    if not config.meta_per_class:
        return [], train
    chosen = set(meta_indices(config, torch.tensor([label for _, label in train]), seed, names).tolist())
    meta = [sample for i, sample in enumerate(train) if i in chosen]
    held_out = config.meta_from == "heldout"
    return meta, [sample for i, sample in enumerate(train) if i not in chosen] if held_out else train


def _train_transform(config: TrainConfig) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    policies = {
        "ra": v2.RandAugment,
        "ta_wide": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
        "imagenet": v2.AutoAugment,
    }
    steps: list[Any] = [v2.RandomResizedCrop(config.img_size, scale=config.scale, antialias=True)]
    if config.hflip:
        steps.append(v2.RandomHorizontalFlip(config.hflip))
    if config.auto_augment != "none":
        steps.append(policies[config.auto_augment]())
    steps += _to_normalised_tensor()
    if config.random_erase:
        steps.append(v2.RandomErasing(config.random_erase))
    return v2.Compose(steps)


def _val_transform(config: TrainConfig) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    resize = v2.Resize(round(config.img_size * RESIZE), antialias=True)
    return v2.Compose([_without_ends, resize, v2.CenterCrop(config.img_size), *_to_normalised_tensor()])


def _without_ends(image: Any) -> Any:
    """The middle of an image of 1 x 6000 pixels, whose longer side would be scaled to millions."""
    from torchvision.transforms.v2 import functional

    longest = LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    return functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])


def _to_normalised_tensor() -> list[Any]:
    from torchvision.transforms import v2

    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]


def _mix(config: TrainConfig) -> Any:
    from torchvision.transforms import v2

    mixes: list[Any] = []
    if config.mixup:
        mixes.append(v2.MixUp(alpha=config.mixup))
    if config.cutmix:
        mixes.append(v2.CutMix(alpha=config.cutmix))
    return mixes[0] if len(mixes) == 1 else v2.RandomChoice(mixes)
