"""A loss that is no longer finite: the run stops at that step, or the step is skipped."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cifar_dist.errors import Diverged, Interrupted
from cifar_dist.events import Event, Warned
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training import checkpointing
from cifar_dist.training.checkpoints import read_checkpoint
from cifar_dist.training.nonfinite import SkipNonFinite
from cifar_dist.training.reading import Reading
from tests.conftest import ROOT
from tests.processes import PATIENCE_S
from tests.training.small import (
    STEPS,
    Breaking,
    SignalAt,
    TrainFew,
    half_on_cpu,
    same,
    small_network,
)


@pytest.fixture(autouse=True)
def _breaking(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Breaking, "seen", [])
    with small_network(Breaking):
        yield


def break_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    monkeypatch.setattr(Breaking, "breaks", steps)


def test_the_run_stops_at_that_step_and_names_the_last_good_checkpoint(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, STEPS + 3)
    with pytest.raises(Diverged) as raised:
        train_few(tmp_path, "broken", checkpoint_every="4s")
    run = RunDirectory.at(str(tmp_path), "broken")
    last = run.checkpoint(2, 2)
    said = str(raised.value)
    assert f"the loss is nan at step {STEPS + 4} (epoch 2, lr 0.001)" in said
    assert f"the last good checkpoint is {last}" in said
    assert "to resume: python -m cifar_dist.train --name broken --resume" in said
    assert len(Breaking.seen) == STEPS + 4  # not one step more
    assert run.read_summary()["status"] == "failed"
    assert all(torch.isfinite(v).all() for v in read_checkpoint(last)["state_dict"].values())


def test_a_checkpoint_that_is_still_being_written_is_the_one_that_is_named(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_bytes = checkpointing.checkpoint_as_bytes

    def slow(content: dict) -> bytes:
        time.sleep(0.5)
        return as_bytes(content)

    monkeypatch.setattr(checkpointing, "checkpoint_as_bytes", slow)
    break_at(monkeypatch, 4)
    with pytest.raises(Diverged, match=r"the last good checkpoint is \S+epoch-0001-step-0004.ckpt"):
        train_few(tmp_path, "broken", checkpoint_every="4s")


def test_before_the_first_checkpoint_there_is_none_to_name(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, 1)
    with pytest.raises(Diverged, match=r"at step 2 \(epoch 1.*no checkpoint yet"):
        train_few(tmp_path, "broken")


def test_a_loss_that_arrives_late_is_read_before_anything_is_saved(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU that is some steps behind.
    monkeypatch.setattr(Reading, "arrived", False)
    break_at(monkeypatch, 2)
    with pytest.raises(Diverged, match=r"the loss is nan at step 3 \(epoch 1"):
        train_few(tmp_path, "broken", checkpoint_every="4s")
    assert RunDirectory.at(str(tmp_path), "broken").checkpoints_newest_first() == []


def test_a_loss_that_never_arrives_is_waited_for_after_a_few_steps(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reading, "arrived", False)
    monkeypatch.setattr("cifar_dist.training.nonfinite.STEPS_AHEAD", 2)
    break_at(monkeypatch, 1)
    with pytest.raises(Diverged, match=r"the loss is nan at step 2 \(epoch 1"):
        train_few(tmp_path, "broken")
    assert len(Breaking.seen) == 1 + 1 + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_step_is_named(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, STEPS + 3)
    with pytest.raises(Diverged, match=rf"the loss is nan at step {STEPS + 4} \(epoch 2"):
        train_few(tmp_path, "broken", use_gpu=True)


def test_skipping_omits_the_update_and_the_statistics(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, 2, STEPS + 1)
    trained = train_few(tmp_path, "skipping", on_nonfinite="skip")
    assert trained.summary["skipped_updates"] == 2
    assert trained.summary["status"] == "completed"
    # An image that was not learned from is not counted: 24 less in the first two epochs.
    assert [row["samples"] for row in trained.outcome.history] == [120, 240, 384]
    seen = Breaking.seen
    for name in seen[0]:
        assert torch.equal(seen[3][name], seen[2][name]), name
    assert not torch.equal(seen[4]["conv1.weight"], seen[3]["conv1.weight"])
    assert not torch.equal(seen[4]["bn1.running_mean"], seen[3]["bn1.running_mean"])


def test_skipped_updates_are_counted_over_a_resume(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, 2, STEPS + 4)
    with pytest.raises(Interrupted):
        train_few(tmp_path, "skipping", SignalAt(2, 2), on_nonfinite="skip")
    resumed = train_few(tmp_path, "skipping", resume=True, on_nonfinite="skip")
    assert resumed.summary["skipped_updates"] == 2


def test_an_epoch_without_any_finite_loss_is_reported_and_the_run_continues(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, *range(STEPS - 2, 2 * STEPS))
    heard: list[Event] = []
    trained = train_few(tmp_path, "skipping", heard.append, on_nonfinite="skip")
    rows = trained.run.read_metrics()
    assert [row["samples"] for row in rows] == [96, 96, 240]
    assert math.isnan(rows[1]["train_loss"])
    assert math.isfinite(rows[2]["train_loss"])
    assert trained.summary["skipped_updates"] == STEPS + 2
    assert [event.message for event in heard if isinstance(event, Warned)] == [
        "epoch 1: 2 updates skipped, their loss not finite",
        "epoch 2: 6 updates skipped, their loss not finite",
    ]


def test_finite_runs_do_not_depend_on_what_would_be_done(
    train_few: TrainFew, tmp_path: Path
) -> None:
    stop = train_few(tmp_path, "stop")
    skip = train_few(tmp_path, "skip", on_nonfinite="skip")
    assert skip.outcome.weights_sha256 == stop.outcome.weights_sha256


class Overflowing(Breaking):
    """As `Breaking`, but where it breaks, only the gradient does: the loss stays finite."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        before = len(self.seen)
        breaks, self.breaks = self.breaks, ()
        logits = super().forward(images)
        self.breaks = breaks
        if self.training and before in breaks:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits


