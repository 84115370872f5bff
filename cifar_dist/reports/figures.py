"""Figures as inline SVG that follows the page's light or dark colours.

Figures are drawn with stand-in colours, which become CSS variables of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

INK, MUTED, GRID = "#0a0a01", "#0a0a02", "#0a0a03"
"""Stand-ins for text, quiet text, and lines of the grid."""
HUE, BEST = "#0a0a05", "#0a0a06"
SERIES = ("#0a0a11", "#0a0a12", "#0a0a13", "#0a0a14", "#0a0a15", "#0a0a16", "#0a0a17", "#0a0a18")
"""Stand-ins for the colours of things that are told apart."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Told apart by them too, for those who do not see the colours."""
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    HUE: "--hue",
    BEST: "--best",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}

WIDTH = 5.6
"""Inches of a figure in a column; as wide as a phone it must still be readable."""
WIDE = 11.5
"""Inches of a figure as wide as the page."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cifar_dist",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.9,
    "lines.markersize": 4,
    "axes.unicode_minus": False,
    "text.parse_math": False,  # a name with $ is a name
}


_PLAIN = FuncFormatter(lambda value, _: f"{value:.3g}")


@dataclass(frozen=True)
class Drawing:
    """A figure for a page."""

    name: str
    """Unique in its page."""
    caption: str
    alt: str
    """What it shows, in words, for who does not see it."""
    svg: Markup
    wide: bool = False


@contextmanager
def _drawn(
    found: list[Drawing],
    name: str,
    caption: str,
    alt: str,
    height: float = 3.3,
    wide: bool = False,
    panels: int = 1,
) -> Iterator[Any]:
    """Axes to draw into; behind the block the figure is added to what was found."""
    with mpl.rc_context(_STYLE):
        figure = Figure((WIDE if wide else WIDTH, height), layout="constrained")
        axes = figure.subplots(panels, 1, sharex=True)
        yield axes
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    svg = Markup(inline(out.getvalue(), name, alt))
    found.append(Drawing(name, caption, alt, svg, wide))


def inline(svg: str, name: str, alt: str) -> str:
    """A file of matplotlib's as an element of a page.

    Args:
        svg: the file's text.
        name: what ids begin with, so that those of two figures differ.
        alt: for its label.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{escape(alt)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    # Ids that nothing refers to only make the page long.
    referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    used = {each for pair in referred for each in pair if each}
    svg = re.sub(
        r'\s+id="([^"]+)"',
        lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "",
        svg,
    )
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    # "font: 10.5px 'DejaVu Sans', ..." has many names; the page knows its own.
    svg = re.sub(r"(font: [^;\"]*?[\d.]+px) '[^;\"]*", r"\1 var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _whole_epochs(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _curve(axes: Axes, x: Any, y: Any, label: str | None, number: int, **more: Any) -> None:
    """A line whose points show where there are few."""
    marker = "o" if len(x) <= 15 else None
    sns.lineplot(
        x=np.asarray(x), y=np.asarray(y, float), ax=axes, label=label, errorbar=None,
        color=SERIES[number % len(SERIES)], linestyle=DASHES[number % len(DASHES)],
        marker=marker, markeredgewidth=0, **more,
    )  # fmt: skip


def _legend(axes: Axes, columns: int = 2) -> None:
    """Above the axes, where it hides no line."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2,
        handlelength=2.4, columnspacing=1.4,
    )  # fmt: skip


def _limits(axes: Axes, epochs: Any) -> None:
    """Room for a single epoch's point."""
    first, last = min(epochs), max(epochs)
    pad = max((last - first) * 0.03, 0.3 if last - first < 3 else 0)
    axes.set_xlim(first - pad, last + pad)


# --- runs ------------------------------------------------------------------------------------


def learning_curves(history: pd.DataFrame, best_epoch: int | None) -> list[Drawing]:
    """Accuracy and loss by epoch, training and validation."""
    found: list[Drawing] = []
    epochs = history["epoch"]
    for metric in ("accuracy", "loss"):
        train, val = history[f"train_{metric}"], history[f"val_{metric}"]
        alt = (
            f"{metric} by epoch, {len(epochs)} epochs: training ends at {train.iloc[-1]:.4f}, "
            f"validation at {val.iloc[-1]:.4f}"
        )
        with _drawn(found, f"curve-{metric}", metric.capitalize(), alt) as axes:
            _curve(axes, epochs, train, "training", 0)
            _curve(axes, epochs, val, "validation", 1)
            if best_epoch in set(epochs):
                value = val[epochs == best_epoch].iloc[0]
                if np.isfinite(value):
                    ring = {"ms": 10, "mfc": "none", "mec": INK, "mew": 1.5}
                    axes.plot([best_epoch], [value], "o", label="best epoch", **ring)
            _whole_epochs(axes)
            _limits(axes, epochs)
            axes.set_ylabel(metric)
            _legend(axes, 3)
    return found


def learning_rate(history: pd.DataFrame) -> list[Drawing]:
    """The learning rate of each epoch's last step."""
    found: list[Drawing] = []
    epochs, rate = history["epoch"], history["lr"]
    alt = f"learning rate by epoch, from {rate.iloc[0]:.4g} to {rate.iloc[-1]:.4g}"
    caption = "Learning rate, of each epoch's last step"
    with _drawn(found, "learning-rate", caption, alt) as axes:
        _curve(axes, epochs, rate, None, 0, drawstyle="steps-mid" if len(rate) > 1 else "default")
        _whole_epochs(axes)
        _limits(axes, epochs)
        axes.set_ylabel("learning rate")
        low, high = rate.min(), rate.max()
        if low > 0 and high / low > 30:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_PLAIN)
        else:
            axes.set_ylim(0, high * 1.1 or 1)
    return found


def throughput(history: pd.DataFrame) -> list[Drawing]:
    """Training images a second, and workers, by epoch."""
    found: list[Drawing] = []
    epochs, speed, workers = (
        history[name] for name in ("epoch", "images_per_second", "world_size")
    )
    alt = (
        f"training images a second by epoch, from {speed.min():,.0f} to {speed.max():,.0f}, "
        f"with {workers.min()} to {workers.max()} workers"
    )
    caption = "Throughput, and the workers that each epoch ended with"
    with _drawn(found, "throughput", caption, alt, 3.6, panels=2) as (above, below):
        _curve(above, epochs, speed, None, 0)
        above.set_ylim(0, speed.max() * 1.12)
        above.set_ylabel("images/s")
        below.bar(epochs, workers, width=0.8, color=SERIES[0], alpha=0.55, linewidth=0)
        below.set_ylabel("workers")
        below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        below.set_ylim(0, workers.max() * 1.15)
        below.grid(axis="x", visible=False)
        _whole_epochs(below)
        below.set_xlim(epochs.min() - 0.6, epochs.max() + 0.6)
    return found


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> list[Drawing]:
    """The confusion matrix: shade by share of the label's images, the number in the cell."""
    found: list[Drawing] = []
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    off = counts.copy()
    np.fill_diagonal(off, 0)
    worst = np.unravel_index(int(off.argmax()), off.shape)
    alt = (
        f"confusion matrix of {counts.sum():,} images, {np.trace(counts):,} on the diagonal; most "
        f"often confused: {classes[int(worst[0])]} answered as {classes[int(worst[1])]}, "
        f"{off.max()} times"
    )
    caption = "Confusion: a row for each label, a column for each answer"
    # One hue that lets the page shine through: good on light and on dark.
    shades = ListedColormap([*_shades(HUE)])
    size = 8.5 if len(classes) <= 12 else 6
    with _drawn(found, "confusion", caption, alt, 5.2) as axes:
        sns.heatmap(
            shares, ax=axes, cmap=shades, vmin=0, vmax=1, cbar=False, square=True,
            annot=counts, fmt="d", annot_kws={"size": size},
            xticklabels=list(classes), yticklabels=list(classes),
        )  # fmt: skip
        for text, count in zip(axes.texts, counts.flat, strict=True):
            text.set_color(INK if count else MUTED)
        axes.set_xlabel("answer")
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
    # Not all the way, so that the page's own ink can be read on all of them.
    return ((red, green, blue, 0.65 * share**0.8) for share in np.linspace(0, 1, steps))


# --- searches --------------------------------------------------------------------------------


def accuracy_by_epoch(
    history: pd.DataFrame, trials: pd.DataFrame, metric: str, best_trial: str | None
) -> list[Drawing]:
    """Each trial's metric by epoch: stopped ones faded, the best one in front."""
    found: list[Drawing] = []
    status = dict(zip(trials["trial_id"], trials["status"], strict=True))
    counts = trials["status"].value_counts()
    alt = (
        f"{metric} by epoch of {history['trial_id'].nunique()} trials: "
        + ", ".join(f"{count} {name}" for name, count in counts.items())
        + (f"; the best is {best_trial}" if best_trial else "")
    )
    caption = f"{metric} by epoch; stopped trials are faded"
    with _drawn(found, "by-epoch", caption, alt, 4.2, wide=True) as axes:
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
                axes.plot([], [], label=label, **style)
        _whole_epochs(axes)
        _limits(axes, history["epoch"])
        axes.set_ylabel(metric)
        _legend(axes, 3)
    return found


@dataclass(frozen=True)
class Setting:
    """A searched setting, as an axis."""

    name: str
    places: pd.Series[float]
    """Of each trial, on an axis of numbers."""
    low: float
    high: float
    ticks: Mapping[float, str]
    """Labels by place; empty where the axis makes its own."""
    log: bool = False


def settings_against(
    settings: Sequence[Setting], trials: pd.DataFrame, metric: str, best_trial: str | None
) -> list[Drawing]:
    """Each searched setting against the metric."""
    found: list[Drawing] = []
    for each in settings:
        alt = f"{metric} of {len(trials)} trials against {each.name}, a point a trial"
        caption = f"{each.name} against {metric}"
        with _drawn(found, f"against-{each.name}", caption, alt, 3.0) as axes:
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
            _legend(axes, 3)
    return found


_KINDS = ("completed", "stopped early")


def _scale(axes: Axes, setting: Setting) -> None:
    low, high = setting.low, setting.high
    if setting.log:
        axes.set_xscale("log")
        room = (high / low) ** 0.04 if high > low else 1.5
        axes.set_xlim(low / room, high * room)
        axes.xaxis.set_major_formatter(_PLAIN)
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
    """A line a trial through its settings to its metric: the better, the stronger."""
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
    with _drawn(found, "parallel", caption, alt, 4.4, wide=True) as axes:
        places = range(len(axes_names))
        best = values.idxmax() if mode == "max" else values.idxmin()
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
    """From 0 to 1 on the setting's axis."""
    low, high = setting.low, setting.high
    if high == low:
        return 0.5
    if setting.log:
        return float(np.log(place / low) / np.log(high / low))
    return (place - low) / (high - low)


def _middle(setting: Setting) -> float:
    low, high = setting.low, setting.high
    return float(np.sqrt(low * high)) if setting.log else (low + high) / 2


def epochs_saved(trials: pd.DataFrame, max_epochs: int) -> list[Drawing]:
    """Epochs that each trial ran, out of those that it could have."""
    found: list[Drawing] = []
    ran = trials["epochs"].astype(int)
    alt = (
        f"epochs of each of {len(trials)} trials, of {max_epochs} possible: {ran.sum()} of "
        f"{len(trials) * max_epochs} counted"
    )
    height = min(max(1.5 + 0.2 * len(trials), 2.6), 9.0)
    with _drawn(found, "saved", "Epochs run (filled) and saved", alt, height) as axes:
        rows = np.arange(len(trials))
        full = trials["status"] == "completed"
        colours = [SERIES[0] if each else MUTED for each in full]
        axes.barh(rows, ran, height=0.7, linewidth=0, color=colours)
        axes.barh(rows, max_epochs - ran, left=ran, height=0.7, color=MUTED, alpha=0.18,
                  linewidth=0)  # fmt: skip
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
    """How much a forest's prediction rests on each setting: ``setting``, ``mean``, ``std``."""
    found: list[Drawing] = []
    alt = "importance of each setting: " + ", ".join(
        f"{row.setting} {row.mean_drop:.2f}" for row in drops.itertuples()
    )
    caption = f"What a random forest's prediction of {metric} rests on"
    with _drawn(found, "importance", caption, alt, max(1.6 + 0.32 * len(drops), 2.4)) as axes:
        rows = np.arange(len(drops))
        axes.barh(
            rows, drops["mean_drop"], xerr=drops["std_drop"], height=0.6, color=SERIES[0],
            linewidth=0, error_kw={"ecolor": INK, "elinewidth": 1.2},
        )  # fmt: skip
        axes.set_yticks(rows, list(drops["setting"]))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
        axes.set_xlabel("fall of R² when the setting is shuffled")
    return found


# --- comparisons -----------------------------------------------------------------------------


def overlaid(histories: Mapping[str, pd.DataFrame], metric: str, caption: str) -> list[Drawing]:
    """One metric of several runs by epoch."""
    found: list[Drawing] = []
    alt = f"{metric} by epoch: " + ", ".join(
        f"{name} ends at {rows[metric].iloc[-1]:.4g}" for name, rows in histories.items()
    )
    with _drawn(found, f"overlaid-{metric}", caption, alt, 3.5) as axes:
        for number, (name, rows) in enumerate(histories.items()):
            _curve(axes, rows["epoch"], rows[metric], name, number)
        _whole_epochs(axes)
        _limits(axes, pd.concat([rows["epoch"] for rows in histories.values()]))
        axes.set_ylabel(metric)
        _legend(axes, 2)
    return found
