"""The settings of a report: each with its default and check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from cifar_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw a run, a search, or several runs against each other, as one page for a browser.

    Raises:
        UserError: no path, or a setting that does not apply to several runs.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|SEARCH")]
    """The directory of a run or a search; of several runs, to compare them."""
    output: str | None = None
    """File to write (default: report.html in the directory; comparison.html here for several)."""
    data_dir: str | None = None
    """Folder with the run's images (default: the run's). Only looked for where the run has not kept
    its predictions for them; nothing is downloaded."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("give the directory of a run or a search, e.g. runs/first")
        if len(self.paths) > 1 and self.data_dir is not None:
            raise UserError(
                f"--data-dir {self.data_dir}: runs are compared without their images; omit it"
            )
