"""A report at the end of a run or a search, which must not fail because of it."""

from __future__ import annotations

from cifar_dist.errors import first_line
from cifar_dist.events import Listener, Warned
from cifar_dist.runs.directory import Directory


def leave_report(directory: Directory, listener: Listener) -> None:
    """Draw a run's or a search's ``report.html``; what goes wrong there is only reported.

    Args:
        directory: of what has ended.
        listener: notified in one line why there is none.
    """
    try:
        from cifar_dist.reports.write import write_report

        # The workers have kept what it takes: nothing is computed here, and no torch loaded.
        write_report([directory.path], measure=False)
    except Exception as error:
        listener(Warned(f"no report.html: {first_line(error)}"))
