"""Charts of metric values; matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MANY = 40  # bars; above, dots
COLOR, DARK = "#0072B2", "0.25"


def axes_of(ax: Any) -> tuple[Any, Any]:
    """Figure and axes to draw on; as in torchmetrics there is no figure where axes are given."""
    if ax is not None:
        return None, ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")


def finish(figure: Any, ax: Any, ylabel: str, xlabel: str = "") -> tuple[Any, Any]:
    ax.set_ylabel(ylabel)
    ax.set_xlabel(xlabel)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def bars(
    labels: Any, values: Tensor, ax: Any, ylabel: str, xlabel: str = "", top: float | None = None
) -> tuple[Any, Any]:
    """A bar per value; dots where there are many. A cross stands for NaN."""
    figure, ax = axes_of(ax)
    heights, positions = _array(values), np.arange(values.numel())
    if len(positions) > MANY:
        ax.scatter(positions, heights, s=6, color=COLOR, lw=0)
    else:
        ax.bar(positions, heights, color=COLOR, width=0.8)
        ax.set_xticks(positions, [str(label) for label in labels])
        missing = np.isnan(heights)
        ax.scatter(positions[missing], np.zeros(missing.sum()), marker="x", color=DARK, clip_on=False)
    ax.set_ylim(0, None if top is None else 1.02 * top)
    return finish(figure, ax, ylabel, xlabel)


def intervals(value: dict[str, Tensor], ax: Any, ylabel: str) -> tuple[Any, Any]:
    """Accuracy of the classes from best to worst, with their intervals."""
    figure, ax = axes_of(ax)
    accuracy, lower, upper = (_array(value[name]) for name in ("accuracy", "lower", "upper"))
    order = np.argsort(-accuracy, kind="stable")
    order = order[~np.isnan(accuracy[order])]
    rank = np.arange(1, len(order) + 1)
    accuracy, lower, upper = accuracy[order], lower[order], upper[order]
    if len(rank) > MANY:
        ax.fill_between(rank, lower, upper, color=COLOR, alpha=0.25, lw=0)
        ax.plot(rank, accuracy, color=COLOR)
        return finish(figure, ax, ylabel, "classes from best to worst")
    around = np.abs(np.stack([accuracy - lower, upper - accuracy]))
    ax.errorbar(rank, accuracy, around, fmt="o", color=COLOR, ecolor=DARK, capsize=2)
    ax.set_xticks(rank, [str(c) for c in order])
    ax.set_ylim(0, 1.02)
    return finish(figure, ax, ylabel, "class (from best to worst)")


def against_line(curve: Tensor, area: Tensor, ax: Any) -> tuple[Any, Any]:
    """A cumulative curve as a share of its last value, beside the straight line."""
    figure, ax = axes_of(ax)
    share = np.concatenate([[0.0], _array(curve) / max(float(curve[-1]), 1.0)])
    rank = np.arange(len(share))
    ax.plot(rank, share, color=COLOR, marker="o" if len(share) <= MANY else "", ms=4, label=f"area {float(area):+.3f}")
    ax.plot(rank[[0, -1]], [0, 1], color=DARK, ls="--", lw=1, label="without regard to frequency")
    ax.legend(frameon=False)
    return finish(figure, ax, "share of all false positives", "classes from most to least frequent")


def heat_map(
    values: Tensor, ax: Any, title: str, xlabel: str, ylabel: str, rows: list[str] | None = None
) -> tuple[Any, Any]:
    figure, ax = axes_of(ax)
    image = ax.imshow(_array(values), aspect="auto", cmap="viridis", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax)
    for axis, size in ((ax.xaxis, values.shape[1]), (ax.yaxis, values.shape[0])):
        if size <= MANY:
            axis.set_ticks(range(size))
    if rows is not None and len(rows) <= MANY:
        ax.set_yticks(range(len(rows)), rows)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, ax


def _array(values: Tensor) -> np.ndarray:
    return values.detach().to("cpu", torch.float64).numpy()