def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What each training step finds in the optimizer, collected while a run lasts."""
    states: list[dict] = []
    begin = SkipNonFinite.on_train_batch_start

    def look(self, trainer, *others) -> None:
        states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        begin(self, trainer, *others)

    monkeypatch.setattr(SkipNonFinite, "on_train_batch_start", look)
    return states


def same_state(one: dict, other: dict) -> bool:
    """Whether two states of an optimizer are equal; no state at all is one of zeros."""
    return all(
        torch.equal(one.get(key, {}).get(name, torch.zeros_like(value)), value)
        for key, values in other.items()
        for name, value in values.items()
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_leaves_the_optimizer_as_it_was_also_the_first(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer, scaled
) -> None:
    break_at(monkeypatch, 0, 3)
    states = optimizers(monkeypatch)
    with half_on_cpu(2.0) if scaled else contextlib.nullcontext():
        trained = train_few(
            tmp_path, "skipping", on_nonfinite="skip", optimizer=optimizer, max_epochs=1
        )
    assert trained.summary["skipped_updates"] == 2
    assert [row["samples"] for row in trained.outcome.history] == [96]
    same = [same_state(a, b) for a, b in pairwise(states)]
    assert same == [True, False, False, True, False]
    for name in Breaking.seen[0]:
        assert torch.equal(Breaking.seen[1][name], Breaking.seen[0][name]), name


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_what_a_gradient_scaler_skips_is_undone_and_counted(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_nonfinite: str
) -> None:
    break_at(monkeypatch, 0, STEPS + 2)
    heard: list[Event] = []
    with small_network(Overflowing), half_on_cpu(8.0) as scaler:
        trained = train_few(
            tmp_path, "scaled", heard.append, on_nonfinite=on_nonfinite, max_epochs=2
        )
    assert trained.summary["skipped_updates"] == 2
    assert scaler.get_scale() == 2.0
    assert [row["samples"] for row in trained.outcome.history] == [120, 240]
    assert all(math.isfinite(row["train_loss"]) for row in trained.outcome.history)
    seen = Breaking.seen
    for name in seen[0]:
        assert torch.equal(seen[1][name], seen[0][name]), name
        assert torch.equal(seen[STEPS + 3][name], seen[STEPS + 2][name]), name
    assert not torch.equal(seen[2]["conv1.weight"], seen[1]["conv1.weight"])
    assert [event.message for event in heard if isinstance(event, Warned)] == [
        "epoch 1: 1 updates skipped, their loss or a gradient not finite",
        "epoch 2: 1 updates skipped, their loss or a gradient not finite",
    ]


def test_with_a_gradient_scaler_a_loss_that_is_not_finite_still_stops_the_run(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, 3)
    with half_on_cpu(2.0), pytest.raises(Diverged, match=r"the loss is nan at step 4 \(epoch 1"):
        train_few(tmp_path, "scaled")


def test_a_scalers_skips_and_its_scale_are_resumed(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, 2, STEPS + 4)
    settings = {"on_nonfinite": "skip", "max_epochs": 2}
    with half_on_cpu(8.0):
        whole = train_few(tmp_path, "whole", **settings)
    Breaking.seen.clear()
    with half_on_cpu(8.0), pytest.raises(Interrupted):
        train_few(tmp_path, "cut", SignalAt(2, 2), **settings)
    with half_on_cpu(8.0) as scaler:
        resumed = train_few(tmp_path, "cut", resume=True, **settings)
    assert resumed.summary["skipped_updates"] == 2
    assert scaler.get_scale() == 2.0
    same(resumed, whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_on_a_gpu_nothing_waits_for_what_is_skipped(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    for hook in (
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    ):
        monkeypatch.setattr(SkipNonFinite, hook, without_waiting(getattr(SkipNonFinite, hook)))
    break_at(monkeypatch, 2, STEPS + 1)
    trained = train_few(
        tmp_path, "skipping", use_gpu=True, on_nonfinite="skip", precision=precision, max_epochs=2
    )
    assert trained.summary["skipped_updates"] >= 2
    for name in Breaking.seen[0]:
        assert torch.equal(Breaking.seen[3][name], Breaking.seen[2][name]), name


def without_waiting(hook):
    """A hook that raises where it waits for the device."""

    def called(*words):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return hook(*words)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return called


FULL_DISK = """
mount -t tmpfs -o size=200m none {disk} &&
{python} -m cifar_dist.train --data-dir {data} --num-workers 0 --batch-size 48 --max-epochs 4 \
    --storage-path {disk} --name full
code=$?
{python} -c "
import sys
from itertools import pairwise
from pathlib import Path
from cifar_dist.training.checkpoints import read_checkpoint
files = sorted(file.name for file in Path('{disk}/full/checkpoints').iterdir())
assert read_checkpoint('{disk}/full/checkpoints/epoch-0001.ckpt')['epoch'] == 0
print('left', *files)
"
exit $code
"""


def test_a_full_disk_ends_the_run_in_one_line_and_the_checkpoint_before_is_intact(
    tmp_path: Path, few_digits: Path
) -> None:
    apart = ["unshare", "--map-root-user", "--user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("a small disk of its own: this user may not mount one")
    # A ResNet-18's checkpoint has 134 MB: the first one fits, and nothing beside it.
    (tmp_path / "disk").mkdir()
    script = FULL_DISK.format(disk=tmp_path / "disk", data=few_digits, python=sys.executable)
    done = subprocess.run(
        [*apart, "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1, done.stderr
    assert "left epoch-0001.ckpt\n" in done.stdout
    line, resume_line = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "cannot be written (No space left on device)" in line
    assert resume_line.startswith("to resume: python -m cifar_dist.train --name full --resume")
