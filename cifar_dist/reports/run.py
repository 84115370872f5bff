"""A run's page."""

from __future__ import annotations

import json
import shlex
from typing import Any

import numpy as np
import pandas as pd

from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.inference.predictions import Predictions, confidences
from cifar_dist.reports import figures
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

SPLITS = {"test": "test images", "val": "validation images"}


def run_page(run: RunDirectory, data_dir: str | None = None, measure: bool = True) -> Page:
    """All that is known of a run.

    Args:
        run: its directory.
        data_dir: where its images are, if not where they were.
        measure: whether to put the images through the network where the run has not kept its
            answers to them; loads torch.

    Raises:
        UserError: there is no such run, or its settings cannot be read.
    """
    config = run.read_config()
    history = history_of(run)
    summary = run.read_summary()
    environment = environment_of(run)
    answers, missing = _answers(run, config, summary, data_dir, measure)
    status = str(summary.get("status", "not ended"))
    data = environment.get("dataset_fingerprint")
    about = f"ResNet-18 on {config.dataset}" + (f", data {data[:12]}" if data else "")
    return Page(
        title=run.name,
        subtitle=f"Run: {about}",
        status=status,
        facts=_facts(config, history, summary),
        sections=[
            _learning(history, summary, config),
            *([_confusion(answers), _mistakes(answers)] if answers else []),
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
    best: pd.Series[Any] = history.loc[history["val_accuracy"].idxmax()]
    return best


def environment_of(run: RunDirectory) -> dict[str, Any]:
    """``environment.json``; empty before it is there."""
    if not run.environment_file.is_file():
        return {}
    found: dict[str, Any] = json.loads(run.environment_file.read_text())
    return found


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
        speed = history["images_per_second"].median()
        facts.append(("Throughput", f"{speed:,.0f}", "images/s, median epoch"))
    facts.append(("Epochs", f"{len(history)} of {config.max_epochs}", ""))
    if summary:
        facts.append(("Restarts", str(summary["restarts"]), "after failures, last command"))
        facts.append(("Time", in_time(summary["seconds"]), "last command"))
    return facts


def _learning(history: pd.DataFrame, summary: dict[str, Any], config: TrainConfig) -> Section:
    if history.empty:
        return Section("Learning", ["No epoch is over yet."])
    notes = ["Training accuracy and loss are of augmented images, while the weights change."]
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
    return Section("Learning", notes, figures.learning_curves(history, best_epoch))


def _throughput(history: pd.DataFrame, summary: dict[str, Any]) -> Section:
    if history.empty:
        return Section(_PACE, ["No epoch is over yet."])
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
            "last command. When they were is not recorded; an epoch that was gone on with from a "
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
        figures.throughput(history) if recorded(history, "images_per_second", "world_size") else []
    )
    if recorded(history, "lr"):
        drawn += figures.learning_rate(history)
    return Section(_PACE, notes, drawn)


_PACE = "Throughput, restarts, learning rate"


def _settings(config: TrainConfig, environment: dict[str, Any]) -> Section:
    ordinary = TrainConfig(dataset=config.dataset).to_dict()
    notes = ["What differs from the default is bold."]
    tables = [names_and_values("Settings", config.to_dict(), ordinary)]
    if environment:
        tables.append(names_and_values("Environment", environment))
    else:
        notes.append("The run has not got so far as to write down its environment.")
    return Section("Settings and environment", notes, tables=tables)


def _confusion(answers: Predictions) -> Section:
    from cifar_dist.inference.scores import confusion, per_class

    counts = confusion(answers.labels, answers.answers, len(answers.classes))
    frame = per_class(answers.labels, answers.answers, answers.classes)
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
    right = int((answers.answers == answers.labels).sum())
    note = (
        f"{right:,} of {len(answers.labels):,} {SPLITS[answers.split]} were answered rightly, by "
        f"the weights of epoch {answers.epoch}."
    )
    if answers.split == "val":
        note += " The test images are left alone until the last epoch is over."
    return Section(
        "Classes",
        [note],
        figures.confusion(counts, answers.classes),
        [Table("Precision, recall and F1 by class", columns, rows, sortable=True)],
    )


def _mistakes(answers: Predictions) -> Section:
    wrong = int((answers.answers != answers.labels).sum())
    if not len(answers.mistakes):
        return Section("Most confident mistakes", ["Every image was answered rightly."])
    logits = answers.logits[answers.mistakes]
    pictures = [
        as_picture(picture, answers.classes[label], answers.classes[answer], float(sure))
        for picture, label, answer, sure in zip(
            answers.pictures,
            answers.labels[answers.mistakes],
            logits.argmax(axis=1),
            confidences(logits),
            strict=True,
        )
    ]
    note = (
        f"The {len(pictures)} of {wrong:,} wrongly answered {SPLITS[answers.split]} whose answers "
        "were the surest: answer, confidence, and the label below."
    )
    return Section("Most confident mistakes", [note], pictures=pictures)


def _answers(
    run: RunDirectory,
    config: TrainConfig,
    summary: dict[str, Any],
    data_dir: str | None,
    measure: bool,
) -> tuple[Predictions | None, str]:
    """The answers that the run has kept, else found now; or why there are none."""
    if run.predictions_file.is_file():
        try:
            return Predictions.from_bytes(run.predictions_file.read_bytes()), ""
        except ValueError as error:
            return None, f"{run.predictions_file.name} {error}."
    if not run.model_file.is_file():
        return None, "There are no weights to measure: no model.safetensors in the run's directory."
    if not measure:
        again = f"python -m cifar_dist.report {shlex.quote(str(run.path))}"
        return None, f"Classes and mistakes are not measured yet; {again} does."
    try:
        return _measured(run, config, summary, data_dir), ""
    except UserError as error:
        return None, f"Classes and mistakes cannot be measured here. {error}"


def _measured(
    run: RunDirectory, config: TrainConfig, summary: dict[str, Any], data_dir: str | None
) -> Predictions:
    """The best epoch's weights on test images; on validation images while the run is not over.

    Raises:
        UserError: the images are not at hand, or the weights do not fit.
    """
    from cifar_dist.data.cache import find_same

    fingerprint = run.started_with_fingerprint()
    if fingerprint is None:
        raise UserError("environment.json does not say what data it was trained on.")
    dataset = find_same(config.dataset, data_dir or str(config.data_dir), fingerprint)

    # Behind what may be missing: these load torch.
    from cifar_dist.data.datamodule import Shard
    from cifar_dist.inference.model import load_trained
    from cifar_dist.inference.sharded import shard_logits
    from cifar_dist.model.resnet import read_weights
    from cifar_dist.model.seeding import set_seed

    here = config.replace(
        use_gpu=False, gpus_per_worker=None, num_workers=0,
        precision="32" if config.precision == "16-mixed" else config.precision,
    )  # fmt: skip
    where = str(run.model_file)
    set_seed(here.seed, here.deterministic, here.tf32)
    model = load_trained(where, read_weights(where), here, dataset.about)
    split = "val" if summary.get("test_accuracy") is None else "test"
    logits = shard_logits(model, dataset, split, 500, Shard(0, 1))
    images, members = dataset.part(split)
    best = summary.get("best_epoch")
    if best is None:
        row = best_row(history_of(run))
        best = 0 if row is None else row["epoch"]
    labels = np.asarray(images.labels[members])
    return Predictions.of(
        "val" if split == "val" else "test", int(best), dataset.classes, logits, labels,
        images.images, members,
    )  # fmt: skip
