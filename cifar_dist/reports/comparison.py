"""A page that compares runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cifar_dist.reports import run_figures
from cifar_dist.reports.page import Cell, Page, Section, Table, cell, in_time, plain
from cifar_dist.reports.run import best_row, history_of, recorded
from cifar_dist.runs.directory import RunDirectory

CURVES = {
    "val_accuracy": "Validation accuracy",
    "val_loss": "Validation loss",
    "train_accuracy": "Training accuracy",
    "train_loss": "Training loss",
    "lr": "Learning rate",
    "images_per_second": "Throughput",
}
_ALWAYS_DIFFER = {"name", "resume", "command"}
"""Settings that differ between any two runs."""


def comparison_page(runs: Sequence[RunDirectory]) -> Page:
    """Compare runs: their curves, the settings that differ, and final figures.

    Raises:
        UserError: one of them is not a run, or its settings cannot be read.
    """
    names = _names(runs)
    configs = {name: run.read_config().to_dict() for name, run in zip(names, runs, strict=True)}
    histories = {name: history_of(run) for name, run in zip(names, runs, strict=True)}
    begun = {name: rows for name, rows in histories.items() if len(rows)}
    drawn = [
        drawing
        for metric, caption in CURVES.items()
        if (known := {name: rows for name, rows in begun.items() if recorded(rows, metric)})
        for drawing in run_figures.overlaid(known, metric, caption)
    ]
    notes = [f"{name} has not finished an epoch." for name in names if name not in begun]
    environments = {name: run.read_environment() for name, run in zip(names, runs, strict=True)}
    return Page(
        title=" · ".join(names) if len(names) <= 4 else f"{len(names)} runs",
        subtitle=f"Comparison of {len(names)} runs",
        sections=[
            Section("Figures", tables=[_final(dict(zip(names, runs, strict=True)), histories)]),
            Section("Curves", notes, drawn),
            _differences("Settings that differ", "setting", configs),
            _differences("Environments that differ", "what", environments),
        ],
    )


def _names(runs: Sequence[RunDirectory]) -> list[str]:
    """Return short names, and whole paths of runs that share a name."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.path) for run in runs]


def _final(runs: Mapping[str, RunDirectory], histories: Mapping[str, pd.DataFrame]) -> Table:
    columns = ("run", "status", "test_accuracy", "test_loss", "val_accuracy", "best_epoch",
               "epochs", "images/s (median)", "time", "restarts")  # fmt: skip
    rows = []
    accuracies = []
    for name, run in runs.items():
        summary, history = run.read_summary(), histories[name]
        best = best_row(history)
        measured = recorded(history, "images_per_second")
        speed = history["images_per_second"].median() if measured else None
        seconds = summary.get("seconds")
        rows.append(
            (
                cell(name),
                cell(summary.get("status", "not ended")),
                *(_four(summary.get(which)) for which in ("test_accuracy", "test_loss")),
                _four(None if best is None else best["val_accuracy"]),
                cell(None if best is None else int(best["epoch"])),
                cell(len(history)),
                Cell("" if speed is None else f"{speed:,.0f}", repr(speed or ""), number=True),
                Cell("" if seconds is None else in_time(seconds), repr(seconds or ""), number=True),
                cell(summary.get("restarts")),
            )
        )
        accuracies.append(summary.get("test_accuracy"))
    known = [each for each in accuracies if each is not None]
    best_rows = frozenset(
        number for number, each in enumerate(accuracies) if known and each == max(known)
    )
    return Table("Figures: press a heading to sort by it", columns, rows, True, best_rows)


def _four(value: Any) -> Cell:
    return Cell("") if value is None else Cell(f"{value:.4f}", repr(float(value)), number=True)


def _differences(title: str, what: str, by_run: Mapping[str, Mapping[str, Any]]) -> Section:
    # In the settings' order: a set of names would be in another order in each process.
    keys = list(dict.fromkeys(key for each in by_run.values() for key in each))
    differ = [
        key
        for key in keys
        if key not in _ALWAYS_DIFFER
        and any(each.get(key) != next(iter(by_run.values())).get(key) for each in by_run.values())
    ]
    if not differ:
        return Section(title, ["None: they are the same."])
    rows = [
        (Cell(key), *(Cell(plain(values.get(key))) for values in by_run.values())) for key in differ
    ]
    return Section(title, tables=[Table(title, (what, *by_run), rows)])
