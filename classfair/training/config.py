"""What a training job is told: every option with its default, its help text and its rule."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from classfair.training.config_rules import FEATURE_LOSSES as FEATURE_LOSSES
from classfair.training.config_rules import rules
from classfair.training.data_option import (
    DIGITS,
    FORMS,
    HEAD_COUNTS,
    IMAGES,
    default_kinds,
    kind_of,
    place_of,
    with_absolute_place,
)
from classfair.training.group_rules import DEFAULT_WEIGHT
from classfair.training.method_rules import HEADS, METHODS, STAGES2, total_epochs

#: What may differ when a job goes on: where things are, and how a step is computed (with batch norm, by which parts).
PLACES = ("data", "val_dir", "val_list", "image_root", "groups", "weights", "effective_frequency")
CHANGEABLE = (*PLACES, "batch_size", "grad_accum", "val_batch_size", "workers", "device", "compile", "save_every")


def _option(default: Any, text: str, **cli: Any) -> Any:
    """A field with its help text for the command line, and its defaults for other data sets where they differ."""
    others: dict[str, Any] = {name: cli.pop(name) for name in ("images", "groups", "mnist", "colour") if name in cli}
    return field(default=default, metadata={"help": text, "cli": cli, "default": default, **others})


@dataclass(frozen=True)
class TrainConfig:
    """What to train. Wrong values raise ValueError: "expected X, got Y"."""

    data: str = _option(
        "digits",
        "Data set: digits, the 8x8 pixel handwritten digits that come with scikit-learn, made "
        "long-tailed, with half of them as the balanced test set; digits-groups, the same digits sharp or coarse, "
        "which in training depends on the digit (the default with --fairness); mnist-lt, MNIST made long-tailed, and "
        "mnist-colour, MNIST in ten colours that training ties to the digits, from torchvision's files in DIR or by "
        "its download; imagefolder:DIR, with one folder of images per class in DIR, or in DIR/train and DIR/val; "
        "list:FILE, lines of an image's path and label; or csv:FILE.csv, a table of paths, labels and groups.",
        groups="digits-groups",
        metavar="{" + ",".join(FORMS) + "}",
    )
    val_dir: str = _option("", "Folder of validation images, one folder per class of the same names.", metavar="DIR")
    val_list: str = _option("", "List of validation images for --data list:FILE, of the same form.", metavar="FILE")
    image_root: str = _option("", "Folder at which the paths of list:FILE and csv:FILE.csv start.", metavar="DIR")
    label_column: str = _option("", "csv: column whose values are the classes.", metavar="NAME")
    split_column: str = _option(
        "",
        "csv: column that says train (or 0) for training images and val (or 1) for those of validation; images with "
        "another value are left out.",
        metavar="NAME",
    )
    split: float = _option(
        0.0, "Share of every class's images to hold out for validation, instead of --val-dir or --val-list."
    )
    groups: str = _option(
        "",
        "Table of attributes of the images: a CSV file with a header. Its column file, or image, or else the first one "
        "has their paths from the folder of --data, such as train/cat/1.jpg.",
        metavar="FILE.csv",
    )
    group_column: str = _option(
        "",
        "Column of --groups, or of csv:FILE.csv, whose values are the groups; blank: of none, in no statistic.",
        metavar="NAME",
    )
    missing_groups: str = _option(
        "error",
        "What words such as nan, NA and None are in --group-column: an error, or no group, as blanks are.",
        metavar="{error,blank}",
    )
    model: str = _option(
        "mlp",
        "mlp for digits and MNIST; for image files a model of torchvision or else timm by name, or timm:NAME.",
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
        colour=("ce",),
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
        10.0, "Step size of omega, at least 0; more may diverge on small sets. 0 leaves it as it is, to compare with."
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
        DEFAULT_WEIGHT, "Weight of the penalty, at least 0; the papers' range is 0.1 to 1000. Only --fairness uses it."
    )
    head: str = _option(
        "plain",
        "Classifier: the model's own one, or etf, fixed vectors at equal angles behind batch norm.",
        metavar="{" + ",".join(HEADS) + "}",
    )
    method: str = _option(
        "none",
        "How images are weighted: lff, learning from failure, trains a second, biased model and weights what that one "
        "fails on; jtt, just train twice, repeats what a first model gets wrong.",
        metavar="{" + ",".join(METHODS) + "}",
    )
    jtt_epochs: int = _option(20, "Epochs of the first model. Only jtt uses it.", images=10, mnist=1)
    jtt_weight: int = _option(20, "How often an image that it gets wrong is added. Only jtt uses it.")
    stage2: str = _option(
        "none",
        "What follows after --epochs, with features fixed: crt draws the classifier anew and trains it on class-"
        "balanced batches, lws trains a scale of every class on such, tau-norm divides rows by their norms to the "
        "power of tau.",
        metavar="{" + ",".join(STAGES2) + "}",
    )
    stage2_epochs: int = _option(10, "Epochs of crt and lws.")
    stage2_tau: float = _option(0.7, "Power of tau-norm, from 0 (nothing changes) on; choose it on validation.")
    fairness_sweep: tuple[float, ...] = _option(
        (),
        "Weights of the penalty to train with, one job for each and one for 0, and to compare.",
        metavar="WEIGHT ...",
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
    epochs: int = _option(150, "Passes over the training images.", images=90, groups=60, mnist=20, aliases=("-e",))
    batch_size: int = _option(
        64, "Images per process and forward pass.", images=32, groups=256, mnist=128, aliases=("-b",)
    )
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
        "digits and MNIST: images of the most frequent class per image of the rarest, from 1 (balanced) to "
        f"{HEAD_COUNTS['digits']} and {HEAD_COUNTS['mnist-lt']}, training images of the most frequent class.",
        groups=1.0,
        mnist=100.0,
        colour=1.0,
    )
    many_shot: int = _option(
        25, "A class with more training images than this counts as many-shot.", images=100, mnist=1000
    )
    few_shot: int = _option(5, "A class with fewer training images than this counts as few-shot.", images=20, mnist=200)
    save_every: int = _option(50, "Epochs between checkpoints; the last epoch always has one.", images=1)
    device: str = _option("cpu", "Where to compute: auto, cpu, cuda or cuda:N.", images="auto", metavar="DEVICE")

    @classmethod
    def for_data(cls, data: str, **changes: Any) -> TrainConfig:
        """The configuration for that data set with its own defaults."""
        return cls(**{**defaults(data), "data": data, **changes})

    @property
    def kind(self) -> str:
        """Of data: the part before the colon."""
        return kind_of(self.data)

    @property
    def place(self) -> str:
        """Of data: the part after the colon."""
        return place_of(self.data)

    @property
    def reads_images(self) -> bool:
        """Whether the data are image files."""
        return self.kind in IMAGES

    @property
    def needs_torchvision(self) -> bool:
        return self.kind not in DIGITS

    @property
    def total_epochs(self) -> int:
        return total_epochs(self)

    @property
    def runs(self) -> int:
        """How many there are, of all seeds, losses and weights of a sweep, one of which is 0."""
        return self.seeds * len(self.loss) * (len(self.fairness_sweep) + 1)

    @property
    def group_table(self) -> str:
        """The file with the groups of image files, if there is one."""
        return self.place if self.kind == "csv" and self.group_column else self.groups

    @property
    def has_groups(self) -> bool:
        return bool(self.group_table) or self.kind in ("digits-groups", "mnist-colour")

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", tuple(dict.fromkeys(self.loss)))
        object.__setattr__(self, "model_kwargs", tuple(self.model_kwargs))
        object.__setattr__(self, "fairness_sweep", tuple(map(float, dict.fromkeys(self.fairness_sweep))))
        object.__setattr__(self, "scale", tuple(self.scale))
        self._make_paths_absolute()  # so that a job can be resumed from elsewhere
        object.__setattr__(self, "omega", tuple(self.omega))
        for name, (holds, expected) in rules(self).items():
            if not holds:
                value = getattr(self, name)
                shown = " ".join(map(str, value)) or "none" if isinstance(value, tuple) else value
                raise ValueError(f"expected {name} {expected}, got {shown if shown != '' else 'nothing'}")

    def _make_paths_absolute(self) -> None:
        object.__setattr__(self, "data", with_absolute_place(self.data))
        for name in PLACES[1:]:
            value = getattr(self, name)
            if value not in ("", "pretrained"):
                object.__setattr__(self, name, os.path.abspath(value))

    def as_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def defaults(data: str) -> dict[str, Any]:
    """Default of every option for a data set: digits, with groups or not, MNIST, or image files."""
    return {
        f.name: next(f.metadata[kind] for kind in default_kinds(data) if kind in f.metadata)
        for f in fields(TrainConfig)
    }
