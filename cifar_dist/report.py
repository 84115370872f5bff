"""``python -m cifar_dist.report``: draw a run, a search or several runs as an HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cifar_dist.cli import parse_report
from cifar_dist.config.report import ReportConfig
from cifar_dist.exits import run_command
from cifar_dist.storage import AnyPath, StorePath, at
from cifar_dist.terminal.hints import shown


def report(
    paths: Sequence[str | os.PathLike[str] | StorePath],
    output: str | os.PathLike[str] | StorePath | None = None,
    data_dir: str | None = None,
) -> AnyPath:
    """Draw a run, a search, or several runs against each other, as one HTML file.

    Args:
        paths: the directory of a run or a search, or those of several runs.
        output: the file; else ``report.html`` in the directory, or ``comparison.html`` here.
        data_dir: the folder with the run's images, if not where they were. They are only looked
            for where the run has not kept its predictions for them.

    Returns:
        The file.

    Raises:
        UserError: no such run.
        RunFailed: the file cannot be written.
    """
    from cifar_dist.reports.write import write_report

    where = None if output is None else at(output)
    return write_report([at(path) for path in paths], where, data_dir)


def main(words: list[str]) -> None:
    """Parse, draw, and print the file's path."""
    config: ReportConfig = parse_report(words)
    file = report(config.paths, config.output, config.data_dir)
    print(f"report: {shown(file)}")


if __name__ == "__main__":
    run_command(main)
