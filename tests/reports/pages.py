"""Directories of runs and searches as commands write them, and report pages read back."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import make_tune_config
from cifar_dist.data.datasets.cifar10 import CLASSES
from cifar_dist.inference.predictions import Predictions
from cifar_dist.report import report
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS, Outcome
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import read_space

FINGERPRINT = "ab" * 32


def history(epochs: int, workers: tuple[int, ...] = (2,), lr: float = 1e-3) -> list[dict[str, Any]]:
    rows = []
    for epoch in range(1, epochs + 1):
        values = (epoch, 352 * epoch, 45_000 * epoch, workers[min(epoch, len(workers)) - 1], lr,
                  2 / epoch, 1 - 0.6 / epoch, 2.1 / epoch, 0.9 - 0.5 / epoch, 500.0 + epoch,
                  90.0 + epoch)  # fmt: skip
        rows.append(dict(zip(METRICS, values, strict=True)))
    return rows


def predictions(classes: tuple[str, ...] = CLASSES) -> Predictions:
    """For 60 images: all correct but for three cats predicted as dogs, with rising confidence."""
    labels = np.arange(60, dtype=np.uint8) % 10
    logits = np.zeros((60, 10), np.float32)
    logits[np.arange(60), labels] = 3
    for image, odds in ((3, 4.0), (13, 9.0), (23, 6.0)):
        logits[image, 5] = odds
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32)).astype(np.uint8)
    return Predictions.of("test", 3, classes, logits, labels, images, np.arange(60))


def make_run(
    storage: Path,
    name: str = "run",
    epochs: int = 3,
    status: str = "completed",
    kept: Predictions | None = None,
    workers: tuple[int, ...] = (2,),
    **settings: Any,
) -> RunDirectory:
    config = TrainConfig(storage_path=str(storage), name=name, max_epochs=3, **settings)
    run = RunDirectory.create(config)
    run.write_config(config)
    rows = history(epochs, workers, config.lr)
    run.write_metrics(rows)
    run.write_environment({"python": "3.11.7", "gpus": [], "dataset_fingerprint": FINGERPRINT})
    if kept:
        run.predictions_file.write_bytes(kept.to_bytes())
    done = Outcome(rows, epochs, 57 / 60, 0.25, 60, 0, "c" * 64) if status == "completed" else None
    run.write_summary(config.dataset, status, done, restarts=1, seconds=3700.4)
    return run


def make_search(storage: Path, trials: int = 12, name: str = "search") -> SearchDirectory:
    """Of lr, which decides all, and of flip, which decides nothing."""
    space = storage / f"{name}.yaml"
    space.write_text("lr: {loguniform: [0.0001, 0.01]}\nflip: {choice: [0.0, 0.5]}\n")
    config = make_tune_config(
        {"space": str(space), "storage_path": str(storage), "name": name, "max_epochs": 9,
         "num_samples": trials}
    )  # fmt: skip
    directory = SearchDirectory.create(config, read_space(str(space)))
    rows, epochs = [], []
    for number in range(trials):
        lr = 1e-4 * 100 ** (number / max(trials - 1, 1))
        ran = 9 if number % 3 == 2 else 3 if number % 3 else 1
        accuracy = 0.9 - 0.05 * number
        rows.append(
            {"trial_id": f"t{number:04d}", "status": "completed" if ran == 9 else "stopped",
             "lr": lr, "flip": 0.5 * (number % 2), "epochs": ran, "best_epoch": ran,
             "val_accuracy": accuracy, "val_loss": 1 - accuracy, "seconds": 9.0 * ran,
             "reason": None if ran == 9 else f"ASHA: below the cut at epoch {ran}", "error": None}
        )  # fmt: skip
        epochs += [
            {"trial_id": f"t{number:04d}", **row, "val_accuracy": accuracy * row["epoch"] / ran}
            for row in history(ran)
        ]
    for file, frame in (
        (directory.trials_parquet, pd.DataFrame(rows)),
        (directory.history_file, pd.DataFrame(epochs)),
    ):
        frame.to_parquet(file, index=False)
    counts = Counter(row["status"] for row in rows)
    directory.write_summary(
        {"status": "completed", "dataset": "cifar10", "metric": "val_accuracy", "trials": trials,
         "completed": counts["completed"], "stopped": counts["stopped"], "failed": 0,
         "unfinished": 0, "best_trial": "t0000", "val_accuracy": 0.9, "val_loss": 0.1,
         "epochs": len(epochs), "epochs_run": len(epochs) + 2, "epochs_possible": 9 * trials,
         "seconds": 225.0}
    )  # fmt: skip
    return directory


class Read(HTMLParser):
    """A page's elements, its tables, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(*paths: Any, **options: Any) -> Read:
    return Read(Path(str(report([getattr(path, "path", path) for path in paths], **options))))
