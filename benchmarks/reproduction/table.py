"""The table of all claims, as a page: ``docs/reproduction.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.reproduction.claims import KEPT, NOT_RAISED, ZERO, Claim, Part, mean_and_error, verdict

HEAD = """# What the papers claim, tried here

`make reproduce` writes this page. It tries claims of five papers on data that need no registration: scikit-learn's
digits, MNIST and Gaussian classes. These data are small and the models are perceptrons: a claim that fails here may
hold on ImageNet, and the other way round. The papers: *MetaLAD*, Wu et al. 2023, "Rethinking Class Imbalance in
Machine Learning"; *Estimated offset*, Kim et al. 2021; *Zero-uniformity training*, Pan et al. 2025; *FVAP*, Hänel et
al. 2022, "Enhancing Fairness of Visual Attribute Predictors"; *Classes Are Not Equal*, Cui et al. 2024.

{machine}, torch {torch}, {date}, commit {commit}. The runs took {minutes:.0f} minutes, those of two processes added up.

- **measured** is the mean over seeds of a paired difference, or of a correlation over classes, ± its standard error;
  the number of seeds is in brackets. Runs of a pair share images, initial weights and the order of batches. Accuracies
  are shares of 1. CE is cross-entropy, LA logit adjustment, CB class-balanced CE; *all* is the mean accuracy of all
  classes, *few* that of few-shot ones.
- **holds** is *yes* where the mean lies on the claimed side of 0 by more than two standard errors. *The other way*: on
  the other side by more than two. *Within the error*: neither. That something is kept holds where two standard errors
  exclude a change for the worse by more than the margin in brackets; that something is 0, where they exclude more than
  that margin.
- Among {tried} claims some pass or fail by chance. Where there are five seeds or fewer, two standard errors are weak
  evidence. Parts on MNIST have fewer seeds and epochs than the others, to save time.

**{yes} hold, {no} do not, {untried} were not tried.**
"""


def page(parts: Sequence[Part], values: Mapping[str, Sequence[float]], about: Mapping[str, Any]) -> str:
    """Markdown with one table for each part; claims without values say why they were not tried."""
    tables, verdicts = [], []
    for part in parts:
        rows = [_row(part, claim, values.get(claim.name, ())) for claim in (*part.claims, *part.untried)]
        verdicts += [row[-1].partition(":")[0].partition(" ")[0] for row in rows]
        heading = f"## {part.paper}: {part.data or 'not tried here'}"
        columns = ["claim", "where", "measured", "holds"]
        note = [part.note, ""] if part.note else []
        lines = [columns, ["---"] * len(columns), *rows]
        tables.append("\n".join([heading, "", *note, *("| " + " | ".join(line) + " |" for line in lines)]))
    yes, no = verdicts.count("yes"), verdicts.count("no")
    untried = len(verdicts) - yes - no
    head = HEAD.format(**about, yes=yes, no=no, untried=untried, tried=yes + no)
    return "\n".join([head, "\n\n".join(tables)]) + "\n"


def _row(part: Part, claim: Claim, values: Sequence[float]) -> list[str]:
    if claim.measure is None:
        return [claim.text, claim.where, "", f"not tried here: {claim.reason}"]
    if not values:
        return [claim.text, claim.where, "", f"not tried here: {'no data' if part.needs_mnist else 'no time'}"]
    return [claim.text, claim.where, _measured(claim, values), verdict(claim, values)]


def _measured(claim: Claim, values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"nothing finite ({len(values)})"
    mean, error = mean_and_error(finite)
    sign = "" if claim.expected == ZERO else "+"
    margin = f", margin {claim.margin:g}" if claim.expected in (ZERO, KEPT, NOT_RAISED) and claim.margin else ""
    number = f"{len(finite)} of {len(values)}" if len(finite) < len(values) else len(values)
    if claim.expected == ZERO and claim.margin < 1e-3:
        return f"{mean:.1e} ± {error:.1e} ({number}{margin})"
    return f"{mean:{sign}.{claim.digits}f} ± {error:.{claim.digits}f} ({number}{margin})"
