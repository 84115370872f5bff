"""Figures of a search: trials by epoch, settings against the metric, epochs saved, importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from cifar_dist.reports.drawing import (
    BEST,
    INK,
    MUTED,
    PLAIN,
    SERIES,
    Drawing,
    drawn,
    legend,
    limits,
    whole_epochs,
)


def accuracy_by_epoch(
    history: pd.DataFrame, trials: pd.DataFrame, metric: str, best_trial: str | None
) -> list[Drawing]:
    """Draw each trial's metric by epoch: stopped ones faded, the best one in front."""
    found: list[Drawing] = []
    status = dict(zip(trials["trial_id"], trials["status"], strict=True))
    counts = trials["status"].value_counts()
    alt = (
        f"{metric} by epoch of {history['trial_id'].nunique()} trials: "
        + ", ".join(f"{count} {name}" for name, count in counts.items())
        + (f"; the best is {best_trial}" if best_trial else "")
    )
    caption = f"{metric} by epoch; stopped trials are faded"
    with drawn(found, "by-epoch", caption, alt, 4.2, wide=True) as axes:
        for trial, rows in history.groupby("trial_id", sort=True):
            full = status.get(str(trial)) == "completed"
            best = trial == best_trial
            axes.plot(
                rows["epoch"], rows[metric], marker="o", markersize=3.5 if len(rows) < 20 else 0,
                color=BEST if best else SERIES[0] if full else MUTED,
                linewidth=2.6 if best else 1.7 if full else 1.2,
                alpha=1 if full or best else 0.45, zorder=4 if best else 3 if full else 2,
            )  # fmt: skip
            if not full and not best:
                last = rows.iloc[-1]
                axes.plot(last["epoch"], last[metric], "x", color=MUTED, ms=5, alpha=0.8, zorder=2)
        kinds: list[tuple[str, dict[str, Any], bool]] = [
            (f"best ({best_trial})", {"color": BEST, "linewidth": 2.6}, best_trial is not None),
            ("completed", {"color": SERIES[0]}, "completed" in counts),
            ("not completed", {"color": MUTED, "alpha": 0.6, "marker": "x"},
             bool(set(counts.index) - {"completed"})),
        ]  # fmt: skip
        for label, style, shown in kinds:
            if shown:
                # Empty lines for the legend, which would have an entry for each trial if those had
                # labels.
                axes.plot([], [], label=label, **style)
        whole_epochs(axes)
        limits(axes, history["epoch"])
        axes.set_ylabel(metric)
        legend(axes, 3)
    return found


@dataclass(frozen=True)
class Setting:
    """A searched setting, as an axis."""

    name: str
    places: pd.Series[float]
    """Each trial's value, as a place on a numeric axis."""
    low: float
    high: float
    ticks: Mapping[float, str]
    """Labels by place; empty where the axis chooses its own."""
    log: bool = False


def settings_against(
    settings: Sequence[Setting], trials: pd.DataFrame, metric: str, best_trial: str | None
) -> list[Drawing]:
    """Draw each searched setting against the metric."""
    found: list[Drawing] = []
    for each in settings:
        alt = f"{metric} of {len(trials)} trials against {each.name}, a point a trial"
        caption = f"{each.name} against {metric}"
        with drawn(found, f"against-{each.name}", caption, alt, 3.0) as axes:
            frame = pd.DataFrame(
                {
                    "place": each.places,
                    "value": trials[metric],
                    "kind": np.where(trials["status"] == "completed", *_KINDS),
                }
            )
            sns.scatterplot(
                frame, x="place", y="value", hue="kind", style="kind", ax=axes, hue_order=_KINDS,
                style_order=_KINDS, palette=dict(zip(_KINDS, (SERIES[0], MUTED), strict=True)),
                markers=dict(zip(_KINDS, ("o", "X"), strict=True)), s=55, alpha=0.8, linewidth=0,
            )  # fmt: skip
            best = frame[trials["trial_id"] == best_trial]
            axes.plot(best["place"], best["value"], "o", ms=11, mfc="none", mec=BEST, mew=2,
                      label="best")  # fmt: skip
            _scale(axes, each)
            axes.set_xlabel(each.name)
            axes.set_ylabel(metric)
            legend(axes, 3)
    return found


_KINDS = ("completed", "stopped early")


def _scale(axes: Axes, setting: Setting) -> None:
    low, high = setting.low, setting.high
    if setting.log:
        axes.set_xscale("log")
        # A factor: a margin in units would be wide at one end of a log axis and nothing at the
        # other.
        room = (high / low) ** 0.04 if high > low else 1.5
        axes.set_xlim(low / room, high * room)
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_locator(NullLocator())
        decades = [10.0**n for n in range(-12, 13) if low / room <= 10.0**n <= high * room]
        axes.set_xticks(decades if len(decades) > 1 else [low, _middle(setting), high])
    else:
        room = (high - low) * 0.06 or 0.5
        axes.set_xlim(low - room, high + room)
    if setting.ticks:
        axes.set_xticks(list(setting.ticks), list(setting.ticks.values()))


