"""A run's directory: the files in it, and reading them back.

Every file is there whole or not at all, on a disk and in an object store.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cifar_dist.config.fields import flag
from cifar_dist.config.train import (
    MAY_CHANGE_ON_RESUME,
    TrainConfig,
    make_config,
    setting_names,
)
from cifar_dist.config.versions import own_settings
from cifar_dist.errors import UserError
from cifar_dist.registry import COLUMNS, SCHEDULES
from cifar_dist.runs.create import new_folder
from cifar_dist.runs.metrics import Outcome, read_rows
from cifar_dist.storage import AnyPath, as_json, at, delete_folder, is_writable, write_atomically

_ASIDE = ".*.tmp"
"""Names of files that `write_atomically` writes aside."""
_CHECKPOINT = re.compile(r"epoch-(\d{4,})(?:-step-(\d{4,}))?\.ckpt")


@dataclass(frozen=True)
class Directory:
    """The common part of a run's directory and a search's: ``<storage-path>/<name>/``."""

    path: AnyPath

    @classmethod
    def at(cls, storage_path: str, name: str) -> Self:
        """Return the directory, whether it exists or not; absolute: workers change directory."""
        return cls(at(storage_path) / name)

    @property
    def name(self) -> str:
        """The name of the run or search."""
        return self.path.name

    @property
    def config_file(self) -> AnyPath:
        """``config.yaml``: every setting."""
        return self.path / "config.yaml"

    @property
    def report_file(self) -> AnyPath:
        """``report.html``: all of it to look at."""
        return self.path / "report.html"

    @property
    def summary_file(self) -> AnyPath:
        """``summary.json``: how it ended."""
        return self.path / "summary.json"

    def read_summary(self) -> dict[str, Any]:
        """Read ``summary.json``; empty before a first command has ended, or where it is damaged."""
        return _read_json(self.summary_file)

    def discard(self) -> bool:
        """Delete the directory of what never began, so that its name is free again.

        Returns:
            Whether it did; what was trained stays as it is.
        """
        # Called while an exception is handled, which an error of a store must not replace.
        with contextlib.suppress(OSError):
            if not self._has_begun():
                delete_folder(self.path)
                return True
        return False

    def _has_begun(self) -> bool:
        """Return whether there is anything that was trained."""
        raise NotImplementedError

    def remove_leftovers(self) -> None:
        """Remove what writers left that were killed; each file may be a whole checkpoint's.

        Only while nobody else writes to the directory.
        """
        if isinstance(self.path, Path):  # a store keeps nothing of an upload that did not end
            for file in [*self.path.glob(_ASIDE), *self.path.glob(f"checkpoints/{_ASIDE}")]:
                # A file that cannot be removed costs its room, and no run.
                with contextlib.suppress(OSError):
                    file.unlink()

    def check_writable(self) -> None:
        """Check that the directory can be written to.

        Raises:
            UserError: it cannot.
        """
        if not is_writable(self.path):
            raise UserError(f"--storage-path {self.path.parent}: cannot be written")


@dataclass(frozen=True)
class RunDirectory(Directory):
    """A run's directory."""

    @classmethod
    def create(cls, config: TrainConfig) -> RunDirectory:
        """Make a new run's directory, with ``config.yaml``; unless it has a name, it gets one from
        dataset and time.

        Raises:
            UserError: the name is taken, or the directory cannot be made.
        """
        content = {"checkpoints": None, "config.yaml": _as_written(config)}
        return cls(new_folder(config.storage_path, config.name, config.dataset, content))

    @classmethod
    def existing(cls, config: TrainConfig) -> RunDirectory:
        """Return the directory of the run that a config with ``resume`` names.

        Raises:
            UserError: there is no such run, it cannot be written, or the config would compute
                something else than the run that was started.
        """
        assert config.name is not None  # checked when the config was made
        run = cls.at(config.storage_path, config.name)
        started = run.read_config()
        for name, before in started.to_dict().items():
            now = getattr(config, name)
            if now != before and name not in MAY_CHANGE_ON_RESUME:
                raise UserError(
                    f"{flag(name)} {now}: the run was started with {before}, which --resume "
                    f"keeps; omit {flag(name)}, or start another run with another --name"
                )
        # The rates of such a schedule depend on the run's length: with another one, steps that are
        # done would have had other rates.
        horizon = SCHEDULES.about(config.schedule).needs_horizon
        if horizon and config.max_epochs != started.max_epochs:
            raise UserError(
                f"--max-epochs {config.max_epochs}: the run's schedule, {config.schedule}, spans "
                f"{started.max_epochs} epochs, which --resume keeps; omit --max-epochs"
            )
        done = [epoch for epoch, step in map(_position, run.checkpoints_newest_first()) if not step]
        if (newest := max(done, default=0)) > config.max_epochs:
            raise UserError(
                f"--max-epochs {config.max_epochs}: the run has done {newest} epochs already; "
                "give it more"
            )
        run.check_writable()
        return run

    def check_checkpoints(self) -> None:
        """Check that what was trained can be resumed.

        Raises:
            UserError: there are epochs, and no checkpoint.
        """
        if not self.checkpoints_newest_first() and (epochs := len(self.read_metrics())):
            raise UserError(
                f"--resume --name {self.name}: {epochs} epochs were trained, and "
                f"{self.checkpoints} holds no checkpoint any more; put it back, or start another "
                "run with another --name"
            )

    def begin(self, config: TrainConfig) -> None:
        """Make the directory unless it is there, and write ``config.yaml``."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.write_config(config)

    def _has_begun(self) -> bool:
        # A worker's refusal may come after epochs of training, when it was restarted: they stay.
        return bool(self.checkpoints_newest_first() or self.read_metrics())

    @property
    def metrics_file(self) -> AnyPath:
        """``metrics.csv``: a row an epoch."""
        return self.path / "metrics.csv"

    @property
    def environment_file(self) -> AnyPath:
        """``environment.json``: what it ran with."""
        return self.path / "environment.json"

    @property
    def model_file(self) -> AnyPath:
        """``model.safetensors``: the best epoch's weights."""
        return self.path / "model.safetensors"

    @property
    def predictions_file(self) -> AnyPath:
        """``test-predictions.safetensors``: the logits of those weights for each test image."""
        return self.path / "test-predictions.safetensors"

    def find_predictions(self) -> AnyPath | None:
        """Return the file of predictions, also by its name in runs of version 0.1.0, if any."""
        files = (self.predictions_file, self.path / "test-answers.safetensors")
        return next((file for file in files if file.is_file()), None)

    @property
    def error_file(self) -> AnyPath:
        """``error.txt``: the traceback of a trial that failed."""
        return self.path / "error.txt"

    @property
    def checkpoints(self) -> AnyPath:
        """``checkpoints/``: what ``--resume`` needs, the newest and the best."""
        return self.path / "checkpoints"

    def checkpoint(self, epoch: int, step: int = 0) -> AnyPath:
        """Return the checkpoint file of an epoch's end, or of its first steps (both 1-based)."""
        steps = f"-step-{step:04d}" if step else ""
        return self.checkpoints / f"epoch-{epoch:04d}{steps}.ckpt"

    def checkpoints_newest_first(self) -> list[AnyPath]:
        """Return all checkpoint files, the one that is farthest into the run first."""
        # Half-written and rejected files have other names, and must not be tried.
        files = [
            file for file in self.checkpoints.glob("*.ckpt") if _CHECKPOINT.fullmatch(file.name)
        ]
        return sorted(files, key=_sort_key, reverse=True)

    def steps_into_epoch(self, checkpoint: AnyPath) -> int:
        """Return how many steps of its epoch a checkpoint has; 0 for one of an epoch's end."""
        return _position(checkpoint)[1]

    def prune_checkpoints(self, keep: set[AnyPath]) -> None:
        """Delete all checkpoints but these."""
        for file in self.checkpoints_newest_first():
            if file not in keep:
                file.unlink(missing_ok=True)

    def reject_checkpoint(self, file: AnyPath) -> AnyPath:
        """Rename a checkpoint that cannot be used, so that it is neither tried again nor lost."""
        aside = file.with_name(f"{file.name}.rejected")
        file.rename(aside)  # type: ignore[arg-type]
        return aside

    def read_config(self) -> TrainConfig:
        """Read the config that the run was started with.

        Raises:
            UserError: there is no such run, or the file is damaged or a newer version's.
        """
        if not self.config_file.is_file():
            raise UserError(
                f"--resume --name {self.name}: there is no run in {self.path}; omit --resume "
                "to start it"
            )
        if (self.path / "space.yaml").is_file():
            raise UserError(
                f"{self.path}: holds a search, not a run; resume it with tune, or name the folder "
                f"of one of its trials, e.g. {self.path / 'trials' / 't0000'}"
            )
        settings = own_settings(self.config_file, setting_names())
        return make_config(settings, f" (in {self.config_file})")

    def write_config(self, config: TrainConfig) -> None:
        """Write every setting to ``config.yaml``, so that ``--config`` with it gives the same run.

        Not into the same directory: ``resume`` and the name, which is the directory's, are omitted.
        """
        write_atomically(self.config_file, _as_written(config))

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows to ``metrics.csv``; floats so that they read back exactly.

        Rows may come from a checkpoint of another version: what they lack is empty, and what only
        that version has is omitted.
        """
        # All rows anew: appending could leave half a row, and after a restart rows of epochs that
        # are trained again.
        text = io.StringIO()
        writer = csv.DictWriter(text, list(COLUMNS), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics_file, text.getvalue().encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the rows of ``metrics.csv``, another version's too (see `read_rows`).

        Returns:
            A dict of `METRICS` an epoch; none before the first epoch's end.
        """
        if not self.metrics_file.is_file():
            return []
        return read_rows(self.metrics_file.read_bytes().decode(errors="replace"))

    def read_summary(self) -> dict[str, Any]:
        """Read ``summary.json``; empty too where rows of ``metrics.csv`` are lost.

        What ended is then not known whole, and a trial of a search runs again.
        """
        found = super().read_summary()
        return found if found.get("epochs", 0) <= len(self.read_metrics()) else {}

    def read_environment(self) -> dict[str, Any]:
        """Read ``environment.json``; empty before it is written, or where it is damaged."""
        return _read_json(self.environment_file)

    def started_with_fingerprint(self) -> str | None:
        """Return the fingerprint of the data set that the run was started with, once known."""
        found: str | None = self.read_environment().get("dataset_fingerprint")
        return found

    def trained_on(self) -> dict[str, Any] | None:
        """Return name, classes, mean and std of the data set that the run was started with."""
        found: dict[str, Any] | None = self.read_environment().get("dataset")
        return found

    def write_error(self, text: str) -> None:
        """Write ``error.txt``."""
        write_atomically(self.error_file, text.encode())

    def write_environment(self, values: Mapping[str, Any]) -> None:
        """Write ``environment.json``."""
        write_atomically(self.environment_file, as_json(values))

    def write_summary(
        self,
        dataset: str,
        status: str,
        outcome: Outcome | None = None,
        restarts: int = 0,
        seconds: float = 0.0,
        error: str | None = None,
    ) -> dict[str, Any]:
        """Write ``summary.json``, and return what is in it.

        Args:
            dataset: the data set's name.
            status: ``completed``, ``failed`` or ``interrupted``; a trial's also ``stopped``.
            outcome: of a completed run; else what ``metrics.csv`` says so far is written.
            restarts: of the workers, after failures, in this command.
            seconds: wall time of this command.
            error: of a trial that failed.
        """
        history = outcome.history if outcome else self.read_metrics()
        # The first of equals, as max() gives it.
        best = max(history, key=lambda row: float(row["val_accuracy"]), default={})
        summary = {
            "status": status,
            "dataset": dataset,
            "epochs": len(history),
            "best_epoch": best.get("epoch"),
            "val_accuracy": best.get("val_accuracy"),
            "test_accuracy": outcome.test_accuracy if outcome else None,
            "test_loss": outcome.test_loss if outcome else None,
            "weights_sha256": outcome.weights_sha256 if outcome else None,
            "skipped_updates": outcome.skipped_updates if outcome else None,
            "restarts": restarts,
            "seconds": round(seconds, 3),
        }
        if error is not None:
            summary["error"] = error
        write_atomically(self.summary_file, as_json(summary))
        return summary


def _read_json(file: AnyPath) -> dict[str, Any]:
    """Read what a command wrote about itself; empty where it is missing, or cut as by a full disk.

    It then says as little as before it was written, and is written anew at the next end.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _as_written(config: TrainConfig) -> bytes:
    return config.replace(resume=False, name=None).to_yaml().encode()


def _position(checkpoint: AnyPath) -> tuple[int, int]:
    """Return epoch (1-based) of a checkpoint file, and how many of its steps; 0 for all of them."""
    # As numbers: as text, epoch-10000 sorts before epoch-9999.
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _sort_key(checkpoint: AnyPath) -> tuple[int, float]:
    epoch, step = _position(checkpoint)
    # A name without a step is of the epoch's end, after all of its steps.
    return epoch, step or math.inf
