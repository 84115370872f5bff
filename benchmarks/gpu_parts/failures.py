"""A plugin for pytest that prints each failure when it happens, not at the end.

A campaign that is cut off has them then.
"""

from __future__ import annotations

from typing import Any

CHARACTERS = 2_000
"""Of a failure's traceback; its end says most."""


def pytest_runtest_logreport(report: Any) -> None:
    """Print a report that says that something failed."""
    if report.failed:
        print(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext[-CHARACTERS:]}", flush=True)
