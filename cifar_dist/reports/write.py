"""Reading the directories that a report is of, and writing its file."""

from __future__ import annotations

from collections.abc import Sequence

from cifar_dist.errors import UserError
from cifar_dist.reports.comparison import comparison_page
from cifar_dist.reports.page import Page, render
from cifar_dist.reports.run import run_page
from cifar_dist.reports.search import search_page
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.storage import AnyPath, at, write_atomically

COMPARISON = "comparison.html"


def write_report(
    paths: Sequence[AnyPath],
    output: AnyPath | None = None,
    data_dir: str | None = None,
    measure: bool = True,
) -> AnyPath:
    """Write the page of a run or a search, or one that compares runs.

    Args:
        paths: directories: of a run, of a search, or of several runs.
        output: the page's file; else ``report.html`` in the directory, and of a comparison
            ``comparison.html`` here.
        data_dir: where a run's images are, if not where they were.
        measure: see `run_page`.

    Returns:
        The file.

    Raises:
        UserError: a path is neither a run nor a search, or a search is to be compared.
        RunFailed: the file cannot be written.
    """
    opened = [_opened(path) for path in paths]
    page: Page
    if len(opened) == 1:
        (only,) = opened
        page = (
            search_page(only)
            if isinstance(only, SearchDirectory)
            else run_page(only, data_dir, measure)
        )
        file = output or only.report_file
    else:
        runs = [each for each in opened if isinstance(each, RunDirectory)]
        for each in opened:
            if isinstance(each, SearchDirectory):
                raise UserError(
                    f"{each.path}: is a search, and only runs are compared; give its trials, e.g. "
                    f"{each.trials_folder}/t0000, or the search alone"
                )
        page = comparison_page(runs)
        file = output or at(COMPARISON)
    # Rendered as a whole before anything is written, so that an error leaves the old report.
    content = render(page)
    write_atomically(file, content)
    return file


def _opened(path: AnyPath) -> RunDirectory | SearchDirectory:
    search = SearchDirectory(path)
    # Asked first: a search has a config.yaml too, and would pass for a run.
    if search.space_file.is_file():
        return search
    if search.config_file.is_file():
        return RunDirectory(path)
    problem = "is neither a run nor a search" if path.exists() else "there is no such run"
    raise UserError(f"{path}: {problem}; give the directory of one, e.g. runs/first")
