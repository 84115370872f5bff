"""Checkpoint files that can be trusted: whole or not there, with a checksum, numbers only."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.order import ORDER_VERSION
from cifar_dist.errors import RunFailed, UserError
from cifar_dist.events import Listener, Warned
from cifar_dist.model.weights import CHECKSUM_BYTES, CHECKSUM_MARK, is_damaged
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import AnyPath, at
from cifar_dist.training.writer import Snapshot

IDENTITY = "cifar_dist"
"""Key in a checkpoint of what the run computes, see `find_checkpoint`."""
ORDER = "order_version"
"""Key in that of the `ORDER_VERSION` that the checkpoint was trained with."""

_OF_RECORD = {
    "MetricsHistory": ("history", "best_epoch", "seconds"),
    "RunCheckpointer": ("best_sha256", "ranks"),
}
"""By callback: what it keeps that one callback, ``Record``, kept in older checkpoints."""

_END_OF_ZIP = b"PK\x05\x06"


class BadCheckpoint(Exception):
    """A checkpoint file that cannot be used; the message says why, in one line."""


def checkpoint_as_bytes(content: Mapping[str, Any]) -> bytes:
    """Return a checkpoint as torch saves it, and its SHA-256 as the archive's comment.

    ``torch.load`` reads it as any other: a zip archive may end with a comment.
    """
    file = io.BytesIO()
    torch.save(content, file)
    # The last two bytes of a zip archive without a comment are the comment's length.
    file.seek(-2, os.SEEK_END)
    file.write(CHECKSUM_BYTES.to_bytes(2, "little"))
    digest = hashlib.sha256(file.getbuffer()).hexdigest()
    file.write(CHECKSUM_MARK + digest.encode())
    return file.getvalue()


def read_checkpoint(path: str | AnyPath) -> dict[str, Any]:
    """Read a checkpoint, to the CPU, and check that it is what was written.

    One of an older version is returned as this version would have written it.

    Raises:
        BadCheckpoint: it is cut short, damaged, holds anything but numbers, or is no checkpoint.
    """
    try:
        data = at(path).read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"cannot be read ({error.strerror})") from None
    signed = data[-CHECKSUM_BYTES:].startswith(CHECKSUM_MARK)
    # Checked before torch reads any of it, so that nothing of a damaged file is unpickled.
    if is_damaged(data):
        raise BadCheckpoint("is damaged: its bytes do not give the checksum that it was saved with")
    # A zip archive's end may be followed by a comment of at most 65,535 bytes.
    if not signed and data.startswith(b"PK") and _END_OF_ZIP not in data[-70_000:]:
        raise BadCheckpoint(f"is cut short: its end is missing after {len(data):,} bytes")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        if "Weights only load failed" in str(error):
            raise BadCheckpoint(
                "holds more than numbers and would run code when loaded; it was not loaded"
            ) from None
        raise BadCheckpoint("is no checkpoint, or its end is missing") from None
    # Checked last, so that a file that is cut short or holds code is refused for that reason.
    if not signed:
        raise BadCheckpoint("has no checksum: it was not written by cifar_dist, or its end is lost")
    return _with_todays_callbacks(cast(dict[str, Any], content))


def _with_todays_callbacks(content: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint whose callbacks' states have the names that the callbacks have now."""
    callbacks = content.get("callbacks", {})
    if (record := callbacks.get("Record")) is None:
        return content
    states = {key: {name: record[name] for name in names} for key, names in _OF_RECORD.items()}
    others = {key: state for key, state in callbacks.items() if key != "Record"}
    return {**content, "callbacks": {**others, **states}}


