"""A search at the terminal: a live table, or a plain line a trial."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from cifar_dist.events import Event, SearchPlan, TrialUpdated, Waiting, Warned
from cifar_dist.search.asha import comparable
from cifar_dist.terminal.hints import put
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
    """Listener that draws a search: on a terminal in a live table, elsewhere a line a trial."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._live: Live | None = None
        self._trials: dict[str, TrialUpdated] = {}
        self._plan = SearchPlan(0, 0, 0, "", "max", [])  # until it is known
        self._began = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case SearchPlan():
                self._plan = event
                for text in event.lines:
                    self.line(text)
                if self.stream.isatty():
                    self._open()
            case Warned(message) | Waiting(message):
                self.line(message)
            case TrialUpdated():
                before = self._trials.get(event.trial_id)
                self._trials[event.trial_id] = event
                # A trial is reported again after its end, when its folder is tidied; its line
                # appears once.
                ends = event.status in OVER and (before is None or before.status not in OVER)
                if ends and self._live is None:
                    self.line(self._line(event))

    def line(self, text: str) -> None:
        """Write a line of its own, above the live table if there is one."""
        if self._live is not None:
            # Without `markup=False` Rich would swallow what a message has in brackets.
            self._live.console.print(text, markup=False, highlight=False)
            return
        put(self.stream, f"{text}\n")

    def close(self) -> None:
        """End the live table; it stays where it is, as it was last."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        from rich.console import Console
        from rich.live import Live

        # Rich draws by its own clock, in its own thread: drawing at each event would take the
        # driver's time in a search of many short trials.
        self._live = Live(
            get_renderable=self._table, console=Console(file=self.stream), refresh_per_second=2
        )
        self._live.start()

    @property
    def _over(self) -> int:
        return self._plan.finished + sum(each.status in OVER for each in self._trials.values())

    def _line(self, trial: TrialUpdated) -> str:
        return (
            f"{trial.trial_id}  {trial.status:9}  {_epochs(trial.epochs)}  "
            f"{self._plan.metric} {_number(trial.value)}  {settings_as_text(trial.settings)}  "
            f"{self._over}/{self._plan.trials} trials, {self._elapsed}"
            + (f"  ({trial.error})" if trial.error else "")
        )

    @property
    def _elapsed(self) -> str:
        return duration(time.monotonic() - self._began)

    def _table(self) -> Table:
        """Return the trials that run, and the best of those that are over."""
        from rich.table import Table

        plan, trials = self._plan, list(self._trials.values())
        running = [each for each in trials if each.status == "running"]
        over = [each for each in trials if each.status in OVER and each.value is not None]
        over.sort(key=lambda each: comparable(each.value, plan.mode), reverse=True)
        best = over[:BEST_SHOWN]
        names = list(trials[0].settings) if trials else []
        table = Table(
            title=f"{self._over} of {plan.trials} trials over, {len(running)} running, "
            f"{self._elapsed}",
            title_justify="left",
            box=None,
        )
        for heading in ("trial", "status", "epoch", plan.metric, *names):
            table.add_column(heading, no_wrap=True)
        for trial in running[:RUNNING_SHOWN] + best:
            table.add_row(
                trial.trial_id,
                trial.status,
                f"{trial.epochs}/{plan.max_epochs}",
                _number(trial.value),
                *(_number(trial.settings[name]) for name in names),
                style=None if trial.status == "running" else "dim",
            )
        if (hidden := len(running) - RUNNING_SHOWN) > 0:
            table.caption = f"and {hidden} more that run"
        return table


def ranking(table: pd.DataFrame, metric: str, mode: str) -> list[str]:
    """Return the best trials of a search, a line each under a heading."""
    # Stable, so that of equal trials the one of lowest number leads, as in `TrialTable.best`.
    ran = table[table["epochs"] > 0]
    # NaN comes last in either order; infinite values are to do the same.
    finite = ran[metric].where(ran[metric].abs() != math.inf)
    ranked = ran.loc[finite.sort_values(ascending=mode == "min", kind="stable").index]
    hidden = {"seconds", "reason", "error"}
    shown = ranked.head(RANKED)[[name for name in table.columns if name not in hidden]]
    text: str = shown.to_string(index=False, float_format=_number)
    return text.splitlines() if len(shown) else ["none ended an epoch"]


def settings_as_text(settings: Mapping[str, Any]) -> str:
    """Return settings formatted for display: ``lr 0.00123, gamma 0.5``."""
    return ", ".join(f"{name} {_number(value)}" for name, value in settings.items())


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _epochs(count: int) -> str:
    return f"{count} epoch " if count == 1 else f"{count} epochs"
