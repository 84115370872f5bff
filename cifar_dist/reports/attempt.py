"""The report at the end of a run or a search, which must not fail because of its report."""

from __future__ import annotations

from cifar_dist.errors import first_line
from cifar_dist.events import Listener, Warned
from cifar_dist.runs.directory import Directory


def leave_report(directory: Directory, listener: Listener) -> None:
    """Draw the ``report.html`` of a run or a search; a failure to do so is only a warning.

    Args:
        directory: of a run or search that has ended.
        listener: notified in one line why there is no report.
    """
    try:
        from cifar_dist.reports.write import write_report

        # The workers have kept the predictions: computing them here would load torch.
        write_report([directory.path], measure=False)
    except Exception as error:
        listener(Warned(f"no report.html: {first_line(error)}"))
