"""Which values of the options are right, and which go together."""

from __future__ import annotations

import math
from typing import Any

from classfair.training.data_option import FORMS, HEAD_COUNTS, either, source_rules
from classfair.training.group_rules import FAIRNESS, group_rules
from classfair.training.method_rules import method_rules

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


def rules(config: Any) -> dict[str, tuple[bool, str]]:
    """By option, whether it holds and what is expected."""
    return {**_choices(config), **_ranges(config), **_combinations(config)}


def _choices(config: Any) -> dict[str, tuple[bool, str]]:
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
    rules = {name: (getattr(config, name) in known, f"to be {either(known)}") for name, known in choices.items()}
    losses = len(config.loss) > 0 and set(config.loss) <= set(LOSSES)
    rules["loss"] = (losses, f"to be one or several of {', '.join(LOSSES)}")
    rules["data"] = (config.kind != "", f"to be {either(FORMS)}")
    return rules


def _ranges(config: Any) -> dict[str, tuple[bool, str]]:
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
        rules[name] = (getattr(config, name) >= 1, "of at least 1")
    head_count = HEAD_COUNTS.get(config.kind, HEAD_COUNTS["digits"])
    at_least_0 = ("tau", "gamma", "weight_decay", "clip_grad", "mixup", "cutmix", "max_margin", "strength")
    for name in (*at_least_0, "fairness_weight", "meta_lr", "center_weight", "uniform_weight", "zero_uniformity"):
        rules[name] = (_within(getattr(config, name), 0), "of at least 0")
    for name in ("drw_start", "loss_warmup", "lr_warmup_epochs", "workers", "meta_per_class", "meta_start"):
        rules[name] = (getattr(config, name) >= 0, "of at least 0")
    for name in ("lr", "cosine_scale", "lr_gamma"):
        rules[name] = (_within(getattr(config, name), 0) and getattr(config, name) > 0, "greater than 0")
    for name in ("label_smoothing", "hflip", "random_erase"):
        rules[name] = (0 <= getattr(config, name) <= 1, "from 0 to 1")
    for name in ("momentum", "beta", "split"):
        rules[name] = (0 <= getattr(config, name) < 1, "from 0 up to but excluding 1")
    return rules | {
        "seed": (0 <= config.seed < 2**32 - max(config.seeds, 1), "from 0 up to 2**32 - seeds"),
        "omega": (all(map(math.isfinite, config.omega)), "as three finite numbers"),
        "scale": (0 < config.scale[0] <= config.scale[1] <= 1, "as two ascending shares of 1"),
        "imbalance": (
            1 <= config.imbalance <= head_count,
            f"from 1 to {head_count} (above, the rarest class gets no image)",
        ),
        "few_shot": (0 <= config.few_shot <= config.many_shot, f"from 0 to many_shot ({config.many_shot})"),
    }


def _combinations(config: Any) -> dict[str, tuple[bool, str]]:
    images = config.reads_images
    rules = {"model": (images != (config.model == "mlp"), "to be mlp for digits, and another one for image folders")}
    rules |= source_rules(config)
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
            rules[name] = (not getattr(config, name), f"to be left out with {config.kind or 'digits'}")
        for name, value in {"auto_augment": "none", "bad_images": "error"}.items():
            rules[name] = (getattr(config, name) == value, f"to be left out with {config.kind or 'digits'}")
    rules |= group_rules(config) | _meta(config)
    if config.effective_frequency:
        used = bool({"la", "cb"} & set(config.loss))
        rules["effective_frequency"] = (used, "with a loss that uses it (la, cb)")
    if config.offset == "zero":
        rules["offset"] = ("estimated-offset" in config.loss, "with the loss that uses it (estimated-offset)")
    if config.probe in PROBES[1:]:
        rules["probe"] = (config.zero_uniformity != 0, "with zero_uniformity above 0")
    if config.loss_warmup:
        ramped = set(config.loss) <= {"la", "ldam", "cb"}
        rules["loss_warmup"] = (ramped, "with losses that have something to ramp (la, ldam, cb)")
    if config.drw_start:
        rules["drw_start"] = (config.drw_start < config.epochs, f"below epochs ({config.epochs})")
        if "cb" in config.loss:
            rules["drw_start"] = (False, "without cb, which has class weights of its own")
    if config.lr_warmup_epochs:
        rules["lr_warmup_epochs"] = (config.lr_warmup_epochs < config.epochs, f"below epochs ({config.epochs})")
    return rules | method_rules(config)


def _meta(config: Any) -> dict[str, tuple[bool, str]]:
    if not config.meta_per_class:
        unused = ("meta_lr", "meta_start", "meta_from", "meta_method")
        changed = [name for name in unused if getattr(config, name) != type(config).__dataclass_fields__[name].default]
        return dict.fromkeys(changed, (False, "to be left out without meta_per_class"))
    rules: dict[str, tuple[bool, str]] = {}
    if config.meta_per_class > 0 and "metalad" not in config.loss:
        rules["meta_per_class"] = (False, "with loss metalad")
    if config.meta_start >= config.epochs:
        rules["meta_start"] = (False, f"below epochs ({config.epochs})")
    for name, value in {"fairness": "none", "grad_accum": 1}.items():
        if getattr(config, name) != value:
            rules[name] = (False, "to be left out with meta_per_class")
    if config.kind in ("digits-groups", "mnist-colour"):
        rules["data"] = (False, "without groups with meta_per_class")
    return rules


def _within(value: float, low: float) -> bool:
    return math.isfinite(value) and value >= low
