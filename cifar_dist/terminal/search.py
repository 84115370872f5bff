"""What the person at the terminal sees of a search: a live table, or a plain line a trial."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from cifar_dist.events import Event
from cifar_dist.terminal.run import duration

if TYPE_CHECKING:
    import pandas as pd
    from rich.live import Live
    from rich.table import Table

BEST_SHOWN = 5
"""Trials that are over and stand in the live table: the best ones."""
RUNNING_SHOWN = 12
RANKED = 10
"""Trials in the ranking at the end."""
OVER = ("completed", "stopped", "failed")


class SearchDisplay:
    """Draws a search's events: on a terminal in a live table, elsewhere a line a trial."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._live: Live | None = None
        self._trials: dict[str, Event] = {}
        self._plan: Event = {}
        self._began = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event["kind"] == "plan":
            self._plan = event
            for text in event["lines"]:
                self.line(text)
            if self.stream.isatty():
                self._open()
            return
        if event["kind"] in ("waiting", "warning"):
            self.line(event["message"])
            return
        before = self._trials.get(event["trial_id"], {}).get("status")
        self._trials[event["trial_id"]] = event
        if self._live is None and event["status"] in OVER and before not in OVER:
            self.line(self._line(event))

    def line(self, text: str) -> None:
        """A line of its own, above the live table if there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
            return
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def close(self) -> None:
        """End the live table; it stays where it is, as it was last."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            get_renderable=self._table, console=Console(file=self.stream), refresh_per_second=2
        )
        self._live.start()

    @property
    def _over(self) -> int:
        ended = sum(event["status"] in OVER for event in self._trials.values())
        return int(self._plan["finished"]) + ended

    def _line(self, event: Event) -> str:
        return (
            f"{event['trial_id']}  {event['status']:9}  {_epochs(event['epochs'])}  "
            f"{self._plan['metric']} {_number(event['value'])}  {in_words(event['settings'])}  "
            f"{self._over}/{self._plan['trials']} trials, {self._elapsed}"
            + (f"  ({event['error']})" if event["error"] else "")
        )

    @property
    def _elapsed(self) -> str:
        return duration(time.monotonic() - self._began)

    def _table(self) -> Table:
        """Trials that run, and the best of those that are over."""
        from rich.table import Table

        events = list(self._trials.values())
        running = [event for event in events if event["status"] == "running"]
        over = [event for event in events if event["status"] in OVER and event["epochs"]]
        over.sort(key=lambda event: event["value"], reverse=self._plan["mode"] == "max")
        names = list(events[0]["settings"]) if events else []
        table = Table(
            title=f"{self._over} of {self._plan['trials']} trials over, {len(running)} running, "
            f"{self._elapsed}",
            title_justify="left",
            box=None,
        )
        for heading in ("trial", "status", "epoch", self._plan["metric"], *names):
            table.add_column(heading, no_wrap=True)
        for event in running[:RUNNING_SHOWN] + over[:BEST_SHOWN]:
            table.add_row(
                event["trial_id"],
                event["status"],
                f"{event['epochs']}/{self._plan['max_epochs']}",
                _number(event["value"]),
                *(_number(event["settings"][name]) for name in names),
                style=None if event["status"] == "running" else "dim",
            )
        if (hidden := len(running) - RUNNING_SHOWN) > 0:
            table.caption = f"and {hidden} more that run"
        return table


def ranking(table: pd.DataFrame, metric: str, mode: str) -> list[str]:
    """The best trials of a search, a line each under a heading."""
    ranked = table[table["epochs"] > 0].sort_values(metric, ascending=mode == "min", kind="stable")
    hidden = {"seconds", "reason", "error"}
    shown = ranked.head(RANKED)[[name for name in table.columns if name not in hidden]]
    text: str = shown.to_string(index=False, float_format=_number)
    return text.splitlines() if len(shown) else ["none ended an epoch"]


def in_words(settings: Mapping[str, Any]) -> str:
    """``lr 0.00123, gamma 0.5``."""
    return ", ".join(f"{name} {_number(value)}" for name, value in settings.items())


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _epochs(count: int) -> str:
    return f"{count} epoch " if count == 1 else f"{count} epochs"
