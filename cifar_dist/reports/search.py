"""A search's page."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd

from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import DEFAULT_MAX_EPOCHS, TuneConfig, tune_setting_names
from cifar_dist.errors import UserError, first_line
from cifar_dist.reports import search_figures
from cifar_dist.reports.page import Page, Section, Table, cell, in_time, names_and_values, share
from cifar_dist.reports.search_figures import Setting
from cifar_dist.search.asha import rung_epochs
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import Domain, Space
from cifar_dist.search.trials import epochs_saved
from cifar_dist.storage import AnyPath

FEWEST_TRIALS = 10
"""Trials with results below which no importance is shown."""
TREES = 300
SHUFFLES = 20
"""How often each setting is shuffled."""


def search_page(directory: SearchDirectory) -> Page:
    """Return the page of a search: all that its directory holds.

    Raises:
        UserError: there is no such search, or its settings cannot be read.
    """
    config, space = directory.read_config(), directory.read_space()
    summary = directory.read_summary()
    trials, history = _frame(directory.trials_parquet), _frame(directory.history_file)
    best_trial = summary.get("best_trial")
    # A table that is not written yet has no columns either.
    # A value that is not finite, as of a trial that diverged, has no place on an axis.
    scored = trials[np.isfinite(trials[config.metric].astype(float))] if len(trials) else trials
    settings = [_axis(name, domain, scored) for name, domain in space.domains.items()]
    sections = [_by_epoch(history, trials, config, best_trial)]
    if len(scored):
        against = search_figures.settings_against(settings, scored, config.metric, best_trial)
        lines = search_figures.parallel_coordinates(settings, scored, config.metric, config.mode)
        sections += [
            Section("Settings against " + config.metric, drawings=[*lines, *against]),
            _importance(settings, scored, config),
        ]
    if len(trials):
        sections += [_saved(trials, config, summary), _table(trials, space, config, best_trial)]
    sections.append(_settings(config, space))
    return Page(
        title=directory.name,
        subtitle=f"Search: {', '.join(space.domains)} ({config.search}) on {config.train.dataset}",
        status=str(summary.get("status", "not ended")),
        facts=_facts(summary, config, trials),
        sections=sections,
    )


def _settings(config: TuneConfig, space: Space) -> Section:
    ordinary = _ordinary(config).to_dict()
    own = {name: getattr(config, name) for name in tune_setting_names()}
    shared = {k: v for k, v in config.train.to_dict().items() if k not in space.domains}
    searched = {
        name: f"{each.kind} {', '.join(map(str, each.values))}"
        for name, each in space.domains.items()
    }
    tables = [
        names_and_values("Searched settings", searched),
        names_and_values("Settings of the search", own, ordinary),
        names_and_values("Settings that all trials share", shared, ordinary),
    ]
    return Section("Settings", ["Settings that differ from the default are bold."], tables=tables)


def _ordinary(config: TuneConfig) -> TuneConfig:
    """Return a search on the same data with nothing but defaults."""
    train = TrainConfig(dataset=config.train.dataset, max_epochs=DEFAULT_MAX_EPOCHS)
    return TuneConfig(train=train)


def _frame(file: AnyPath) -> pd.DataFrame:
    """Read a table; empty before it is written."""
    if not file.is_file():
        return pd.DataFrame()
    try:
        return pd.read_parquet(io.BytesIO(file.read_bytes()))
    except ValueError as error:
        raise UserError(
            f"{file}: is damaged ({first_line(error)}); --resume of the search writes it anew"
        ) from None


def _facts(
    summary: dict[str, Any], config: TuneConfig, trials: pd.DataFrame
) -> list[tuple[str, str, str]]:
    if not summary:
        return []
    counts = [
        f"{summary[name]} {name}"
        for name in ("completed", "stopped", "failed", "unfinished")
        if summary.get(name)
    ]
    facts = [("Trials", str(summary["trials"]), ", ".join(counts))]
    if summary["best_trial"] is not None:
        best = summary["best_trial"]
        facts = [
            ("Validation accuracy", share(summary["val_accuracy"]), f"of the best trial, {best}"),
            ("Validation loss", f"{summary['val_loss']:.4f}", f"of {best}"),
            *facts,
        ]
    run, possible = summary["epochs_run"], summary["epochs_possible"]
    if config.scheduler == "asha" and len(trials):
        saved = epochs_saved(trials, summary, config.train.max_epochs)
        facts.append(("Saved by ASHA", f"{saved / possible:.0%}", f"{run} of {possible} epochs"))
    facts.append(("Time", in_time(summary["seconds"]), "last command"))
    return facts


def _by_epoch(
    history: pd.DataFrame, trials: pd.DataFrame, config: TuneConfig, best_trial: str | None
) -> Section:
    if history.empty or trials.empty:
        return Section("Trials by epoch", ["No trial has finished an epoch yet."])
    drawn = search_figures.accuracy_by_epoch(history, trials, config.metric, best_trial)
    return Section("Trials by epoch", drawings=drawn)


def _saved(trials: pd.DataFrame, config: TuneConfig, summary: dict[str, Any]) -> Section:
    most = config.train.max_epochs
    if config.scheduler != "asha":
        return Section("Epochs saved by ASHA", ["Nothing: the search ran without early stopping."])
    notes = []
    if summary:
        run, possible, counted = (
            summary[name] for name in ("epochs_run", "epochs_possible", "epochs")
        )
        notes.append(
            f"ASHA stopped {summary['stopped']} of {summary['trials']} trials: {run} of {possible} "
            f"epochs were run, {epochs_saved(trials, summary, most) / possible:.0%} saved."
        )
        if run > counted:
            notes.append(
                f"{run - counted} of the {run} were run beyond the rung at which their trial was "
                "stopped, and do not count."
            )
    rungs = _rungs(trials, config)
    return Section(
        "Epochs saved by ASHA", notes, search_figures.epochs_of_trials(trials, most), [rungs]
    )


def _rungs(trials: pd.DataFrame, config: TuneConfig) -> Table:
    """Return how many trials reached each rung, and how many were stopped there."""
    rows = []
    most = config.train.max_epochs
    stopped = trials["status"] == "stopped"
    for epoch in rung_epochs(config.grace_period, config.reduction_factor, most):
        came = int((trials["epochs"] >= epoch).sum())
        here = int((stopped & (trials["epochs"] == epoch)).sum())
        rows.append((cell(f"epoch {epoch}"), cell(came), cell(here)))
    rows.append((cell(f"epoch {most}, the last"), cell(int((trials["epochs"] >= most).sum())),
                 cell(int((stopped & (trials["epochs"] >= most)).sum()))))  # fmt: skip
    return Table("Trials by rung", ("rung", "reached it", "stopped there"), rows)


def _table(
    trials: pd.DataFrame, space: Space, config: TuneConfig, best_trial: str | None
) -> Section:
    metrics = dict.fromkeys((config.metric, "val_accuracy", "val_loss"))
    names = ["trial_id", "status", *metrics, *space.domains, "epochs", "best_epoch", "seconds",
             "reason", "error"]  # fmt: skip
    names = [
        name
        for name in names
        if name in trials and (name not in ("reason", "error") or trials[name].notna().any())
    ]
    # Best first; trials without a result come last.
    ordered = trials.sort_values(config.metric, ascending=config.mode == "min", kind="stable")
    rows = [
        # A comparison with pd.NA is neither true nor false, and would raise in `cell`.
        [cell(None if value is pd.NA else value) for value in row]
        for row in ordered[names].itertuples(index=False)
    ]
    status, ids = list(ordered["status"]), list(ordered["trial_id"])
    table = Table(
        "All trials: press a heading to sort by it",
        names,
        rows,
        sortable=True,
        emphasised=frozenset(n for n, each in enumerate(ids) if each == best_trial),
        faded=frozenset(n for n, each in enumerate(status) if each != "completed"),
    )
    note = "The best trial is bold; those that did not reach their last epoch are faded."
    return Section("Table of trials", [note], tables=[table])


def _axis(name: str, domain: Domain, trials: pd.DataFrame) -> Setting:
    """Return a searched setting as an axis; listed values are evenly spaced, in their order."""
    values = trials[name] if name in trials else pd.Series(dtype=float)
    if domain.listed:
        listed = _ordered(domain.values)
        places = values.map(lambda value: _place(value, listed)).astype(float)
        ticks = {float(place): _word(value) for place, value in enumerate(listed)}
        return Setting(name, places, 0.0, float(len(listed) - 1), ticks)
    low, high = (float(value) for value in domain.extremes())
    return Setting(name, values.astype(float), low, high, {}, log=domain.kind == "loguniform")


def _ordered(values: tuple[Any, ...]) -> list[Any]:
    distinct = list(dict.fromkeys(values))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct)
    return sorted(distinct) if numbers else distinct


def _place(value: Any, listed: list[Any]) -> float:
    # Numbers may have become floats in the table, and values of several types text.
    found = (n for n, each in enumerate(listed) if each == value or str(each) == str(value))
    return float(next(found, np.nan))


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _importance(settings: list[Setting], trials: pd.DataFrame, config: TuneConfig) -> Section:
    title = "Importance of each setting"
    if len(trials) < FEWEST_TRIALS:
        return Section(
            title,
            [
                f"{len(trials)} trials have results, too few to estimate importance: it takes "
                f"{FEWEST_TRIALS}, and is reliable only with many more."
            ],
        )
    drops, explained = importance_of(settings, trials[config.metric].to_numpy(float))
    if drops.empty:
        return Section(title, ["All trials have the same settings."])
    notes = [
        f"A random forest of {TREES} trees predicts each trial's best {config.metric} from its "
        "settings; a setting counts by how much worse it predicts these same trials when that "
        "setting is shuffled among them (permutation importance, mean and standard deviation of "
        f"{SHUFFLES} shuffles).",
        _reliability(explained),
        "It shows correlation in these trials, not causation. Stopped trials "
        f"count with the {config.metric} of the few epochs that they ran, so settings that learn "
        "quickly at first look better.",
    ]
    return Section(title, notes, search_figures.importance(drops, config.metric))


def _reliability(explained: float) -> str:
    explains = f"On trials that its trees have not seen the forest explains R² = {explained:.2f}"
    if explained <= 0.1:
        return f"{explains}, next to nothing: do not read anything into the order below."
    if explained < 0.5:
        return f"{explains}, some of the differences: take the order below with care."
    return f"{explains}."


def importance_of(
    settings: list[Setting], values: np.ndarray[Any, Any]
) -> tuple[pd.DataFrame, float]:
    """Compute the permutation importance of each setting that varies, the highest first.

    Returns:
        Columns ``setting``, ``mean_drop`` and ``std_drop`` (of R²); and R² of the forest on
        trials that its trees have not seen.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    varied = [each for each in settings if each.places.nunique() > 1]
    if not varied:
        return pd.DataFrame(columns=["setting", "mean_drop", "std_drop"]), 0.0
    places = np.column_stack([np.log(each.places) if each.log else each.places for each in varied])
    # Its R² is taken on trials out of each tree's sample: on its own sample a forest explains
    # nearly everything, noise too. The seed is fixed, so that a report drawn again says the same.
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(places, values)
    found = permutation_importance(forest, places, values, n_repeats=SHUFFLES, random_state=0)
    drops = pd.DataFrame(
        {
            "setting": [each.name for each in varied],
            "mean_drop": found.importances_mean,
            "std_drop": found.importances_std,
        }
    )
    ordered = drops.sort_values("mean_drop", ascending=False, kind="stable", ignore_index=True)
    return ordered, float(forest.oob_score_)
