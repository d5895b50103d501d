"""Groups and the penalty on treating them differently: what goes together."""

from __future__ import annotations

import math
from typing import Any

FAIRNESS = ("none", "dp-l2", "dp-mi", "eo-l2", "eo-mi", "iou")
DEFAULT_WEIGHT = 10.0


def group_rules(config: Any) -> dict[str, tuple[bool, str]]:
    """By option, whether it holds and what is expected."""
    rules: dict[str, tuple[bool, str]] = {}
    if (config.groups or config.group_column) and config.kind != "csv":
        rules["group_column"] = (bool(config.groups and config.group_column), "together with groups, a CSV file")
    if not config.group_table and config.missing_groups == "blank":
        rules["missing_groups"] = (False, "to be left out without groups, a CSV file")
    if config.fairness in FAIRNESS[1:]:
        rules["fairness"] = (config.has_groups, "with groups: data digits-groups, or groups and group_column")
        good = all(math.isfinite(weight) and weight > 0 for weight in config.fairness_sweep)
        rules["fairness_sweep"] = (good, "as weights greater than 0")
        if config.fairness_sweep:
            unused = config.fairness_weight == DEFAULT_WEIGHT
            rules["fairness_weight"] = (unused, "to be left out with fairness_sweep")
    elif config.fairness_weight >= 0:
        rules["fairness_sweep"] = (not config.fairness_sweep, "to be left out without fairness")
        unused = config.fairness_weight == DEFAULT_WEIGHT
        rules["fairness_weight"] = (unused, "to be left out without fairness")
    if config.has_groups:
        for name in ("mixup", "cutmix"):  # a mixed image is of two groups
            rules[name] = (not getattr(config, name), "to be left out with groups")
    return rules