def parallel_coordinates(
    settings: Sequence[Setting], trials: pd.DataFrame, metric: str, mode: str
) -> list[Drawing]:
    """Draw a line a trial through its settings to its metric: the better, the stronger."""
    found: list[Drawing] = []
    scored = trials[trials[metric].notna()]
    values = scored[metric].astype(float)
    low, high = float(values.min()), float(values.max())
    spread = high - low or 1.0
    rank = values.rank(pct=True, ascending=mode == "max")
    axes_names = [*(each.name for each in settings), metric]
    alt = (
        f"parallel coordinates of {len(scored)} trials over {', '.join(axes_names)}; {metric} "
        f"from {low:.4f} to {high:.4f}"
    )
    caption = "Parallel coordinates: a line a trial, the better the stronger; the best in orange"
    with drawn(found, "parallel", caption, alt, 4.4, wide=True) as axes:
        places = range(len(axes_names))
        best = values.idxmax() if mode == "max" else values.idxmin()
        # The worst first, so that no better trial is hidden by it.
        for index in rank.sort_values().index:
            heights = [_height(each, float(each.places[index])) for each in settings]
            heights.append((values[index] - low) / spread)
            first = index == best
            axes.plot(
                places, heights, color=BEST if first else SERIES[0],
                linewidth=3 if first else 1 + 1.2 * rank[index],
                alpha=1 if first else 0.15 + 0.7 * rank[index] ** 2,
            )  # fmt: skip
        for place, each in enumerate(settings):
            axes.axvline(place, color=MUTED, linewidth=1)
            ticks = each.ticks or {
                each.low: f"{each.low:.3g}",
                _middle(each): f"{_middle(each):.3g}",
                each.high: f"{each.high:.3g}",
            }
            for at, label in ticks.items():
                _tick(axes, place, _height(each, at), label)
        axes.axvline(places[-1], color=MUTED, linewidth=1)
        for share in (0.0, 0.5, 1.0):
            _tick(axes, places[-1], share, f"{low + share * spread:.4g}")
        axes.set_xticks(list(places), axes_names)
        axes.tick_params(axis="x", labelsize=10.5, labelcolor=INK)
        axes.set_yticks([])
        axes.set_xlim(-0.15, places[-1] + 0.35)
        axes.set_ylim(-0.06, 1.06)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(visible=False)
    return found


def _tick(axes: Axes, place: float, height: float, label: str) -> None:
    axes.plot([place - 0.015, place + 0.015], [height, height], color=MUTED, linewidth=1)
    axes.text(place + 0.03, height, label, va="center", fontsize=9, color=INK)


def _height(setting: Setting, place: float) -> float:
    """Return where a value lies on the setting's axis, from 0 to 1."""
    low, high = setting.low, setting.high
    if high == low:
        return 0.5
    if setting.log:
        return float(np.log(place / low) / np.log(high / low))
    return (place - low) / (high - low)


def _middle(setting: Setting) -> float:
    low, high = setting.low, setting.high
    return float(np.sqrt(low * high)) if setting.log else (low + high) / 2


def epochs_of_trials(trials: pd.DataFrame, max_epochs: int) -> list[Drawing]:
    """Draw the epochs that each trial ran, and those that a stopped one was saved."""
    found: list[Drawing] = []
    ran = trials["epochs"].astype(int)
    # A trial that failed or is unfinished has not run the rest either, which saved nothing.
    saved = (max_epochs - ran).where(trials["status"] == "stopped", 0)
    alt = (
        f"epochs of each of {len(trials)} trials, of {max_epochs} possible: {ran.sum()} of "
        f"{len(trials) * max_epochs} counted"
    )
    height = min(max(1.5 + 0.2 * len(trials), 2.6), 9.0)
    with drawn(found, "saved", "Epochs run (filled) and saved", alt, height) as axes:
        rows = np.arange(len(trials))
        full = trials["status"] == "completed"
        colours = [SERIES[0] if each else MUTED for each in full]
        axes.barh(rows, ran, height=0.7, linewidth=0, color=colours)
        axes.barh(rows, saved, left=ran, height=0.7, color=MUTED, alpha=0.18,
                  linewidth=0)  # fmt: skip
        # At most 40 labels: more would overlap, since the figure's height has a limit.
        every = -(-len(trials) // 40)
        axes.set_yticks(rows[::every], list(trials["trial_id"])[::every])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlim(0, max_epochs)
        axes.set_ylim(len(trials) - 0.4, -0.6)
        axes.set_xlabel("epochs")
    return found


def importance(drops: pd.DataFrame, metric: str) -> list[Drawing]:
    """Draw how much a forest's prediction depends on each setting.

    Args:
        drops: columns ``setting``, ``mean_drop``, ``std_drop``.
        metric: what it predicts.
    """
    found: list[Drawing] = []
    alt = "importance of each setting: " + ", ".join(
        f"{row.setting} {row.mean_drop:.2f}" for row in drops.itertuples()
    )
    caption = f"Settings on which a random forest's prediction of {metric} depends"
    with drawn(found, "importance", caption, alt, max(1.6 + 0.32 * len(drops), 2.4)) as axes:
        rows = np.arange(len(drops))
        axes.barh(
            rows, drops["mean_drop"], xerr=drops["std_drop"], height=0.6, color=SERIES[0],
            linewidth=0, error_kw={"ecolor": INK, "elinewidth": 1.2},
        )  # fmt: skip
        axes.set_yticks(rows, list(drops["setting"]))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
        axes.set_xlabel("drop of R² when the setting is shuffled")
    return found
