"""Two commands in one directory: a run or a search is resumed while it still runs, or has died."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import make_tune_config
from cifar_dist.errors import Interrupted, RunFailed, UserError
from cifar_dist.events import EpochDone, Event, TrialUpdated, Waiting, Warned, ignore
from cifar_dist.runs import lock
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.lock import TAKE_OVER, Holder, locked
from cifar_dist.storage import AnyPath, as_json, at, write_atomically
from cifar_dist.train import train
from cifar_dist.tune import search
from tests.cluster.trials import curve
from tests.conftest import PYTHON_PATH, run_command, started_command
from tests.processes import PATIENCE_S

HOLD = """
import sys, time
from cifar_dist.events import ignore
from cifar_dist.runs.lock import locked
from cifar_dist.storage import at

with locked(at(sys.argv[1]), ignore):
    print("holds it", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds it\n"
    yield process
    process.kill()
    process.wait()


def locks(folder: Path) -> list[Path]:
    return list(folder.glob(".lock-*"))


def test_a_run_is_resumed_while_it_runs(
    tmp_path: Path, few_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_DIST_DATA", str(few_digits))
    config = TrainConfig(
        num_workers=0, batch_size=43, max_epochs=1, report=False, storage_path=str(tmp_path),
        name="a",
    )  # fmt: skip
    refused: list[str] = []

    def resume(event: Event) -> None:
        if isinstance(event, EpochDone):
            with pytest.raises(UserError) as raised:
                train(config.replace(resume=True))
            refused.append(str(raised.value))

    trained = train(config, resume)
    (said,) = refused
    assert said.startswith(f"--name a: process {os.getpid()} on ")
    assert "\n" not in said
    assert trained.summary["status"] == "completed"
    assert locks(tmp_path / "a") == []
    assert (
        train(config.replace(resume=True)).summary["weights_sha256"]
        == (trained.summary["weights_sha256"])
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_is_resumed_while_it_runs_and_after_it_was_interrupted(tmp_path: Path) -> None:
    config = make_tune_config(
        {"dataset": "digits", "num_samples": 2, "max_epochs": 2, "report": False, "name": "s",
         "scheduler": "none", "storage_path": str(tmp_path)}
    )  # fmt: skip
    resumed = config.replace(train=config.train.replace(resume=True))

    def resume(event: Event) -> None:
        if isinstance(event, TrialUpdated) and event.epochs:
            with pytest.raises(UserError, match=f"--name s: process {os.getpid()} on .* works in"):
                search(resumed, training=curve)
            raise Interrupted

    with pytest.raises(Interrupted):
        search(config, resume, training=curve)
    assert locks(tmp_path / "s") == []
    assert list(search(resumed, training=curve).table["status"]) == ["completed"] * 2


def test_a_dead_process_of_this_machine_is_taken_over_from_at_once(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(UserError, match=f"process {holder.pid} on "), locked(tmp_path, ignore):
        pass
    holder.send_signal(signal.SIGSTOP)  # it may go on at any time
    with pytest.raises(UserError, match=f"process {holder.pid} on "), locked(tmp_path, ignore):
        pass
    holder.kill()
    holder.wait()
    events: list[Event] = []
    with locked(tmp_path, events.append):
        assert len(locks(tmp_path)) == 1
    (said,) = events
    assert isinstance(said, Warned)
    assert f"taken over from process {holder.pid} on " in said.message
    assert said.message.endswith(": it has ended")
    assert locks(tmp_path) == []


def test_another_process_has_the_dead_ones_number(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    (file,) = locks(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "started": "1"}))
    events: list[Event] = []
    with locked(tmp_path, events.append):
        assert [type(event) for event in events] == [Warned]


def test_it_is_asked_to_stop_and_leaves_no_lock(tmp_path: Path) -> None:
    for error in (Interrupted, RunFailed, KeyboardInterrupt):
        with contextlib.suppress(error), locked(tmp_path, ignore):
            assert len(locks(tmp_path)) == 1
            raise error
        assert locks(tmp_path) == []


# --- another machine ---------------------------------------------------------------------------


def lock_of_another_machine(folder: AnyPath, age: float = 0) -> AnyPath:
    file = folder / ".lock-elsewhere.json"
    values = {"host": "elsewhere", "machine": "another", "pid": 1, "started": "1",
              "heartbeat": time.time() - age, "token": "elsewhere"}  # fmt: skip
    write_atomically(file, as_json(values))
    return file


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lock, "SILENT_S", 1)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("age", [0, 1000, -1000])
def test_another_machine_is_gone(tmp_path: Path, age: float) -> None:
    lock_of_another_machine(tmp_path, age)
    events: list[Event] = []
    with locked(tmp_path, events.append):
        waiting, taken = events
    assert isinstance(waiting, Waiting)
    assert "for a sign of life of process 1 on elsewhere" in waiting.message
    assert isinstance(taken, Warned)
    assert taken.message.endswith("taken over from process 1 on elsewhere: it gave no sign of life")


@pytest.mark.usefixtures("_impatient")
def test_another_machine_whose_clock_is_an_hour_late_is_at_work(tmp_path: Path) -> None:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            lock_of_another_machine(tmp_path, age=3600)

    lock_of_another_machine(tmp_path, age=3600)
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(UserError, match="process 1 on elsewhere"), locked(tmp_path, ignore):
            pass
    finally:
        ended.set()
        beating.join()


def test_a_person_knows_that_the_other_machine_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TAKE_OVER, "1")
    lock_of_another_machine(tmp_path)
    events: list[Event] = []
    with locked(tmp_path, events.append):
        assert [type(event) for event in events] == [Warned]


@pytest.mark.usefixtures("_impatient")
def test_a_suspended_run_wakes_up_after_another_machine_took_over(
    tmp_path: Path, few_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_DIST_DATA", str(few_digits))
    config = TrainConfig(
        num_workers=0, batch_size=43, max_epochs=500, report=False, storage_path=str(tmp_path),
        name="a",
    )  # fmt: skip

    def take_over(event: Event) -> None:
        if isinstance(event, EpochDone) and event.row["epoch"] == 1:
            for file in locks(tmp_path / "a"):
                file.unlink()
            lock_of_another_machine(tmp_path / "a")

    with pytest.raises(RunFailed, match="process 1 on elsewhere took over while this one was sil"):
        train(config, take_over)
    assert RunDirectory.at(str(tmp_path), "a").read_summary() == {}
    assert [file.name for file in locks(tmp_path / "a")] == [".lock-elsewhere.json"]


# --- many at a time ----------------------------------------------------------------------------


def most_at_a_time(folder: AnyPath, commands: int) -> tuple[int, int]:
    """Let so many commands start together; return how many held the folder, and at a time."""
    inside, most, held = 0, 0, 0
    counting, start = threading.Lock(), threading.Barrier(commands)

    def command() -> None:
        nonlocal inside, most, held
        start.wait()
        try:
            with locked(folder, ignore):
                with counting:
                    inside, held = inside + 1, held + 1
                    most = max(most, inside)
                time.sleep(0.3)
                with counting:
                    inside -= 1
        except UserError:
            pass

    threads = [threading.Thread(target=command) for _ in range(commands)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return held, most


def test_many_commands_start_together(tmp_path: Path) -> None:
    lock_of_another = Holder.here()
    dead = {**vars(lock_of_another), "started": "1"}
    (tmp_path / f".lock-{lock_of_another.token}.json").write_text(json.dumps(dead))
    rounds = [most_at_a_time(tmp_path, 8) for _ in range(3)]
    assert {most for _, most in rounds} <= {0, 1}
    assert sum(held for held, _ in rounds), "commands only give way to each other"
    assert locks(tmp_path) == []


def test_many_commands_start_together_in_an_object_store(store: str) -> None:
    folder = at(f"{store.partition('?')[0]}/a?{store.partition('?')[2]}")
    folder.mkdir()
    assert most_at_a_time(folder, 4)[1] <= 1
    refused = pytest.raises(UserError, match="--name a: process ")
    with locked(folder, ignore), refused, locked(folder, ignore):
        pass
    assert [each.name for each in folder.glob(".lock-*")] == []


@pytest.mark.slow
def test_a_person_resumes_a_run_in_a_second_terminal(tmp_path: Path, few_digits: Path) -> None:
    words = ["--data-dir", str(few_digits), "--batch-size", "43", "--max-epochs", "900",
             "--num-workers", "0", "--name", "a", "--no-report"]  # fmt: skip
    first = started_command(tmp_path, *words)
    run = RunDirectory.at(str(tmp_path / "runs"), "a")
    until = time.monotonic() + PATIENCE_S
    while not run.config_file.is_file() or not run.checkpoints_newest_first():
        assert time.monotonic() < until
        time.sleep(0.1)
    second = run_command(tmp_path, "--name", "a", "--resume")
    assert second.code == 2
    assert second.err.startswith(f"error: --name a: process {first.pid} on ")
    assert second.err.count("\n") == 1
    first.kill()
    first.wait()
    more = str(len(run.read_metrics()) + 2)
    resumed = run_command(tmp_path, "--name", "a", "--resume", "--max-epochs", more)
    assert resumed.code == 0, resumed.err
    assert f"a: taken over from process {first.pid} on " in resumed.out
