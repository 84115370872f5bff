"""Jobs on a real cluster that wants a token."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_dist.runs.directory import RunDirectory
from tests.conftest import ROOT
from tests.launch.cluster import Head, head
from tests.object_store import CREDENTIALS
from tests.processes import PATIENCE_S

EPOCHS = 4


@pytest.fixture(scope="module")
def cluster(store: str) -> Iterator[Head]:
    """A cluster whose nodes find the store's credentials in their environment."""
    with head() as started:
        yield started


def submit(
    cluster: Head, *words: str, token_file: Path | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.submit", "--address", cluster.address, *words],
        cwd=cwd, env=cluster.environment(token_file), capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip


def train(data: Path, storage: Path | str, name: str) -> list[str]:
    """The words that submit a run of two workers on digits."""
    return ["--image-has-it", "--", "train", "--data-dir", str(data), "--num-workers", "2",
            "--batch-size", "24", "--flip", "0", "--max-epochs", str(EPOCHS),
            "--storage-path", str(storage), "--name", name]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(cluster: Head, few_digits: Path, store: str) -> tuple[RunDirectory, str]:
    """A submitted run in an object store, and what submit printed."""
    done = submit(cluster, *train(few_digits, store, "undisturbed"))
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDirectory.at(store, "undisturbed"), done.stdout + done.stderr


@pytest.mark.slow
def test_a_submitted_run_is_shown_and_complete(undisturbed: tuple[RunDirectory, str]) -> None:
    run, said = undisturbed
    assert re.search(r"^job raysubmit_\w+; to follow it: python -m launch.submit", said)
    for epoch in range(1, EPOCHS + 1):
        assert f"epoch {epoch}/{EPOCHS}" in said
    assert "done in" in said
    assert run.read_summary()["status"] == "completed"
    assert {file.name for file in run.path.iterdir()} == {
        "checkpoints", "config.yaml", "environment.json", "metrics.csv", "model.safetensors",
        "report.html", "summary.json", "test-predictions.safetensors",
    }  # fmt: skip


@pytest.mark.slow
def test_a_submitted_evaluation_finds_what_the_run_found(
    cluster: Head, undisturbed: tuple[RunDirectory, str]
) -> None:
    run, _ = undisturbed
    done = submit(cluster, "--image-has-it", "--", "evaluate", str(run.path), "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert found["accuracy"] == run.read_summary()["test_accuracy"]
    assert json.loads((run.path / "evaluation-test.json").read_text()) == found


@pytest.mark.slow
def test_a_failing_job_gives_its_own_code(cluster: Head, few_digits: Path, tmp_path: Path) -> None:
    # A name that is taken is refused on the cluster, with 2.
    (tmp_path / "taken").mkdir()
    done = submit(cluster, *train(few_digits, tmp_path, "taken"))
    assert done.returncode == 2
    assert "--name taken" in done.stdout


@pytest.mark.slow
def test_interrupting_saves_and_a_later_submit_goes_on_to_the_same_bits(
    cluster: Head, undisturbed: tuple[RunDirectory, str], few_digits: Path, tmp_path: Path
) -> None:
    words = train(few_digits, tmp_path, "stopped")
    running = subprocess.Popen(
        [sys.executable, "-m", "launch.submit", "--address", cluster.address, *words],
        cwd=ROOT, env=cluster.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert running.stdout is not None
    job = running.stdout.readline().split()[1].rstrip(";")
    _until(running, f"epoch 1/{EPOCHS}")
    assert_in_no_title(cluster.token_file.read_bytes())
    running.send_signal(signal.SIGINT)
    _until(running, "asked the job to save and stop")
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert f"{job} runs on; to follow it: python -m launch.submit" in said

    followed = submit(cluster, "--follow", job)
    assert followed.returncode == 130
    assert "to resume: python -m cifar_dist.train --name stopped --resume" in followed.stdout
    run = RunDirectory.at(str(tmp_path), "stopped")
    assert run.read_summary()["status"] == "interrupted"
    assert len(run.read_metrics()) < EPOCHS

    done = submit(cluster, *train(few_digits, tmp_path, "stopped"), "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    whole = undisturbed[0].read_summary()
    assert run.read_summary()["weights_sha256"] == whole["weights_sha256"]


def _until(running: subprocess.Popen[str], begins: str) -> None:
    """Read a process's lines until one begins so."""
    assert running.stdout is not None
    seen = []
    for line in running.stdout:
        seen.append(line)
        if line.startswith(begins):
            return
    raise AssertionError("".join(seen))


@pytest.mark.slow
def test_a_job_can_be_left_listed_stopped_and_followed(
    cluster: Head, few_digits: Path, tmp_path: Path
) -> None:
    sent = submit(cluster, "--no-wait", *train(few_digits, tmp_path, "left"))
    assert sent.returncode == 0
    job = sent.stdout.split()[1].rstrip(";")
    assert re.search(rf"^{job} +(PENDING|RUNNING)", submit(cluster, "--list").stdout, re.MULTILINE)
    stopped = submit(cluster, "--stop", job)
    assert stopped.returncode == 0
    assert f"asked {job} to stop" in stopped.stdout
    assert submit(cluster, "--follow", job).returncode == 130
    unknown = submit(cluster, "--follow", "raysubmit_none")
    assert unknown.returncode == 2
    assert "raysubmit_none: the cluster knows no such job; see --list" in unknown.stderr


@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "wrong"])
def test_no_token_and_a_wrong_one_are_refused_in_one_line(
    cluster: Head, tmp_path: Path, token: str
) -> None:
    file = tmp_path / "token"
    if token:
        file.write_text(token)
    done = submit(cluster, "--list", token_file=file)
    assert done.returncode == 2
    said = f"wants another token than that of RAY_AUTH_TOKEN_PATH {file}" if token else (
        "wants a token; put it into RAY_AUTH_TOKEN"
    )  # fmt: skip
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_no_secret_is_left_anywhere(cluster: Head, undisturbed: tuple[RunDirectory, str]) -> None:
    run, said = undisturbed
    logs = [file for file in cluster.folder.rglob("*") if not file.is_symlink()]
    files = [*logs, *run.path.iterdir(), *run.checkpoints.iterdir()]
    contents = {str(file): file.read_bytes() for file in files if file.is_file()}
    assert len(contents) > 20
    for secret in (cluster.token_file.read_bytes(), CREDENTIALS["AWS_SECRET_ACCESS_KEY"].encode()):
        assert [name for name, content in contents.items() if secret in content] == []
        assert secret.decode() not in said
        assert_in_no_title(secret)


def assert_in_no_title(secret: bytes) -> None:
    """See that no process of the machine shows it in its command line."""
    for title in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            assert secret not in title.read_bytes()
