"""The parts of a report's page, and the page as one HTML file that loads nothing."""

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
from cifar_dist.reports.drawing import Drawing


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    key: str = ""
    """It is sorted by this; numerically where it is a number; empty sorts last."""
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table; its first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False
    emphasised: frozenset[int] = frozenset()
    """0-based rows that are highlighted."""
    faded: frozenset[int] = frozenset()

    def is_number(self, column: int) -> bool:
        """Return whether a column holds numbers, which are aligned right."""
        cells = [row[column] for row in self.rows]
        return any(cell.number for cell in cells) and all(c.number or not c.text for c in cells)


@dataclass(frozen=True)
class Picture:
    """An image of the data set that was misclassified."""

    source: str
    """A ``data:`` URL."""
    label: str
    predicted: str
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
        """Return its id in the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    subtitle: str
    status: str = ""
    facts: Sequence[tuple[str, str, str]] = ()
    """Figures at the top: name, value, and a remark."""
    sections: Sequence[Section] = field(default_factory=tuple)


def render(page: Page) -> bytes:
    """Return the page as an HTML file."""
    folder = resources.files("cifar_dist.reports")
    environment = jinja2.Environment(
        # Names of runs and classes are a user's text, which may look like markup.
        autoescape=True,
        # A misspelt name in the template is an error, not a gap in the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string((folder / "page.html.jinja").read_text("utf-8"))
    script = (folder / "sort.js").read_text("utf-8")
    # The page's Content-Security-Policy admits the script of this digest and no other, so that text
    # from a run cannot run as code.
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
    """Return a cell of any plain value, sorted by its type."""
    if value is None or value != value:  # NaN: the table has no value there
        return Cell("")
    if isinstance(value, bool | np.bool_):
        return Cell("yes" if value else "no", str(int(value)))
    if isinstance(value, int | float | np.integer | np.floating):
        # Sorted by all digits: values that look alike in four would be a tie.
        return Cell(plain(value), repr(float(value)), number=True)
    return Cell(str(value), str(value).lower())


def plain(value: Any) -> str:
    """Format a value with few digits."""
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
    """Format seconds as ``3:05`` or ``1:02:03``."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


def share(value: Any) -> str:
    """Format an accuracy; a dash where there is none."""
    return "–" if value is None else f"{value:.4f}"  # noqa: RUF001


def names_and_values(
    caption: str, values: Mapping[str, Any], ordinary: Mapping[str, Any] | None = None
) -> Table:
    """Return a table of two columns, with values that differ from ``ordinary`` highlighted."""
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


def as_picture(image: NDArray[np.uint8], label: str, predicted: str, confidence: float) -> Picture:
    """Return ``[3, H, W]`` bytes as a picture of the page."""
    from PIL import Image

    file = io.BytesIO()
    # Pillow takes a grey image without an axis for channels.
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, label, predicted, confidence)
