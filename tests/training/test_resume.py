"""A run that is stopped anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cifar_dist.errors import Interrupted, UserError
from cifar_dist.events import EpochDone, Event, Started, StepDone, Warned
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.train import Trained
from cifar_dist.training.checkpoints import BadCheckpoint, checkpoint_as_bytes, read_checkpoint
from tests.training.small import STEPS, SignalAt, Small, TrainFew, same, small_network


class Noisy(Small):
    """A small network to whose result every generator that has a history matters."""

    def disturbed(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training:
            hidden = hidden * float(np.random.uniform(0.9, 1.1)) * random.uniform(0.9, 1.1)
        return F.dropout(hidden, 0.3, self.training)


@pytest.fixture(autouse=True, scope="module")
def _small_and_noisy():
    with small_network(Noisy):
        yield


@pytest.fixture(scope="module")
def undisturbed(train_few: TrainFew, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = train_few(tmp_path_factory.mktemp("runs"), "undisturbed")
    assert trained.outcome.history[-1]["step"] == 3 * STEPS
    return trained


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (1, STEPS - 1), (2, 4), (2, STEPS), (3, 5)])
def test_an_interrupted_run_resumes_in_the_middle_of_its_epoch(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path, epoch: int, step: int
) -> None:
    stop = SignalAt(epoch, step)
    with pytest.raises(Interrupted, match="to resume: "):
        train_few(tmp_path, "cut", stop)
    assert [e.message for e in stop.heard if isinstance(e, Warned)] == [
        "interrupted: saving a checkpoint; once more to stop without"
    ]
    run = RunDirectory.at(str(tmp_path), "cut")
    last = run.checkpoint(epoch, step if step < STEPS else 0)
    assert run.checkpoints_newest_first()[0] == last
    heard: list[Event] = []
    same(train_few(tmp_path, "cut", heard.append, resume=True), undisturbed)
    assert next(e.checkpoint for e in heard if isinstance(e, Started)) == str(last)
    first = next(e for e in heard if isinstance(e, StepDone))
    assert (first.epoch, first.step) == (epoch + step // STEPS, step % STEPS + 1)
    # Counted from the resumed step, and on a clock that began there.
    assert first.images_per_second > 1


def test_what_the_last_command_summarised_is_gone_once_the_run_resumes(
    train_few: TrainFew, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", SignalAt(1, 2))
    run = RunDirectory.at(str(tmp_path), "cut")
    assert run.read_summary()["status"] == "interrupted"
    found = []

    def look(event: Event) -> None:
        if isinstance(event, Started):
            found.append(run.read_summary())

    train_few(tmp_path, "cut", look, resume=True)
    assert found == [{}]
    assert run.read_summary()["status"] == "completed"


def test_a_run_whose_checkpoints_are_gone_is_not_trained_over(
    train_few: TrainFew, tmp_path: Path
) -> None:
    run = train_few(tmp_path, "cut", max_epochs=1).run
    before = run.metrics_file.read_bytes()
    for file in run.checkpoints.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"1 epochs were trained, and .* holds no checkpoint"):
        train_few(tmp_path, "cut", max_epochs=2, resume=True)
    assert run.metrics_file.read_bytes() == before


def test_a_signal_after_the_question_at_an_epochs_end_is_heeded_too(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path
) -> None:
    def terminate(event: Event) -> None:
        if isinstance(event, EpochDone) and event.row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="to resume: "):
        train_few(tmp_path, "cut", terminate)
    run = RunDirectory.at(str(tmp_path), "cut")
    assert run.checkpoints_newest_first()[0] == run.checkpoint(2, 1)
    same(train_few(tmp_path, "cut", resume=True), undisturbed)


def test_twice_interrupted_stops_without_a_checkpoint(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", SignalAt(2, 3, times=2))
    run = RunDirectory.at(str(tmp_path), "cut")
    assert run.checkpoints_newest_first() == [run.checkpoint(1)]
    same(train_few(tmp_path, "cut", resume=True), undisturbed)


def test_checkpoints_by_steps_change_no_bit_and_are_resumed_from(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(event: Event) -> None:
        if isinstance(event, StepDone) and (event.epoch, event.step) == (2, 5):
            raise Interrupted

    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", die, checkpoint_every="4s")
    run = RunDirectory.at(str(tmp_path), "cut")
    assert run.checkpoints_newest_first()[0] == run.checkpoint(2, 2)  # the 8th step
    same(train_few(tmp_path, "cut", resume=True, checkpoint_every="5s"), undisturbed)


def test_the_best_weights_are_mended_after_a_kill_between_the_files(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path
) -> None:
    done = train_few(tmp_path, "done")
    before = done.run.model_file.read_bytes()
    done.run.model_file.write_bytes(b"those of another epoch")
    rows = done.run.metrics_file.read_text()
    done.run.metrics_file.write_text(rows.rsplit("\n", 2)[0] + "\n")
    again = train_few(tmp_path, "done", resume=True)
    assert done.run.model_file.read_bytes() == before
    assert done.run.metrics_file.read_text() == rows
    assert again.summary["test_loss"] == undisturbed.summary["test_loss"]


# --- checkpoints that cannot be trusted --------------------------------------------------------


class Code:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def damage(how: str, file: Path, folder: Path) -> str:
    """Damage a checkpoint, and say what the message must hold."""
    data = file.read_bytes()
    if how == "cut to half":
        file.write_bytes(data[: len(data) // 2])
        return "is cut short"
    if how == "a flipped byte":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        return "is damaged"
    if how == "another model":
        content = read_checkpoint(file)
        content["state_dict"]["network.fc.weight"] = torch.zeros(100, 128)
        file.write_bytes(checkpoint_as_bytes(content))
        return r"is of another model: network.fc.weight is \[100, 128\], here \[10, 128\]"
    if how == "another run":
        content = read_checkpoint(file)
        content["cifar_dist"]["lr"] = 0.5
        file.write_bytes(checkpoint_as_bytes(content))
        return "is of another run: lr 0.5, here 0.001"
    code = pickle.dumps(Code(folder)) if how == "a pickle" else None
    file.write_bytes(code or checkpoint_as_bytes({"state_dict": Code(folder)}))
    return "would run code"


DAMAGES = ["cut to half", "a flipped byte", "another model", "another run", "a pickle",
           "a checkpoint with code"]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_bad_checkpoint_is_reported_and_the_one_before_it_used(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path, how: str
) -> None:
    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", SignalAt(3, 2))
    run = RunDirectory.at(str(tmp_path), "cut")
    newest, before = run.checkpoints_newest_first()[:2]
    said = damage(how, newest, tmp_path / "made by code")
    bad = newest.read_bytes()
    heard: list[Event] = []
    resumed = train_few(tmp_path, "cut", heard.append, resume=True)
    warnings = [event.message for event in heard if isinstance(event, Warned)]
    assert len(warnings) == 1

    assert re.search(said, warnings[0])
    assert f"resuming from {before.name}" in warnings[0]
    assert newest.with_name(f"{newest.name}.rejected").read_bytes() == bad  # nothing is lost
    assert not (tmp_path / "made by code").exists()
    same(resumed, undisturbed)


def test_checkpoints_of_another_order_of_images_are_used_at_an_epochs_end_only(
    train_few: TrainFew, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_few(tmp_path, "old", SignalAt(2, 2))
    run = RunDirectory.at(str(tmp_path), "old")
    within, at_end = run.checkpoints_newest_first()
    for file in (within, at_end):  # as version 0.1.0 wrote them, which does not name its order
        content = read_checkpoint(file)
        del content["cifar_dist"]["order_version"]
        for rank in content["callbacks"]["RunCheckpointer"]["ranks"]:
            rank["totals"] = {"loss.sum_value": torch.zeros(())}
        file.write_bytes(checkpoint_as_bytes(content))
    heard: list[Event] = []
    resumed = train_few(tmp_path, "old", heard.append, resume=True)
    assert next(e.checkpoint for e in heard if isinstance(e, Started)) == str(at_end)
    first, second = [event.message for event in heard if isinstance(event, Warned)]
    assert f"checkpoint {at_end.name} is of a version with another order of images" in first
    assert f"{within.name} was saved within an epoch by a version with another order" in second
    assert [row["epoch"] for row in resumed.run.read_metrics()] == [1, 2, 3]


def test_a_checkpoint_with_one_record_for_history_and_ranks_resumes_to_the_bit(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_few(tmp_path, "old", SignalAt(2, 4))
    run = RunDirectory.at(str(tmp_path), "old")
    for file in run.checkpoints_newest_first():  # as versions did whose callback was one
        content = read_checkpoint(file)
        callbacks = content["callbacks"]
        history, checkpointer = callbacks.pop("MetricsHistory"), callbacks.pop("RunCheckpointer")
        callbacks["Record"] = {
            "history": history["history"],
            "best_epoch": history["best_epoch"],
            "best_sha256": checkpointer["best_sha256"],
            "ranks": checkpointer["ranks"],
            "seconds": history["seconds"],
        }
        file.write_bytes(checkpoint_as_bytes(content))
    same(train_few(tmp_path, "old", resume=True), undisturbed)
    written = torch.load(run.checkpoint(3), weights_only=True)["callbacks"]
    assert "Record" not in written
    assert written["RunCheckpointer"].keys() == {"best_sha256", "ranks"}


def test_where_no_checkpoint_can_be_used_nothing_is_touched(
    train_few: TrainFew, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", SignalAt(2, 2))
    run = RunDirectory.at(str(tmp_path), "cut")
    for how, file in zip(DAMAGES, run.checkpoints_newest_first(), strict=False):
        damage(how, file, tmp_path / "made by code")
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint can be used \(.*cut short.*is damaged"):
        train_few(tmp_path, "cut", resume=True)
    after = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert after == before | {run.config_file: after[run.config_file]}


@pytest.mark.parametrize("length", [0, 1, 100, -1, -60])
def test_a_cut_checkpoint_is_never_loaded(tmp_path: Path, length: int) -> None:
    file = tmp_path / "a.ckpt"
    whole = checkpoint_as_bytes({"state_dict": {"a": torch.ones(3)}})
    file.write_bytes(whole)
    assert read_checkpoint(file)["state_dict"]["a"].tolist() == [1, 1, 1]
    assert torch.load(file, weights_only=True).keys() == {"state_dict"}  # an ordinary one, too
    file.write_bytes(whole[:length])
    with pytest.raises(BadCheckpoint):
        read_checkpoint(file)


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    whole = checkpoint_as_bytes({"state_dict": {"a": torch.ones(3)}})
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(BadCheckpoint):
            read_checkpoint(file)
