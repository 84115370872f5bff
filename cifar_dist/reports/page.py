"""What a report's page is made of, and the page as one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from cifar_dist import __version__
from cifar_dist.reports.figures import Drawing


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    key: str = ""
    """What it is sorted by; a number where it is one, empty behind all others."""
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table; its first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False
    emphasised: frozenset[int] = frozenset()
    """Rows, from 0, that stand out."""
    faded: frozenset[int] = frozenset()

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, which stand on the right."""
        cells = [row[column] for row in self.rows]
        return any(cell.number for cell in cells) and all(c.number or not c.text for c in cells)


@dataclass(frozen=True)
class Picture:
    """An image of the data set that was answered wrongly."""

    source: str
    """A ``data:`` address."""
    label: str
    answer: str
    confidence: float


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    notes: Sequence[str] = ()
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    subtitle: str
    status: str = ""
    facts: Sequence[tuple[str, str, str]] = ()
    """Figures at the top: what, the value, and what belongs to it."""
    sections: Sequence[Section] = field(default_factory=tuple)


def render(page: Page) -> bytes:
    """The page as an HTML file."""
    folder = resources.files("cifar_dist.reports")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((folder / "page.html.jinja").read_text("utf-8"))
    script = (folder / "sort.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = template.render(
        page=page,
        style=Markup((folder / "page.css").read_text("utf-8")),
        script=Markup(script) if any(t.sortable for s in page.sections for t in s.tables) else "",
        script_digest=digest,
        version=__version__,
    )
    return text.encode()


def cell(value: Any) -> Cell:
    """A cell of any plain value, sorted as what it is."""
    if value is None or value != value:  # not a number: nothing there
        return Cell("")
    if isinstance(value, bool | np.bool_):
        return Cell("yes" if value else "no", str(int(value)))
    if isinstance(value, int | float | np.integer | np.floating):
        return Cell(plain(value), repr(float(value)), number=True)
    return Cell(str(value), str(value).lower())


def plain(value: Any) -> str:
    """A value in few digits."""
    if value is None:
        return "none"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}" if abs(int(value)) >= 10_000 else str(value)
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if math.isfinite(value) else str(float(value))
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return str(value)


def in_time(seconds: float) -> str:
    """Seconds as ``3:05`` or ``1:02:03``."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


def share(value: Any) -> str:
    """An accuracy; a dash where there is none."""
    return "–" if value is None else f"{value:.4f}"  # noqa: RUF001


def names_and_values(
    caption: str, values: Mapping[str, Any], ordinary: Mapping[str, Any] | None = None
) -> Table:
    """A table of two columns; what differs from the ordinary values stands out."""
    rows = [
        (Cell(name), Cell(str(value) if type(value) is int else plain(value)))
        for name, value in values.items()
    ]
    unlike = frozenset(
        number
        for number, (name, value) in enumerate(values.items())
        if ordinary is not None and ordinary.get(name) != value
    )
    return Table(caption, ("", ""), rows, emphasised=unlike)


def as_picture(image: NDArray[np.uint8], label: str, answer: str, confidence: float) -> Picture:
    """``[3, H, W]`` bytes as a picture of the page."""
    from PIL import Image

    file = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, label, answer, confidence)
