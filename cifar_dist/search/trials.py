"""The record of a search: each trial's epochs, which trials were stopped, and the tables of it.

Only the trials' settings and results decide what counts: epochs that a trial ran beyond the rung at
which it was stopped are omitted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import TuneConfig
from cifar_dist.events import TrialUpdated
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS
from cifar_dist.search.asha import Cut, InOrder, comparable
from cifar_dist.search.directory import SearchDirectory, trial_id
from cifar_dist.search.space import Space
from cifar_dist.storage import write_atomically

Status = Literal["completed", "stopped", "failed", "unfinished"]


@dataclass
class Trial:
    """The record of a trial."""

    number: int
    """From 0, in the order in which trials start."""
    drawn: Mapping[str, Any]
    """Its values of the searched settings."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """A row of `METRICS` an epoch, as trained: also beyond a rung where it was stopped later."""
    started: bool = False
    ended: bool = False
    """Whether it reached its last epoch or failed."""
    error: str | None = None
    """Why it failed."""


class TrialTable:
    """All trials of a search. Safe to use from several threads.

    Args:
        config: the search's settings.
        space: what is searched.
        drawn: each trial's values, by number; with Optuna those suggested so far.
    """

    def __init__(
        self, config: TuneConfig, space: Space, drawn: Mapping[int, Mapping[str, Any]]
    ) -> None:
        self.config = config
        self.space = space
        self._trials = {number: Trial(number, values) for number, values in drawn.items()}
        self._asha = (
            InOrder(
                config.grace_period, config.reduction_factor, config.train.max_epochs, config.mode
            )
            if config.scheduler == "asha"
            else None
        )
        # Tune's thread adds rows while the driver's thread writes the tables; reentrant, since the
        # methods below call each other.
        self._lock = threading.RLock()

    def add_trial(self, number: int, drawn: Mapping[str, Any]) -> None:
        """Take up a trial that was suggested while the search ran."""
        with self._lock:
            self._trials.setdefault(number, Trial(number, drawn))

    def numbers(self) -> list[int]:
        """Return the numbers of the trials that are known, ascending."""
        with self._lock:
            return sorted(self._trials)

    def drawn(self, number: int) -> Mapping[str, Any] | None:
        """Return a trial's values of the searched settings; None if it is not suggested yet."""
        with self._lock:
            return self._trials[number].drawn if number in self._trials else None

    def trial_config(self, drawn: Mapping[str, Any]) -> TrainConfig:
        """Return the config of a trial.

        Raises:
            UserError: no trial could run it.
        """
        return self.space.configured(self.config.trial_base, drawn)

    def load(self, directory: SearchDirectory) -> None:
        """Take up what trials left on disk, of a search that is resumed."""
        with self._lock:
            for number, trial in self._trials.items():
                run = directory.trial(number)
                summary = run.read_summary()
                if summary.get("status") == "failed" and self.config.retry_failed:
                    continue  # as if it had not been started
                # Rows before the end: a trial that has ended is taken to reach no further rung, and
                # would be passed over where it was judged.
                self.add_rows_of(number, run)
                trial.started = bool(trial.rows)
                if summary.get("status") in ("completed", "failed"):
                    self.end(number, summary.get("error"))

    def start(self, number: int) -> None:
        """Take note that a trial runs."""
        with self._lock:
            self._trials[number].started = True

    def epochs(self, number: int) -> int:
        """Return how many epochs of a trial are known, those too that do not count."""
        with self._lock:
            return len(self._trials[number].rows)

    def add_rows_of(self, number: int, run: RunDirectory) -> None:
        """Take the rows that a trial has on disk; it may have died before it reported them."""
        with self._lock:
            for row in run.read_metrics():
                # A file that lacks an epoch was changed by somebody; its trial writes it anew.
                if row["epoch"] <= self.epochs(number) + 1:
                    self.add_row(number, row)

    def add_row(self, number: int, row: Mapping[str, Any]) -> None:
        """Take an epoch's row, after those before it.

        One that is known, as after a restart, changes nothing.
        """
        with self._lock:
            rows = self._trials[number].rows
            if row["epoch"] <= len(rows):
                return
            assert row["epoch"] == len(rows) + 1, f"epoch {row['epoch']} after {len(rows)}"
            # A column that did not exist when the trial ran is empty.
            rows.append({name: row.get(name) for name in METRICS})
            if self._asha is not None:
                self._asha.add(number, row["epoch"], row[self.config.metric])

    def end(self, number: int, error: str | None = None) -> None:
        """Take note that a trial reached its last epoch, or failed."""
        with self._lock:
            trial = self._trials[number]
            trial.ended, trial.error = True, error
            if self._asha is not None:
                self._asha.end(number)

    def stopped(self, number: int) -> bool:
        """Return whether a trial is to run no further."""
        return self._cut(number) is not None

    def seconds(self, number: int) -> float:
        """Return the seconds of a trial's epochs, those too that do not count."""
        with self._lock:
            return _seconds(self._trials[number].rows)

    def finished(self, number: int) -> bool:
        """Return whether nothing is left to run of a trial."""
        with self._lock:
            return number in self._trials and self._status(self._trials[number]) != "unfinished"

    def _cut(self, number: int) -> Cut | None:
        with self._lock:
            return None if self._asha is None else self._asha.cuts.get(number)

    def _status(self, trial: Trial) -> Status:
        # Before its end is looked at: a trial may reach its last epoch before those of lower number
        # allow a decision, and is stopped all the same.
        if self._cut(trial.number) is not None:
            return "stopped"
        if trial.ended:
            return "completed" if trial.error is None else "failed"
        return "unfinished"

    def _counted(self, trial: Trial) -> list[dict[str, Any]]:
        """Return a trial's rows up to the rung at which it was stopped."""
        cut = self._cut(trial.number)
        return trial.rows if cut is None else trial.rows[: cut.epoch]

    def _best(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the row of the best epoch, the earliest of equals; empty without rows."""
        return max(rows, key=self._comparable, default={})

    def _comparable(self, row: Mapping[str, Any]) -> float:
        return comparable(row.get(self.config.metric), self.config.mode)

    def row(self, number: int) -> dict[str, Any]:
        """Return a trial's row of the table."""
        with self._lock:
            trial = self._trials[number]
            rows = self._counted(trial)
            best = self._best(rows)
            status = self._status(trial)
            metrics = dict.fromkeys(("val_accuracy", "val_loss", self.config.metric))
            return {
                "trial_id": trial_id(number),
                "status": status,
                **trial.drawn,
                "epochs": len(rows),
                "best_epoch": best.get("epoch"),
                **{name: best.get(name) for name in metrics},
                "seconds": _seconds(rows),
                "reason": self._reason(trial, status),
                "error": trial.error if status == "failed" else None,
            }

    def _reason(self, trial: Trial, status: Status) -> str | None:
        """Return why a trial did not reach its last epoch, formatted for display."""
        if status == "stopped":
            cut = self._cut(trial.number)
            assert cut is not None
            side = "below" if self.config.mode == "max" else "above"
            return (
                f"ASHA: {self.config.metric} {cut.value:.4f} at epoch {cut.epoch} is {side} "
                f"the cut of {cut.cutoff:.4f}"
            )
        if status == "unfinished":
            return "the search ended before" if trial.started else "not started"
        return None

    def event(self, number: int) -> TrialUpdated:
        """Return what a listener is notified of about a trial."""
        with self._lock:
            trial = self._trials[number]
            row = self.row(number)
            status = row["status"]
            running = trial.started and status == "unfinished"
            return TrialUpdated(
                trial_id=row["trial_id"],
                status="running" if running else status,
                settings=dict(trial.drawn),
                epochs=row["epochs"],
                best_epoch=row["best_epoch"],
                value=row[self.config.metric],
                seconds=self.seconds(number),
                reason=row["reason"],
                error=row["error"],
            )

    def table(self) -> pd.DataFrame:
        """Return a row a trial."""
        with self._lock:
            # Named, since a search that was interrupted at once has no row.
            frame = pd.DataFrame(
                [self.row(number) for number in sorted(self._trials)], columns=self._columns()
            )
        # Nullable integers: a trial without an epoch would turn the column into floats.
        frame["best_epoch"] = frame["best_epoch"].astype("Int64")
        for name in {"val_accuracy", "val_loss", self.config.metric}:
            # A column of None alone would have the type object, and in Parquet another one than in
            # a search whose trials have values.
            frame[name] = frame[name].astype("float64")
        for name in self.space.domains:
            frame[name] = _one_type(frame[name])
        for name in ("reason", "error"):
            frame[name] = frame[name].astype("string")
        return frame

    def _columns(self) -> list[str]:
        metrics = dict.fromkeys(("val_accuracy", "val_loss", self.config.metric))
        return ["trial_id", "status", *self.space.domains, "epochs", "best_epoch", *metrics,
                "seconds", "reason", "error"]  # fmt: skip

    def history(self) -> pd.DataFrame:
        """Return a row a trial and epoch: ``trial_id`` and `METRICS`."""
        with self._lock:
            rows = [
                {"trial_id": trial_id(number), **row}
                for number, trial in sorted(self._trials.items())
                for row in self._counted(trial)
            ]
        # Named, so that a search without an epoch has the columns too.
        return pd.DataFrame(rows, columns=["trial_id", *METRICS])

    def best(self) -> int | None:
        """Return the best trial's number: of those completed, else of those that did not fail.

        None where no trial has a finite value: settings that diverged are to be used by nobody.
        """
        with self._lock:
            values = {
                number: self._comparable(self._best(self._counted(trial)))
                for number, trial in sorted(self._trials.items())
                if self._status(trial) != "failed"
            }
            scored = [number for number, value in values.items() if math.isfinite(value)]
            completed = [n for n in scored if self._status(self._trials[n]) == "completed"]
        return max(completed or scored, key=values.__getitem__, default=None)

    def summary(self) -> dict[str, Any]:
        """Return counts of trials and epochs, and the best trial, for ``summary.json``."""
        with self._lock:
            counts = dict.fromkeys(("completed", "stopped", "failed", "unfinished"), 0)
            for trial in self._trials.values():
                counts[self._status(trial)] += 1
            best = self.best()
            best_row = {} if best is None else self.row(best)
            return {
                "dataset": self.config.train.dataset,
                "metric": self.config.metric,
                "trials": len(self._trials),
                **counts,
                "best_trial": best_row.get("trial_id"),
                "val_accuracy": best_row.get("val_accuracy"),
                "val_loss": best_row.get("val_loss"),
                "epochs": sum(len(self._counted(trial)) for trial in self._trials.values()),
                "epochs_run": sum(len(trial.rows) for trial in self._trials.values()),
                "epochs_possible": len(self._trials) * self.config.train.max_epochs,
            }

    def write(self, directory: SearchDirectory) -> pd.DataFrame:
        """Write the tables and ``best.yaml``, and return the table of trials."""
        # `best.yaml` comes last: after a kill it may be one write old, but names a trial that the
        # tables have.
        table, history = self.table(), self.history()
        write_atomically(directory.trials_csv, table.to_csv(index=False).encode())
        write_atomically(directory.trials_parquet, _parquet(table))
        write_atomically(directory.history_file, _parquet(history))
        if (best := self.best()) is not None:
            drawn = self.drawn(best)
            assert drawn is not None
            directory.write_best(self.trial_config(drawn))
        return table


def epochs_saved(table: pd.DataFrame, summary: Mapping[str, Any], max_epochs: int) -> int:
    """Return the epochs that ASHA saved: those that stopped trials did not run.

    Epochs that failed or unfinished trials did not run are no savings.

    Args:
        table: a row a trial.
        summary: the search's.
        max_epochs: of a trial that is not stopped.
    """
    stopped = table[table["status"] == "stopped"]
    beyond: int = (
        summary["epochs_run"] - summary["epochs"]
    )  # run by trials that were stopped before
    return int((max_epochs - stopped["epochs"]).sum()) - beyond


def _seconds(rows: list[dict[str, Any]]) -> float:
    # None in the rows of a version that had no such column.
    return sum(float(row["seconds"] or 0) for row in rows)


def _one_type(column: pd.Series[Any]) -> pd.Series[Any]:
    """Return a column as it is, or as text where its values have types that do not mix."""
    values = [value for value in column if value is not None]
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    # Parquet refuses a column of several types, true and 2 among them.
    if numbers or len({type(value) for value in values}) <= 1:
        return column
    return column.map(lambda value: None if value is None else str(value))


def _parquet(frame: pd.DataFrame) -> bytes:
    content: bytes = frame.to_parquet(index=False)
    return content
