"""What a training job is told: every option with its default, its help text and its rule."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from classfair.training.digits import HEAD_COUNT

LOSSES = ("ce", "la", "ldam", "cb", "focal", "isda", "nisda", "distance", "metalad", "estimated-offset")
FEATURE_LOSSES = ("isda", "nisda", "distance", "metalad", "estimated-offset")
OPTIMIZERS = ("sgd", "adamw")
META_SETS = ("heldout", "train")
META_METHODS = ("jvp", "double_backward", "finite_difference", "last_layer")
LR_SCHEDULES = ("cosine", "step", "constant")
SAMPLERS = ("shuffle", "class-balanced")
AUGMENTS = ("none", "ra", "ta_wide", "augmix", "imagenet")
AMP_DTYPES = ("bfloat16", "float16")
BAD_IMAGES = ("error", "skip")
MISSING_GROUPS = ("error", "blank")
OFFSETS = ("estimated", "zero")
PROBES = ("zero", "one", "mean", "random")
FAIRNESS = ("none", "dp-l2", "dp-mi", "eo-l2", "eo-mi", "iou")
DIGITS = ("digits", "digits-groups")
IMAGE_FOLDER = "imagefolder:"

#: What may differ when a job goes on: where things are, and how a step is computed (with batch norm, by which parts).
PLACES = ("data", "val_dir", "groups", "weights", "effective_frequency")
CHANGEABLE = (*PLACES, "batch_size", "grad_accum", "val_batch_size", "workers", "device", "compile", "save_every")


def _option(default: Any, text: str, *, images: Any = None, groups: Any = None, **cli: Any) -> Any:
    """A field with its help text for the command line, and its defaults for other data sets where they differ."""
    metadata = {"help": text, "cli": cli, "default": default}
    metadata |= {"images": default if images is None else images, "groups": default if groups is None else groups}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """What to train. Wrong values raise ValueError: "expected X, got Y"."""

    data: str = _option(
        "digits",
        "Data set: digits, the 8x8 pixel handwritten digits that come with scikit-learn, made "
        "long-tailed, with half of them as the balanced test set; digits-groups, the same digits sharp or coarse, "
        "which in training depends on the digit (the default with --fairness); or imagefolder:DIR, with one folder of "
        "images per class in DIR, or in DIR/train and DIR/val.",
        groups="digits-groups",
        metavar="{digits,digits-groups,imagefolder:DIR}",
    )
    val_dir: str = _option("", "Folder of validation images, one folder per class of the same names.", metavar="DIR")
    split: float = _option(0.0, "Share of every class's images to hold out for validation, instead of --val-dir.")
    groups: str = _option(
        "",
        "Table of attributes of the images: a CSV file with a header. Its column file, or image, or else the first one "
        "has their paths from the folder of --data, such as train/cat/1.jpg.",
        metavar="FILE.csv",
    )
    group_column: str = _option(
        "", "Column of --groups whose values are the groups; blank: of none, in no statistic.", metavar="NAME"
    )
    missing_groups: str = _option(
        "error",
        "What words such as nan, NA and None are in --group-column: an error, or no group, as blanks are.",
        metavar="{error,blank}",
    )
    model: str = _option(
        "mlp",
        "mlp for digits; for image folders a model of torchvision or else timm by name, or timm:NAME.",
        images="resnet50",
        metavar="NAME",
    )
    model_kwargs: tuple[str, ...] = _option((), "More arguments for the model, such as img_size=64.", metavar="K=V ...")
    weights: str = _option(
        "",
        "Initial weights: pretrained (needs network), or a file with a state dict; a head of another shape stays new.",
        metavar="{pretrained,PATH}",
    )
    loss: tuple[str, ...] = _option(
        ("ce", "la"),
        "Losses to train with, one or several: ce is plain cross-entropy, la logit adjustment, ldam label-distribution-"
        "aware margins on a cosine head, cb class-balanced weights, focal the focal loss; from class statistics "
        "of features: isda, nisda, distance, and metalad, the sum of la, nisda and distance; estimated-offset, a head "
        "whose offset follows from weights and class centres and is kept uniform.",
        images=("ce",),
        groups=("ce",),
        metavar="{ce,la,ldam,cb,focal,isda,nisda,distance,metalad,estimated-offset} ...",
    )
    tau: float = _option(1.0, "Strength of logit adjustment, no unit; 0 is plain cross-entropy. Only la uses it.")
    max_margin: float = _option(0.5, "Margin of the rarest class in units of cosine. Only ldam uses it.")
    cosine_scale: float = _option(30.0, "Scale of the cosine head. Only ldam uses it.")
    beta: float = _option(0.9999, "Effective number of samples: from 0 (no weights) to below 1. cb and --drw-start.")
    gamma: float = _option(2.0, "Focusing exponent, at least 0. Only focal uses it.")
    strength: float = _option(
        7.5, "Full strength of isda, reached along a ramp over all epochs; 7.5 is usual with diagonal covariances."
    )
    omega: tuple[float, float, float] = _option(
        (1.0, 1.0, 1.0),
        "Weights of class proportion, class variance and class distance in metalad, nisda and distance.",
    )
    meta_per_class: int = _option(
        0,
        "Images of every class for the meta set, on whose loss metalad learns omega (bilevel, by a virtual step); 0: "
        "omega is fixed.",
    )
    meta_lr: float = _option(
        10.0, "Step size of omega, at least 0; more may diverge on small sets. 0 leaves omega as it is, to compare with."
    )
    meta_start: int = _option(
        0, "Epochs of plain cross-entropy, in which class statistics are gathered, before metalad begins."
    )
    meta_from: str = _option(
        "heldout",
        "Where meta images come from: held out of the training images, for all losses of the job, or images that are "
        "trained on as well.",
        metavar="{heldout,train}",
    )
    meta_method: str = _option(
        "jvp",
        "Derivative of the virtual step: jvp by forward mode, double_backward, finite_difference for models that have "
        "neither, or last_layer, a virtual step of the classifier alone.",
        metavar="{jvp,double_backward,finite_difference,last_layer}",
    )
    center_weight: float = _option(
        0.1, "Weight of the squared distance of features from their class centre. Only estimated-offset.", images=1.0
    )
    uniform_weight: float = _option(1.0, "Weight of the uniform constraint on offsets. Only estimated-offset uses it.")
    offset: str = _option(
        "estimated",
        "What the head subtracts from its logits: the estimated offset, or zero, which leaves the constraint alone "
        "(with both weights at 0, a head without bias). Only estimated-offset uses it.",
        metavar="{estimated,zero}",
    )
    zero_uniformity: float = _option(
        0.0, "Weight of the unequal response to an input without content, added to every loss; 0: off."
    )
    probe: str = _option(
        "zero",
        "That input, in normalised pixels: zero, one, mean (of the batch) or random. Only --zero-uniformity uses it.",
        metavar="{zero,one,mean,random}",
    )
    fairness: str = _option(
        "none",
        "Penalty for treating groups differently, added to every loss: demographic parity (dp) or equalized odds (eo), "
        "as squared differences (l2) or mutual information (mi), or the difference of intersection over union.",
        metavar="{none,dp-l2,dp-mi,eo-l2,eo-mi,iou}",
    )
    fairness_weight: float = _option(
        10.0, "Weight of the penalty, at least 0; the papers' range is 0.1 to 1000. Only --fairness uses it."
    )
    label_smoothing: float = _option(0.0, "Share of the target spread over all classes.", aliases=("--smoothing",))
    drw_start: int = _option(0, "Epoch from which classes are re-weighted as in cb; 0: never.")
    loss_warmup: int = _option(0, "Epochs over which the loss turns from plain cross-entropy into itself.")
    effective_frequency: str = _option(
        "",
        "Run folder of an earlier job. Its effective frequencies (la), times its numbers of validation images (cb), "
        "take the place of class counts: classes that are hard count as rare.",
        metavar="RUN",
    )
    sampler: str = _option("shuffle", "Order of training images.", metavar="{shuffle,class-balanced}")
    epochs: int = _option(150, "Passes over the training images.", images=90, groups=60, aliases=("-e",))
    batch_size: int = _option(64, "Images per process and forward pass.", images=32, groups=256, aliases=("-b",))
    grad_accum: int = _option(1, "Forward passes per optimiser step.", aliases=("--grad-accum-steps",))
    val_batch_size: int = _option(1024, "Images per process and forward pass of evaluation.", images=64)
    opt: str = _option("sgd", "Optimiser.", metavar="{sgd,adamw}", aliases=("--optimizer",))
    lr: float = _option(0.1, "Learning rate at the start.")
    momentum: float = _option(0.9, "Momentum of SGD, from 0 up to but excluding 1.")
    weight_decay: float = _option(5e-4, "L2 penalty on all parameters, at least 0.", images=1e-4, aliases=("--wd",))
    lr_scheduler: str = _option(
        "cosine",
        "Learning rate over the epochs: along a cosine to 0, in steps, or constant.",
        metavar="{cosine,step,constant}",
        aliases=("--sched",),
    )
    lr_step_size: int = _option(30, "Epochs between steps of the learning rate.")
    lr_gamma: float = _option(0.1, "Factor of the learning rate at every step.")
    lr_warmup_epochs: int = _option(0, "Epochs of linear warm-up of the learning rate.", aliases=("--warmup-epochs",))
    clip_grad: float = _option(0.0, "Largest norm of the gradient; 0: any.", aliases=("--clip-grad-norm",))
    amp: bool = _option(False, "Mixed precision.")
    amp_dtype: str = _option(
        "bfloat16", "Dtype of mixed precision; float16 scales the loss.", metavar="{bfloat16,float16}"
    )
    img_size: int = _option(224, "Height and width of training and validation crops.", aliases=("--train-crop-size",))
    scale: tuple[float, float] = _option((0.08, 1.0), "Area of random training crops, as shares of the image.")
    hflip: float = _option(0.5, "Probability of a horizontal flip.")
    auto_augment: str = _option(
        "none", "Augmentation policy of torchvision.", metavar="{none,ra,ta_wide,augmix,imagenet}"
    )
    random_erase: float = _option(0.0, "Probability of random erasing.", aliases=("--reprob",))
    mixup: float = _option(0.0, "MixUp alpha; 0: off.", aliases=("--mixup-alpha",))
    cutmix: float = _option(0.0, "CutMix alpha; 0: off. With --mixup, either by chance.", aliases=("--cutmix-alpha",))
    bad_images: str = _option(
        "error", "What an unreadable image is: an error, or skipped by name.", metavar="{error,skip}"
    )
    allow_missing: bool = _option(False, "Let classes have no validation images; they are left out of all means.")
    workers: int = _option(
        0, "Processes that load images, per process.", images=min(4, os.cpu_count() or 1), aliases=("-j",)
    )
    compile: bool = _option(False, "Compile the model with torch.compile.")
    sync_bn: bool = _option(False, "Batch norm over all processes.")
    seed: int = _option(
        0, "First random seed. A seed fixes data split, initial weights, order of images and their augmentation."
    )
    seeds: int = _option(3, "Number of seeds, counted up from --seed; every loss is trained once with each.", images=1)
    imbalance: float = _option(
        40.0,
        "digits: images of the most frequent class per image of the rarest, from 1 (balanced) to "
        f"{HEAD_COUNT}. The most frequent class has {HEAD_COUNT} training images.",
        groups=1.0,
    )
    many_shot: int = _option(25, "A class with more training images than this counts as many-shot.", images=100)
    few_shot: int = _option(5, "A class with fewer training images than this counts as few-shot.", images=20)
    save_every: int = _option(50, "Epochs between checkpoints; the last epoch always has one.", images=1)
    device: str = _option("cpu", "Where to compute: auto, cpu, cuda or cuda:N.", images="auto", metavar="DEVICE")

    @classmethod
    def for_data(cls, data: str, **changes: Any) -> TrainConfig:
        """The configuration for that data set with its own defaults."""
        return cls(**{**defaults(data), "data": data, **changes})

    @property
    def image_folder(self) -> Path | None:
        return Path(self.data.removeprefix(IMAGE_FOLDER)) if self.data.startswith(IMAGE_FOLDER) else None

    @property
    def has_groups(self) -> bool:
        return bool(self.groups) or self.data == "digits-groups"

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", tuple(dict.fromkeys(self.loss)))
        object.__setattr__(self, "model_kwargs", tuple(self.model_kwargs))
        object.__setattr__(self, "scale", tuple(self.scale))
        self._make_paths_absolute()  # so that a job can be resumed from elsewhere
        object.__setattr__(self, "omega", tuple(self.omega))
        for name, (holds, expected) in {**self._choices(), **self._ranges(), **self._combinations()}.items():
            if not holds:
                value = getattr(self, name)
                shown = " ".join(map(str, value)) or "none" if isinstance(value, tuple) else value
                raise ValueError(f"expected {name} {expected}, got {shown if shown != '' else 'nothing'}")

    def _make_paths_absolute(self) -> None:
        if self.image_folder is not None and len(self.data) > len(IMAGE_FOLDER):
            object.__setattr__(self, "data", IMAGE_FOLDER + os.path.abspath(self.image_folder))
        for name in ("val_dir", "groups", "weights", "effective_frequency"):
            value = getattr(self, name)
            if value not in ("", "pretrained"):
                object.__setattr__(self, name, os.path.abspath(value))

    def _choices(self) -> dict[str, tuple[bool, str]]:
        choices = {
            "opt": OPTIMIZERS,
            "lr_scheduler": LR_SCHEDULES,
            "sampler": SAMPLERS,
            "auto_augment": AUGMENTS,
            "amp_dtype": AMP_DTYPES,
            "bad_images": BAD_IMAGES,
            "missing_groups": MISSING_GROUPS,
            "fairness": FAIRNESS,
            "meta_from": META_SETS,
            "meta_method": META_METHODS,
            "offset": OFFSETS,
            "probe": PROBES,
        }
        rules = {name: (getattr(self, name) in known, f"to be {_either(known)}") for name, known in choices.items()}
        losses = len(self.loss) > 0 and set(self.loss) <= set(LOSSES)
        rules["loss"] = (losses, f"to be one or several of {', '.join(LOSSES)}")
        rules["data"] = (
            self.data in DIGITS or (len(self.data) > len(IMAGE_FOLDER) and self.image_folder is not None),
            f"to be {', '.join(DIGITS)} or imagefolder:DIR",
        )
        return rules

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        rules: dict[str, tuple[bool, str]] = {}
        for name in (
            "epochs",
            "batch_size",
            "grad_accum",
            "val_batch_size",
            "seeds",
            "img_size",
            "lr_step_size",
            "save_every",
        ):
            rules[name] = (getattr(self, name) >= 1, "of at least 1")
        at_least_0 = ("tau", "gamma", "weight_decay", "clip_grad", "mixup", "cutmix", "max_margin", "strength")
        for name in (*at_least_0, "fairness_weight", "meta_lr", "center_weight", "uniform_weight", "zero_uniformity"):
            rules[name] = (_within(getattr(self, name), 0), "of at least 0")
        for name in ("drw_start", "loss_warmup", "lr_warmup_epochs", "workers", "meta_per_class", "meta_start"):
            rules[name] = (getattr(self, name) >= 0, "of at least 0")
        for name in ("lr", "cosine_scale", "lr_gamma"):
            rules[name] = (_within(getattr(self, name), 0) and getattr(self, name) > 0, "greater than 0")
        for name in ("label_smoothing", "hflip", "random_erase"):
            rules[name] = (0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name in ("momentum", "beta", "split"):
            rules[name] = (0 <= getattr(self, name) < 1, "from 0 up to but excluding 1")
        return rules | {
            "seed": (0 <= self.seed < 2**32 - max(self.seeds, 1), "from 0 up to 2**32 - seeds"),
            "omega": (all(map(math.isfinite, self.omega)), "as three finite numbers"),
            "scale": (0 < self.scale[0] <= self.scale[1] <= 1, "as two ascending shares of 1"),
            "imbalance": (
                1 <= self.imbalance <= HEAD_COUNT,
                f"from 1 to {HEAD_COUNT} (above, the rarest class gets no image)",
            ),
            "few_shot": (0 <= self.few_shot <= self.many_shot, f"from 0 to many_shot ({self.many_shot})"),
        }

    def _combinations(self) -> dict[str, tuple[bool, str]]:
        images = self.image_folder is not None
        rules = {"model": (images != (self.model == "mlp"), "to be mlp for digits, and another one for image folders")}
        if not images:
            for name in (
                "val_dir",
                "split",
                "weights",
                "mixup",
                "cutmix",
                "workers",
                "random_erase",
                "model_kwargs",
            ):
                rules[name] = (not getattr(self, name), "to be left out with digits")
            for name, value in {"auto_augment": "none", "bad_images": "error"}.items():
                rules[name] = (getattr(self, name) == value, "to be left out with digits")
            rules["groups"] = (not self.groups, "with --data imagefolder:DIR")
        rules |= self._groups() | self._meta()
        if self.effective_frequency:
            used = bool({"la", "cb"} & set(self.loss))
            rules["effective_frequency"] = (used, "with a loss that uses it (la, cb)")
        if self.offset == "zero":
            rules["offset"] = ("estimated-offset" in self.loss, "with the loss that uses it (estimated-offset)")
        if self.probe in PROBES[1:]:
            rules["probe"] = (self.zero_uniformity != 0, "with zero_uniformity above 0")
        if self.val_dir:
            rules["split"] = (self.split == 0, "to be left out with val_dir")
        if self.loss_warmup:
            ramped = set(self.loss) <= {"la", "ldam", "cb"}
            rules["loss_warmup"] = (ramped, "with losses that have something to ramp (la, ldam, cb)")
        if self.drw_start:
            rules["drw_start"] = (self.drw_start < self.epochs, f"below epochs ({self.epochs})")
            if "cb" in self.loss:
                rules["drw_start"] = (False, "without cb, which has class weights of its own")
        if self.lr_warmup_epochs:
            rules["lr_warmup_epochs"] = (self.lr_warmup_epochs < self.epochs, f"below epochs ({self.epochs})")
        return rules

    def _groups(self) -> dict[str, tuple[bool, str]]:
        rules: dict[str, tuple[bool, str]] = {}
        if self.groups or self.group_column:
            rules["group_column"] = (bool(self.groups and self.group_column), "together with groups, a CSV file")
        if not self.groups and self.missing_groups == "blank":
            rules["missing_groups"] = (False, "to be left out without groups, a CSV file")
        if self.fairness in FAIRNESS[1:]:
            rules["fairness"] = (self.has_groups, "with groups: data digits-groups, or groups and group_column")
        elif self.fairness_weight >= 0:
            unused = self.fairness_weight == TrainConfig.fairness_weight
            rules["fairness_weight"] = (unused, "to be left out without fairness")
        if self.has_groups:
            for name in ("mixup", "cutmix"):  # a mixed image is of two groups
                rules[name] = (not getattr(self, name), "to be left out with groups")
        return rules

    def _meta(self) -> dict[str, tuple[bool, str]]:
        if not self.meta_per_class:
            unused = ("meta_lr", "meta_start", "meta_from", "meta_method")
            changed = [name for name in unused if getattr(self, name) != getattr(TrainConfig, name)]
            return dict.fromkeys(changed, (False, "to be left out without meta_per_class"))
        rules: dict[str, tuple[bool, str]] = {}
        if self.meta_per_class > 0 and "metalad" not in self.loss:
            rules["meta_per_class"] = (False, "with loss metalad")
        if self.meta_start >= self.epochs:
            rules["meta_start"] = (False, f"below epochs ({self.epochs})")
        for name, value in {"fairness": "none", "grad_accum": 1}.items():
            if getattr(self, name) != value:
                rules[name] = (False, "to be left out with meta_per_class")
        if self.data == "digits-groups":
            rules["data"] = (False, "without groups with meta_per_class")
        return rules

    def as_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def defaults(data: str) -> dict[str, Any]:
    """Default of every option for a data set: those of the embedded digits, with groups or not, or of image folders."""
    kind = "images" if data.startswith(IMAGE_FOLDER) else "groups" if data == "digits-groups" else "default"
    return {f.name: f.metadata[kind] for f in fields(TrainConfig)}


def _within(value: float, low: float) -> bool:
    return math.isfinite(value) and value >= low


def _either(known: tuple[str, ...]) -> str:
    return f"{', '.join(known[:-1])} or {known[-1]}"
