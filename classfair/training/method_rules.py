"""Heads, methods and second stages: which there are, and which exclude each other."""

from __future__ import annotations

from typing import Any

from classfair.training.data_option import either

HEADS = ("plain", "etf")
METHODS = ("none", "lff", "jtt")
STAGES2 = ("none", "crt", "lws", "tau-norm")


def total_epochs(config: Any) -> int:
    """Of all stages of a run. That of tau-norm, which trains nothing, counts as one."""
    first = config.jtt_epochs if config.method == "jtt" else 0
    second = {"none": 0, "tau-norm": 1}.get(config.stage2, config.stage2_epochs)
    return first + config.epochs + second


def method_rules(config: Any) -> dict[str, tuple[bool, str]]:
    """By option that does not hold, what is expected."""
    rules: dict[str, tuple[bool, str]] = {}
    for name, known in (("head", HEADS), ("method", METHODS), ("stage2", STAGES2)):
        rules[name] = (getattr(config, name) in known, f"to be {either(known)}")
    for name in ("jtt_epochs", "jtt_weight", "stage2_epochs"):
        rules[name] = (getattr(config, name) >= 1, "of at least 1")
    rules["stage2_tau"] = (0 <= config.stage2_tau <= 2, "from 0 to 2")
    rules |= _stage_rules(config) if config.stage2 != "none" else {}
    rules |= _head_rules(config) if config.head == "etf" else {}
    rules |= _method_rules(config) if config.method in ("lff", "jtt") else {}
    return {name: rule for name, rule in rules.items() if not rule[0]}


def _stage_rules(config: Any) -> dict[str, tuple[bool, str]]:
    if "estimated-offset" in config.loss:
        return {"stage2": (False, "to be none with estimated-offset, whose head has an offset of its own")}
    if config.stage2 == "tau-norm" and "ldam" in config.loss:
        return {"stage2": (False, "other than tau-norm with ldam, whose rows have no norm")}
    unused = ("meta_per_class", "zero_uniformity")
    return {name: (not getattr(config, name), f"to be left out with stage2 {config.stage2}") for name in unused}


def _head_rules(config: Any) -> dict[str, tuple[bool, str]]:
    if "estimated-offset" in config.loss:
        return {"head": (False, "to be plain with estimated-offset, which has a head of its own")}
    if "ldam" in config.loss:
        return {"head": (False, "to be plain with ldam, which has a cosine head")}
    if config.stage2 != "none":
        return {"head": (False, f"to be plain with stage2 {config.stage2}, because that of etf stays as it is")}
    return {"batch_size": (config.batch_size >= 2, "of at least 2 with head etf, which has batch norm")}


def _method_rules(config: Any) -> dict[str, tuple[bool, str]]:
    method = config.method
    rules = {
        "loss": (config.loss == ("ce",), f"to be ce with method {method}, which weights samples itself"),
        "sampler": (config.sampler == "shuffle", f"to be shuffle with method {method}, which weights samples itself"),
        "stage2": (config.stage2 == "none", f"to be none with method {method}"),
        "drw_start": (not config.drw_start, f"to be left out with method {method}"),
    }
    if method == "lff":
        rules["fairness"] = (config.fairness == "none", "to be none with method lff")
        rules["zero_uniformity"] = (not config.zero_uniformity, "to be left out with method lff")
        for name in ("mixup", "cutmix"):
            rules[name] = (not getattr(config, name), "to be left out with method lff, which follows single images")
    return rules
