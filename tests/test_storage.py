"""Runs in an object store: a real server that speaks S3, on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from cifar_dist.errors import UserError
from cifar_dist.model.networks import check_weights
from cifar_dist.model.weights import read_weights, shapes_of
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import StorePath, at, is_writable, write_atomically
from tests.conftest import run_command, started_command
from tests.object_store import BUCKET, CREDENTIALS
from tests.processes import PATIENCE_S


def test_a_store_path_does_what_a_path_does(store: str) -> None:
    folder = at(store) / "folder"
    assert isinstance(folder, StorePath)
    assert str(folder).startswith(f"s3://{BUCKET}/runs/folder?endpoint_override")
    assert at(str(folder)) == folder
    assert (folder.name, (folder / "a").parent) == ("folder", folder)
    assert not folder.exists()
    assert list(folder.iterdir()) == []
    folder.mkdir(parents=True)
    with pytest.raises(FileExistsError):
        folder.mkdir(parents=True)
    file = folder / "a.txt"
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    write_atomically(file, b"one")
    write_atomically(file, b"two")
    assert (file.is_file(), file.is_dir(), folder.is_dir()) == (True, False, True)
    assert file.read_text() == "two"
    (folder / "b.ckpt").write_bytes(b"")
    assert [each.name for each in folder.glob("*.txt")] == ["a.txt"]
    file.rename(file.with_name("c.txt"))
    assert sorted(each.name for each in folder.iterdir()) == ["b.ckpt", "c.txt"]
    (folder / "c.txt").unlink()
    (folder / "c.txt").unlink(missing_ok=True)
    assert is_writable(folder)
    folder.delete_folder()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/runs", "is no known kind of store"),
        ("s3://id:secret@bucket/runs", "holds credentials"),
        ("s3://bucket/runs?secret_key=hidden", "holds credentials"),
    ],
)
def test_addresses_that_are_no_good_are_refused(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        at(address)
    assert "hidden" not in str(refused.value)


def test_a_bucket_that_is_not_there_is_refused_in_one_line(store: str, tmp_path: Path) -> None:
    words = ["--dataset", "digits", "--num-workers", "0", "--max-epochs", "1"]
    elsewhere = store.replace(f"//{BUCKET}/", "//no-such-bucket/")
    done = run_command(tmp_path, *words, "--storage-path", elsewhere)
    assert done.code == 2
    assert "cannot be written" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_store_that_does_not_answer_is_said_in_one_line(tmp_path: Path) -> None:
    nowhere = "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"
    done = run_command(tmp_path, "--name", "run", "--resume", "--storage-path", nowhere)
    assert done.code == 2
    assert "s3://bucket/runs/run/config.yaml" in done.err
    assert "cannot be reached" in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_run_in_a_store_is_killed_and_goes_on_to_the_same_bits(
    store: str, few_digits: Path, tmp_path: Path
) -> None:
    words = [
        "--data-dir", str(few_digits), "--num-workers", "0", "--batch-size", "24", "--flip", "0",
        "--max-epochs", "3", "--storage-path",
    ]  # fmt: skip
    whole = run_command(tmp_path, *words, str(tmp_path / "disk"), "--name", "run")
    assert whole.code == 0, whole.err
    running = started_command(tmp_path, *words, store, "--name", "run")
    run = RunDirectory.at(store, "run")
    until = time.monotonic() + PATIENCE_S
    while not (run.checkpoints_newest_first() and run.read_metrics()):
        assert time.monotonic() < until
        assert running.poll() is None
        time.sleep(0.3)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert len(run.read_metrics()) < 3
    done = run_command(tmp_path, "--name", "run", "--resume", "--storage-path", store)
    assert done.code == 0, done.err
    on_disk = RunDirectory.at(str(tmp_path / "disk"), "run")
    assert run.read_summary()["weights_sha256"] == on_disk.read_summary()["weights_sha256"]
    assert {each.name for each in run.path.iterdir()} == {
        each.name for each in on_disk.path.iterdir()
    }
    starting = read_weights(str(run.model_file))
    assert len(starting["fc.bias"]) == 10
    file = str(run.model_file)
    assert check_weights(file, shapes_of(read_weights(file)), "resnet18", "imagenet") == 10
    measured = run_command(
        tmp_path, str(run.path), "--format", "json", module="cifar_dist.evaluate"
    )
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["accuracy"] == run.read_summary()["test_accuracy"]
    assert json.loads((run.path / "evaluation-test.json").read_text()) == json.loads(measured.out)
    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode()
    files = [*run.path.iterdir(), *run.checkpoints.iterdir()]
    for file in files:
        assert not file.is_file() or secret not in file.read_bytes()
    assert secret.decode() not in done.out + done.err + measured.out + measured.err
    assert json.loads(run.environment_file.read_text())["command"]
