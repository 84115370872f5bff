"""A run's page."""

from __future__ import annotations

import shlex
from typing import Any, Literal

import pandas as pd

from cifar_dist.config.model import EvaluateConfig, ModelConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.inference.lookup import trained_config
from cifar_dist.inference.predictions import Predictions, confidences
from cifar_dist.reports import run_figures
from cifar_dist.reports.page import (
    Cell,
    Page,
    Section,
    Table,
    as_picture,
    cell,
    in_time,
    names_and_values,
    share,
)
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS

BATCH_SIZE = EvaluateConfig.batch_size
SPLITS = {"test": "test images", "val": "validation images"}


def run_page(run: RunDirectory, data_dir: str | None = None, measure: bool = True) -> Page:
    """Return the page of a run: all that its directory holds.

    Args:
        run: its directory.
        data_dir: where its images are, if not where they were.
        measure: whether to compute predictions where the run has not kept them; loads torch.

    Raises:
        UserError: there is no such run, or its settings cannot be read.
    """
    config = run.read_config()
    history = history_of(run)
    summary = run.read_summary()
    environment = run.read_environment()
    predictions, missing = _predictions(run, config, summary, data_dir, measure)
    status = str(summary.get("status", "not ended"))
    data = environment.get("dataset_fingerprint")
    about = f"{config.network} on {config.dataset}" + (f", data {data[:12]}" if data else "")
    return Page(
        title=run.name,
        subtitle=f"Run: {about}",
        status=status,
        facts=_facts(config, history, summary),
        sections=[
            _learning(history, summary, config),
            *([_confusion(predictions), _mistakes(predictions)] if predictions else []),
            *([Section("Predictions", [missing])] if missing else []),
            _throughput(history, summary),
            _settings(config, environment),
        ],
    )


def history_of(run: RunDirectory) -> pd.DataFrame:
    """Read ``metrics.csv`` as a frame, with NaN for what the run's version did not record.

    It is empty before the first epoch's end.
    """
    return pd.DataFrame(run.read_metrics()).apply(pd.to_numeric)


def recorded(history: pd.DataFrame, *names: str) -> bool:
    """Return whether each of these columns has a value."""
    return all(name in history and history[name].notna().any() for name in names)


def best_row(history: pd.DataFrame) -> pd.Series[Any] | None:
    """Return the row of the best epoch; None where no validation accuracy is known."""
    if not recorded(history, "val_accuracy"):
        return None
    # idxmax takes the first of equals, as `MetricsHistory` keeps the earliest.
    best: pd.Series[Any] = history.loc[history["val_accuracy"].idxmax()]
    return best


def _facts(
    config: TrainConfig, history: pd.DataFrame, summary: dict[str, Any]
) -> list[tuple[str, str, str]]:
    facts = []
    if summary.get("test_accuracy") is not None:
        facts.append(
            ("Test accuracy", share(summary["test_accuracy"]), f"loss {summary['test_loss']:.4f}")
        )
    if (best := best_row(history)) is not None:
        facts.append(
            ("Validation accuracy", share(best["val_accuracy"]), f"epoch {best['epoch']:.0f}")
        )
    if recorded(history, "images_per_second"):
        # The median: a process's first epoch, and one that was resumed, are slower than the others.
        speed = history["images_per_second"].median()
        facts.append(("Throughput", f"{speed:,.0f}", "images/s, median epoch"))
    facts.append(("Epochs", f"{len(history)} of {config.max_epochs}", ""))
    if summary:
        facts.append(("Restarts", str(summary["restarts"]), "after failures, last command"))
        facts.append(("Time", in_time(summary["seconds"]), "last command"))
    return facts


def _learning(history: pd.DataFrame, summary: dict[str, Any], config: TrainConfig) -> Section:
    if history.empty:
        return Section("Learning", ["No epoch has finished yet."])
    notes = ["Training accuracy and loss are over augmented images, while the weights change."]
    if summary.get("status") != "completed":
        notes.append(
            f"The run has not reached its last epoch: {len(history)} of {config.max_epochs} epochs "
            "so far."
        )
    if skipped := summary.get("skipped_updates"):
        notes.append(
            f"{skipped} updates were skipped because their loss or a gradient was not finite."
        )
    if missing := [name for name in METRICS if not recorded(history, name)]:
        notes.append(f"Without values in metrics.csv: {', '.join(missing)}.")
    best = best_row(history)
    best_epoch = None if best is None else int(best["epoch"])
    return Section("Learning", notes, run_figures.learning_curves(history, best_epoch))


def _throughput(history: pd.DataFrame, summary: dict[str, Any]) -> Section:
    if history.empty:
        return Section(_PACE, ["No epoch has finished yet."])
    workers, before = history["world_size"], history["world_size"].shift()
    changed = history[workers.ne(before) & workers.notna() & before.notna()]
    notes = [
        f"Epoch {row.epoch} ended with {row.world_size:.0f} workers, the one before with "
        f"{before[row.Index]:.0f}."
        for row in changed.itertuples()
    ]
    if summary:
        count = summary["restarts"]
        notes.append(
            f"{count} {'restart' if count == 1 else 'restarts'} of workers after failures in the "
            "last command. When they happened is not recorded; an epoch that was resumed from a "
            "checkpoint shows as a slow one."
            if count
            else "No restarts of workers in the last command."
        )
    if recorded(history, "seconds"):
        longest = history.loc[history["seconds"].idxmax()]
        median = in_time(history["seconds"].median())
        notes.append(
            f"Epochs took {median} in the median, with their validation; the longest, epoch "
            f"{longest['epoch']:.0f}, {in_time(longest['seconds'])}."
        )
    drawn = (
        run_figures.throughput(history)
        if recorded(history, "images_per_second", "world_size")
        else []
    )
    if recorded(history, "lr"):
        drawn += run_figures.learning_rate(history)
    return Section(_PACE, notes, drawn)


