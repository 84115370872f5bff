"""Figures of runs: curves, throughput, confusion, and runs laid over each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cifar_dist.reports.drawing import (
    HUE,
    INK,
    MUTED,
    PLAIN,
    SERIES,
    Drawing,
    curve,
    drawn,
    legend,
    limits,
    whole_epochs,
)


def learning_curves(history: pd.DataFrame, best_epoch: int | None) -> list[Drawing]:
    """Draw accuracy and loss by epoch, of training and validation."""
    found: list[Drawing] = []
    epochs = history["epoch"]
    for metric in ("accuracy", "loss"):
        train, val = history[f"train_{metric}"], history[f"val_{metric}"]
        alt = (
            f"{metric} by epoch, {len(epochs)} epochs: training ends at {train.iloc[-1]:.4f}, "
            f"validation at {val.iloc[-1]:.4f}"
        )
        with drawn(found, f"curve-{metric}", metric.capitalize(), alt) as axes:
            curve(axes, epochs, train, "training", 0)
            curve(axes, epochs, val, "validation", 1)
            if best_epoch in set(epochs):
                value = val[epochs == best_epoch].iloc[0]
                if np.isfinite(value):
                    ring = {"ms": 10, "mfc": "none", "mec": INK, "mew": 1.5}
                    axes.plot([best_epoch], [value], "o", label="best epoch", **ring)
            whole_epochs(axes)
            limits(axes, epochs)
            axes.set_ylabel(metric)
            legend(axes, 3)
    return found


def learning_rate(history: pd.DataFrame) -> list[Drawing]:
    """Draw the learning rate of each epoch's last step."""
    found: list[Drawing] = []
    epochs, rate = history["epoch"], history["lr"]
    alt = f"learning rate by epoch, from {rate.iloc[0]:.4g} to {rate.iloc[-1]:.4g}"
    caption = "Learning rate, of each epoch's last step"
    with drawn(found, "learning-rate", caption, alt) as axes:
        curve(axes, epochs, rate, None, 0, drawstyle="steps-mid" if len(rate) > 1 else "default")
        whole_epochs(axes)
        limits(axes, epochs)
        axes.set_ylabel("learning rate")
        low, high = rate.min(), rate.max()
        # A schedule may end at 0, which a logarithmic axis cannot show.
        if low > 0 and high / low > 30:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(PLAIN)
        else:
            axes.set_ylim(0, high * 1.1 or 1)
    return found


def throughput(history: pd.DataFrame) -> list[Drawing]:
    """Draw training images a second, and workers, by epoch."""
    found: list[Drawing] = []
    epochs, speed, workers = (
        history[name] for name in ("epoch", "images_per_second", "world_size")
    )
    alt = (
        f"training images a second by epoch, from {speed.min():,.0f} to {speed.max():,.0f}, "
        f"with {workers.min()} to {workers.max()} workers"
    )
    caption = "Throughput, and the number of workers at the end of each epoch"
    with drawn(found, "throughput", caption, alt, 3.6, panels=2) as (above, below):
        curve(above, epochs, speed, None, 0)
        above.set_ylim(0, speed.max() * 1.12)
        above.set_ylabel("images/s")
        below.bar(epochs, workers, width=0.8, color=SERIES[0], alpha=0.55, linewidth=0)
        below.set_ylabel("workers")
        below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        below.set_ylim(0, workers.max() * 1.15)
        below.grid(axis="x", visible=False)
        whole_epochs(below)
        below.set_xlim(epochs.min() - 0.6, epochs.max() + 0.6)
    return found


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> list[Drawing]:
    """Draw the confusion matrix: cells shaded by share of the label's images, with counts."""
    found: list[Drawing] = []
    # A class without images has a row of zeros, whose sum must not be divided by.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    off = counts.copy()
    np.fill_diagonal(off, 0)
    worst = np.unravel_index(int(off.argmax()), off.shape)
    alt = (
        f"confusion matrix of {counts.sum():,} images, {np.trace(counts):,} on the diagonal; most "
        f"often confused: {classes[int(worst[0])]} predicted as {classes[int(worst[1])]}, "
        f"{off.max()} times"
    )
    caption = "Confusion matrix: a row for each label, a column for each prediction"
    # One hue that lets the page shine through: good on light and on dark.
    shades = ListedColormap([*_shades(HUE)])
    size = 8.5 if len(classes) <= 12 else 6
    with drawn(found, "confusion", caption, alt, 5.2) as axes:
        sns.heatmap(
            shares, ax=axes, cmap=shades, vmin=0, vmax=1, cbar=False, square=True,
            annot=counts, fmt="d", annot_kws={"size": size},
            xticklabels=list(classes), yticklabels=list(classes),
        )  # fmt: skip
        # seaborn chooses black or white by the shade of the cell, but the page under it may be
        # dark.
        for text, count in zip(axes.texts, counts.flat, strict=True):
            text.set_color(INK if count else MUTED)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        axes.tick_params(axis="x", rotation=45)
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
            tick.set_rotation_mode("anchor")
        axes.tick_params(axis="y", rotation=0)
        axes.grid(visible=False)
    return found


def _shades(colour: str, steps: int = 101) -> Iterator[tuple[float, ...]]:
    red, green, blue = mpl.colors.to_rgb(colour)
    # Not fully opaque, so that the page's text colour is readable on all of them.
    return ((red, green, blue, 0.65 * share**0.8) for share in np.linspace(0, 1, steps))


def overlaid(histories: Mapping[str, pd.DataFrame], metric: str, caption: str) -> list[Drawing]:
    """Draw one metric of several runs by epoch."""
    found: list[Drawing] = []
    alt = f"{metric} by epoch: " + ", ".join(
        f"{name} ends at {rows[metric].iloc[-1]:.4g}" for name, rows in histories.items()
    )
    with drawn(found, f"overlaid-{metric}", caption, alt, 3.5) as axes:
        for number, (name, rows) in enumerate(histories.items()):
            curve(axes, rows["epoch"], rows[metric], name, number)
        whole_epochs(axes)
        limits(axes, pd.concat([rows["epoch"] for rows in histories.values()]))
        axes.set_ylabel(metric)
        legend(axes, 2)
    return found
