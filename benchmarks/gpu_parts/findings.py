"""What a part of the GPU campaign has found, in a file that is rewritten at each finding."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Lacking(Exception):
    """The machine has not what a part needs."""


class Findings:
    """What a part has found so far, in a file.

    Args:
        file: where to write; rewritten at each finding.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.skipped = False
        self.reason = ""
        self.rows: list[tuple[str, str]] = []
        self.figures: dict[str, Any] = {}

    def say(self, what: str, value: str, **figures: Any) -> None:
        """Add a row to the table, and figures by name."""
        self.rows = [row for row in self.rows if row[0] != what] + [(what, value)]
        self.figures |= figures
        print(f"{what}: {value}", flush=True)
        self.write()

    def claim(self, what: str, holds: bool, detail: str = "") -> None:
        """Add a row that says whether a promise holds; one that does not fails the part."""
        self.say(what, ("yes" if holds else "**no**") + (f", {detail}" if detail else ""))
        if not holds:
            self.reason = "; ".join(filter(None, [self.reason, f"not so: {what}"]))
            self.write()

    def write(self) -> None:
        """Write all of it, whole."""
        found = {name: getattr(self, name) for name in ("skipped", "reason", "rows", "figures")}
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(found))
        beside.replace(self.file)


@contextlib.contextmanager
def reported(found: Findings) -> Iterator[None]:
    """Turn what a part lacks, or what it raises, into its reason."""
    found.write()
    try:
        yield
    except Lacking as lacking:
        found.skipped, found.reason = True, str(lacking)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        found.reason = "; ".join(filter(None, [found.reason, text[:300]]))
        found.write()
        raise
    finally:
        found.write()