_PACE = "Throughput, restarts, learning rate"


def _settings(config: TrainConfig, environment: dict[str, Any]) -> Section:
    # On the same data set, from which some defaults follow that nobody has chosen.
    ordinary = TrainConfig(dataset=config.dataset).to_dict()
    notes = ["Settings that differ from the default are bold."]
    tables = [names_and_values("Settings", config.to_dict(), ordinary)]
    if environment:
        tables.append(names_and_values("Environment", environment))
    else:
        notes.append("The run ended before its environment was written.")
    return Section("Settings and environment", notes, tables=tables)


def _confusion(predictions: Predictions) -> Section:
    from cifar_dist.inference.scores import MATRIX_CLASSES, confusion, per_class

    labels, predicted, classes = predictions.labels, predictions.predicted, predictions.classes
    frame = per_class(labels, predicted, classes)
    columns = ("class", "images", "precision", "recall", "F1")
    rows = [
        (
            cell(row["class"]),
            cell(int(row["images"])),
            *(
                Cell(share(row[name]), repr(float(row[name])), number=True)
                for name in ("precision", "recall", "f1")
            ),
        )
        for row in frame.to_dict("records")
    ]
    note = (
        f"{predictions.correct:,} of {len(labels):,} {SPLITS[predictions.split]} were classified "
        f"correctly, by the weights of epoch {predictions.epoch}."
    )
    if predictions.split == "val":
        note += " The test images are not used until the last epoch has finished."
    drawn = []
    if len(classes) <= MATRIX_CLASSES:
        drawn = run_figures.confusion(confusion(labels, predicted, len(classes)), classes)
    return Section(
        "Classes",
        [note],
        drawn,
        [Table("Precision, recall and F1 by class", columns, rows, sortable=True)],
    )


def _mistakes(predictions: Predictions) -> Section:
    classes, mistakes = predictions.classes, predictions.mistakes
    if not len(mistakes):
        return Section("Most confident mistakes", ["Every image was classified correctly."])
    logits = predictions.logits[mistakes]
    pictures = [
        as_picture(picture, classes[label], classes[predicted], float(confidence))
        for picture, label, predicted, confidence in zip(
            predictions.pictures,
            predictions.labels[mistakes],
            logits.argmax(axis=1),
            confidences(logits),
            strict=True,
        )
    ]
    wrong = len(predictions.labels) - predictions.correct
    note = (
        f"The {len(pictures)} of {wrong:,} misclassified {SPLITS[predictions.split]} with the "
        "highest confidence: prediction, confidence, and the label below."
    )
    return Section("Most confident mistakes", [note], pictures=pictures)


def _predictions(
    run: RunDirectory,
    config: TrainConfig,
    summary: dict[str, Any],
    data_dir: str | None,
    measure: bool,
) -> tuple[Predictions | None, str]:
    """Return the predictions that the run has kept, else new ones; or why there are none."""
    if (kept := run.find_predictions()) is not None:
        try:
            return Predictions.from_bytes(kept.read_bytes()), ""
        except ValueError as error:
            return None, f"{kept.name} {error}."
    if not run.model_file.is_file():
        return None, "There are no weights to evaluate: the run has no model.safetensors."
    if not measure:
        again = f"python -m cifar_dist.report {shlex.quote(str(run.path))}"
        return None, f"Classes and mistakes have not been evaluated yet; {again} evaluates them."
    try:
        return _computed(run, config, summary, data_dir), ""
    except UserError as error:
        return None, f"Classes and mistakes cannot be evaluated here. {error}"


def _computed(
    run: RunDirectory, config: TrainConfig, summary: dict[str, Any], data_dir: str | None
) -> Predictions:
    """Compute the best epoch's predictions, for validation images while the run has not ended.

    Raises:
        UserError: the images are not on this machine, or the weights do not fit.
    """
    from cifar_dist.data.cache import find_same

    fingerprint = run.started_with_fingerprint()
    if fingerprint is None:
        raise UserError("environment.json does not say which data it was trained on.")
    dataset = find_same(config.dataset, data_dir or str(config.data_dir), fingerprint)

    # Imported after the data is found: these load torch.
    from cifar_dist.inference.sharded import split_logits
    from cifar_dist.model.weights import read_weights

    # On the CPU: a report may be drawn on a machine that has none of the run's GPUs.
    here = trained_config(ModelConfig(model=str(run.path)), use_gpu=False, num_workers=0)
    where = str(run.model_file)
    # Test images are measured once, at a run's end: to look earlier would be to choose by them.
    split: Literal["test", "val"] = "val" if summary.get("test_accuracy") is None else "test"
    logits = split_logits(where, read_weights(where), here, dataset, split, BATCH_SIZE)
    best = summary.get("best_epoch")
    if best is None:
        row = best_row(history_of(run))
        best = 0 if row is None else row["epoch"]
    return Predictions.of_split(dataset, split, int(best), logits)
