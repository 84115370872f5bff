"""Runs' and searches' folders after kills, full disks, many commands at once and lost files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import TuneConfig, make_tune_config
from cifar_dist.errors import Interrupted, RunFailed, UserError
from cifar_dist.events import EpochDone, Event, TrialUpdated
from cifar_dist.report import report
from cifar_dist.runs.directory import Directory, RunDirectory
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import read_space
from cifar_dist.storage import StorePath, at
from cifar_dist.train import train
from cifar_dist.tune import Searched, search
from tests.cluster import trials
from tests.conftest import PYTHON_PATH
from tests.processes import PATIENCE_S
from tests.training.small import Small, few, small_network

FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir")


def make_run(storage_path: str) -> Directory:
    return RunDirectory.create(TrainConfig(storage_path=storage_path, name="a"))


def make_search(storage_path: str) -> SearchDirectory:
    config = TuneConfig(train=TrainConfig(storage_path=storage_path, name="a"))
    return SearchDirectory.create(config, read_space(config.space))


def killed_at(operation: int, make: Callable[[str], Directory], storage_path: str) -> bool:
    """Make a folder in a child that is killed at a file operation; return whether it was."""
    child = os.fork()
    if child == 0:
        left = iter(range(operation))

        def kill(event: str, _: object) -> None:
            if event in FILE_OPERATIONS and next(left, None) is None:
                os._exit(9)

        sys.addaudithook(kill)
        try:
            make(storage_path)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("make", [make_run, make_search])
def test_after_a_kill_at_any_file_operation_a_name_is_free_or_holds_a_whole_config(
    tmp_path: Path, make: Callable[[str], Directory]
) -> None:
    outcomes: Counter[str] = Counter()
    operation = 0
    while True:
        storage = tmp_path / f"{operation}"
        killed = killed_at(operation, make, str(storage))
        try:
            make(str(storage))
            outcomes["free"] += 1
        except UserError:
            kind = SearchDirectory if make is make_search else RunDirectory
            kind.at(str(storage), "a").read_config()
            outcomes["whole"] += 1
        if not killed:
            break
        operation += 1
    assert outcomes["free"] >= 5
    assert outcomes["whole"] >= 1


def test_a_run_that_was_killed_while_its_folder_was_made_leaves_nothing_for_long(
    tmp_path: Path,
) -> None:
    for name, age in ((".new-1.tmp", 7200), (".new-2.tmp", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    make_run(str(tmp_path))
    # The young one may be of a command that runs.
    assert sorted(each.name for each in tmp_path.iterdir()) == [".new-2.tmp", "a"]


def test_starting_a_run_where_a_folder_or_a_file_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"--name a: .* exists and holds no run; remove it"):
        make_run(str(tmp_path))
    (tmp_path / "a").rmdir()
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="a file of that name is in the way"):
        make_run(str(tmp_path))


@pytest.mark.parametrize("make", [make_run, make_search])
def test_starting_where_the_disk_is_full_leaves_no_folder(
    tmp_path: Path, make: Callable[[str], Directory]
) -> None:
    code = (
        "import sys, resource, signal; from tests.field.test_folders import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"{make.__name__}(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert f"UserError: --storage-path {tmp_path}: cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_run_that_was_killed_while_it_wrote_a_checkpoint_removes_the_half(
    tmp_path: Path, few_digits: Path
) -> None:
    config = few(few_digits, tmp_path, max_epochs=1)
    with small_network(Small):
        run = train(config).run
        left = [run.path / ".model.safetensors.0a1b2c3d.tmp",
                run.checkpoints / ".epoch-0002.ckpt.0a1b2c3d.tmp"]  # fmt: skip
        for file in left:
            file.write_bytes(b"half")
        train(config.replace(resume=True, max_epochs=2))
    assert [file for file in left if file.exists()] == []
    assert run.checkpoint(2).is_file()


def test_in_a_store_a_kill_before_the_config_leaves_the_name_free(store: str) -> None:
    storage = f"{at(store) / 'killed'}"
    folder = at(storage) / "a"
    folder.mkdir()
    (folder / "space.yaml").write_bytes(b"lr: ")
    make_search(storage)
    assert SearchDirectory.at(storage, "a").read_config().train.dataset == "cifar10"
    with pytest.raises(UserError, match=r"--name a: .* exists; resume it"):
        make_search(storage)
    (at(storage) / "b" / "notes.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"--name b: .* exists and holds no run"):
        RunDirectory.create(TrainConfig(storage_path=storage, name="b"))


def test_commands_without_a_name_that_start_in_one_second_all_get_one(tmp_path: Path) -> None:
    config = TrainConfig(storage_path=str(tmp_path))
    children = []
    for _ in range(16):
        if (child := os.fork()) == 0:
            code = 1
            try:
                for _ in range(10):
                    RunDirectory.create(config)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}
    assert len([each for each in tmp_path.iterdir() if (each / "config.yaml").is_file()]) == 160
    assert list(tmp_path.glob(".*")) == []


def test_in_a_store_commands_without_a_name_of_one_second_get_different_ones(store: str) -> None:
    config = TrainConfig(storage_path=f"{at(store) / 'unnamed'}")
    paths = {RunDirectory.create(config).path for _ in range(3)}
    assert len(paths) == 3
    assert all(isinstance(path, StorePath) for path in paths)


# Files that were lost or cut


SMALL_SEARCH = {"dataset": "digits", "num_samples": 3, "max_epochs": 3, "max_concurrent": 3,
                "scheduler": "none", "report": False, "name": "search"}  # fmt: skip


def search_small(folder: Path, listener=lambda event: None, **settings) -> Searched:
    config = make_tune_config({**SMALL_SEARCH, "storage_path": str(folder), **settings})
    return search(config, listener, training=trials.curve)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_resuming_a_search_whose_trials_lost_files_gives_the_same_table(tmp_path: Path) -> None:
    whole = search_small(tmp_path)
    lost, cut, short = (whole.directory.trial(number) for number in range(3))
    lost.metrics_file.unlink()
    cut.summary_file.write_bytes(cut.summary_file.read_bytes()[:20])
    short.metrics_file.write_bytes(short.metrics_file.read_bytes()[:-3])
    again = search_small(tmp_path, resume=True)
    pd.testing.assert_frame_equal(again.table, whole.table)
    for run in (lost, cut, short):
        assert run.read_summary()["status"] == "completed"
        assert len(run.read_metrics()) == 3


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_whose_folder_was_removed_meanwhile_does_not_say_that_it_was_completed(
    tmp_path: Path,
) -> None:
    removed: list[str] = []

    def remove(event: Event) -> None:
        if isinstance(event, TrialUpdated) and event.epochs and not removed:
            removed.append(event.trial_id)
            (tmp_path / "search").rename(tmp_path / "moved")

    with pytest.raises(RunFailed, match="removed or moved"):
        search_small(tmp_path, remove)


@pytest.mark.parametrize(
    ("file", "content", "left"),
    [
        ("metrics.csv", b"epoch,step,val_acc", 0),
        ("metrics.csv", b"epoch,step\n1,10\n2,2", 1),  # of 20
        ("metrics.csv", b"epoch,step\n1,10\n2\n3,30\n", 1),
        ("metrics.csv", b"epoch,step\n1,10\n\0\0\0\0\0\0", 1),
        ("metrics.csv", b"epoch,step\n1,10\n3,30\n", 1),
        ("metrics.csv", b"\xff\xfe\0", 0),
        ("metrics.csv", b"", 0),
    ],
)
def test_reading_metrics_that_were_cut_gives_the_rows_before(
    tmp_path: Path, file: str, content: bytes, left: int
) -> None:
    (tmp_path / file).write_bytes(content)
    rows = RunDirectory(tmp_path).read_metrics()
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 10)][:left]


@pytest.mark.parametrize("content", [b"", b'{"status": "compl', b"\0" * 40, b"[1]", b"\xff"])
def test_reading_a_summary_or_environment_that_was_cut_says_nothing(
    tmp_path: Path, content: bytes
) -> None:
    run = RunDirectory(tmp_path)
    for file in (run.summary_file, run.environment_file):
        file.write_bytes(content)
    assert run.read_summary() == {}
    assert run.started_with_fingerprint() is None
    assert run.trained_on() is None


def test_a_run_whose_folder_was_removed_meanwhile_says_so_and_how_to_resume(
    tmp_path: Path, few_digits: Path
) -> None:
    def remove(event: Event) -> None:
        if isinstance(event, EpochDone):
            shutil.rmtree(tmp_path / "a", ignore_errors=True)

    config = few(few_digits, tmp_path, max_epochs=3)
    with small_network(Small), pytest.raises(RunFailed) as caught:
        train(config, remove)
    first, second = str(caught.value).splitlines()
    assert first.endswith("its folder was removed or moved meanwhile; put it back")
    assert second.startswith("to resume: python -m cifar_dist.train --name a --resume")


def test_a_folder_that_becomes_read_only_is_to_be_made_writable(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from cifar_dist.storage import *\n"
        "os.getuid() or os.setuid(65534)\n"  # root may write everywhere
        "write_atomically(Path(sys.argv[1]), b'1')\n"
    )
    folder = Path(tempfile.mkdtemp())  # pytest's own is its user's alone
    folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "a.csv")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH}, timeout=PATIENCE_S,
    )  # fmt: skip
    folder.rmdir()
    assert done.stderr.strip().endswith(
        "a.csv: cannot be written (Permission denied); what was saved before is intact; make its "
        "folder writable"
    )


def test_an_interruption_says_how_to_resume_where_nothing_can_be_written(
    tmp_path: Path, few_digits: Path
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, EpochDone):
            (tmp_path / "a" / "summary.json").mkdir()  # in the way of the file
            raise Interrupted

    config = few(few_digits, tmp_path, max_epochs=3)
    with small_network(Small), pytest.raises(Interrupted, match=r"to resume: .* --name a --resume"):
        train(config, interrupt)


def test_reporting_a_run_and_a_search_whose_files_were_cut(
    tmp_path: Path, few_digits: Path
) -> None:
    config = few(few_digits, tmp_path, max_epochs=1)
    with small_network(Small):
        run = train(config).run
    other = shutil.copytree(str(run.path), tmp_path / "b")
    for name in ("environment.json", "test-predictions.safetensors", "summary.json", "metrics.csv"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "a" / name).read_bytes()[:30])
    for paths in ([run.path], [run.path, other]):
        assert report(paths, tmp_path / "page.html").is_file()
    found = make_search(str(tmp_path / "searches"))
    found.trials_parquet.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"trials.parquet: is damaged .* writes it anew"):
        report([found.path])
