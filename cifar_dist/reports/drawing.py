"""Parts that all figures share: inline SVG that follows the page's light or dark colours.

Figures are drawn with stand-in colours, which become CSS variables of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# In lower case, as matplotlib writes colours: the SVG is searched for exactly these strings.
INK, MUTED, GRID = "#0a0a01", "#0a0a02", "#0a0a03"
"""Stand-ins for text, secondary text, and grid lines."""
HUE, BEST = "#0a0a05", "#0a0a06"
SERIES = ("#0a0a11", "#0a0a12", "#0a0a13", "#0a0a14", "#0a0a15", "#0a0a16", "#0a0a17", "#0a0a18")
"""Stand-ins for the colours that distinguish series."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Distinguish series too, for readers who do not see the colours."""
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    HUE: "--hue",
    BEST: "--best",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}

WIDTH = 5.6
"""Inches of a figure in a column; it must still be readable at the width of a phone."""
WIDE = 11.5
"""Inches of a figure as wide as the page."""

_STYLE: Any = {
    # Text stays text, which takes the page's font and can be searched.
    "svg.fonttype": "none",
    # Without a salt ids are random, and two reports of the same run would differ.
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


PLAIN = FuncFormatter(lambda value, _: f"{value:.3g}")


@dataclass(frozen=True)
class Drawing:
    """A figure for a page."""

    name: str
    """Unique in its page."""
    caption: str
    alt: str
    """A description, for screen readers."""
    svg: Markup
    wide: bool = False


@contextmanager
def drawn(
    found: list[Drawing],
    name: str,
    caption: str,
    alt: str,
    height: float = 3.3,
    wide: bool = False,
    panels: int = 1,
) -> Iterator[Any]:
    """Yield axes to draw into; after the block the figure is appended to ``found``."""
    with mpl.rc_context(_STYLE):
        # Not by pyplot, which keeps every figure until it is closed.
        figure = Figure((WIDE if wide else WIDTH, height), layout="constrained")
        axes = figure.subplots(panels, 1, sharex=True)
        yield axes
        out = io.StringIO()
        # None of matplotlib's metadata: with the date in it, two reports of a run would differ.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    svg = Markup(inline(out.getvalue(), name, alt))
    found.append(Drawing(name, caption, alt, svg, wide))


def inline(svg: str, name: str, alt: str) -> str:
    """Turn an SVG file of matplotlib's into an element of a page.

    Args:
        svg: the file's text.
        name: prefix of its ids, so that those of two figures differ.
        alt: its label.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    # The prefix is declared in the opening tag that is replaced below, and HTML needs none.
    svg = svg.replace("xlink:href=", "href=")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{escape(alt)}">'
    # A function, since backslashes in a replacement's text are taken for references to groups.
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
    # "font: 10.5px 'DejaVu Sans', ..." lists many fonts; the page has its own list.
    svg = re.sub(r"(font: [^;\"]*?[\d.]+px) '[^;\"]*", r"\1 var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def whole_epochs(axes: Axes) -> None:
    """Put ticks of the horizontal axis at whole epochs only, and name it."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("epoch")


def curve(axes: Axes, x: Any, y: Any, label: str | None, number: int, **more: Any) -> None:
    """Draw a line, with its points marked where there are few of them."""
    marker = "o" if len(x) <= 15 else None
    sns.lineplot(
        x=np.asarray(x), y=np.asarray(y, float), ax=axes, label=label, errorbar=None,
        color=SERIES[number % len(SERIES)], linestyle=DASHES[number % len(DASHES)],
        marker=marker, markeredgewidth=0, **more,
    )  # fmt: skip


def legend(axes: Axes, columns: int = 2) -> None:
    """Put the legend above the axes, where it hides no line."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2,
        handlelength=2.4, columnspacing=1.4,
    )  # fmt: skip


def limits(axes: Axes, epochs: Any) -> None:
    """Fit the horizontal axis to the epochs, with room for the point of a single one."""
    first, last = min(epochs), max(epochs)
    pad = max((last - first) * 0.03, 0.3 if last - first < 3 else 0)
    axes.set_xlim(first - pad, last + pad)