class Checkpoints(CheckpointIO):
    """Lightning's access to a run's checkpoints, in writing and reading."""

    def __init__(self) -> None:
        self._read: tuple[str, dict[str, Any]] | None = None
        self._taken: Snapshot | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Make a copy; `RunCheckpointer` gets it from `taken`, and has it written."""
        self._taken = Snapshot(checkpoint)

    def taken(self) -> Snapshot:
        """Return the copy that was made last, once."""
        taken, self._taken = self._taken, None
        assert taken is not None
        return taken

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read and check a checkpoint, unless `find_checkpoint` has read it."""
        # Lightning loads the file that `find_checkpoint` has just read and hashed. It is handed
        # over once and then released: it is as large as weights and optimizer together.
        if self._read is not None and self._read[0] == str(path):
            content = self._read[1]
            self._read = None
            return content
        try:
            return read_checkpoint(os.fspath(path))
        except BadCheckpoint as error:
            raise RunFailed(f"{path}: {error}") from None

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint."""
        at(path).unlink(missing_ok=True)

    def find_checkpoint(
        self,
        run: RunDirectory,
        identity: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        listener: Listener,
    ) -> AnyPath | None:
        """Return the newest checkpoint that this run can resume from, if it has any.

        Newer ones that it cannot use are reported as warnings and renamed, never deleted.

        Args:
            run: where they are.
            identity: what the run computes, by name; a checkpoint must have been saved with the
                same.
            weights: the module's state, whose names and shapes a checkpoint must have.
            listener: notified of each that cannot be used.

        Raises:
            UserError: there are checkpoints, and none of them can be used.
        """
        bad: list[tuple[AnyPath, str]] = []
        for file in run.checkpoints_newest_first():
            try:
                content = read_checkpoint(file)
                # Checked here and not left to Lightning, which would raise from within
                # `Trainer.fit`, where the checkpoint before this one can no longer be tried.
                _check_same(content, identity, weights)
                # Version 0.1.0 wrote no version of its order: what says none is of 1.
                of_another_order = content[IDENTITY].get(ORDER, 1) != ORDER_VERSION
                if of_another_order and run.steps_into_epoch(file):
                    raise BadCheckpoint(
                        "was saved within an epoch by a version with another order of images"
                    )
            except BadCheckpoint as error:
                bad.append((file, str(error)))
                continue
            if of_another_order:
                message = (
                    f"checkpoint {file.name} is of a version with another order of images: the run "
                    "continues, but not to the bits of one that this version trained throughout"
                )
                listener(Warned(message))
            # Renamed only once another one can be used. Where none can, the command stops with
            # every file as it was, so that a wrong setting does not cost the run its checkpoints.
            for rejected, why in bad:
                kept = run.reject_checkpoint(rejected)
                listener(
                    Warned(
                        f"checkpoint {rejected.name} {why}; kept as {kept.name}, "
                        f"resuming from {file.name}"
                    )
                )
            self._read = (str(file), content)
            return file
        if bad:
            said = "; ".join(f"{file.name} {why}" for file, why in bad)
            raise UserError(
                f"{run.checkpoints}: no checkpoint can be used ({said}); put a good one there, "
                "or move them away to start from the beginning"
            )
        return None


def _check_same(
    content: Mapping[str, Any], identity: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Check that a checkpoint is of this run and of this network.

    Raises:
        BadCheckpoint: it is another's; the message names the first difference.
    """
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise BadCheckpoint("is no checkpoint of a run: it holds no state_dict")
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name, value in weights.items():
        if found.get(name) != tuple(value.shape):
            was = list(found[name]) if name in found else "missing"
            raise BadCheckpoint(f"is of another model: {name} is {was}, here {list(value.shape)}")
    if unknown := found.keys() - weights.keys():
        raise BadCheckpoint(f"is of another model: it has {min(unknown)}, which is not here")
    saved = content.get(IDENTITY)
    if not isinstance(saved, dict):
        raise BadCheckpoint("is no checkpoint of a run: it does not say what the run computes")
    # A setting that an older version did not know had the value that is its default today.
    saved = {**{field.name: field.default for field in fields(TrainConfig)}, **saved}
    for name, value in identity.items():
        if saved.get(name) != value:
            raise BadCheckpoint(f"is of another run: {name} {saved.get(name)}, here {value}")
