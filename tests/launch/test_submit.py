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

from tests.conftest import ROOT
from tests.launch.cluster import Head, head


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head() as started:
        yield started


def submit(
    cluster: Head, *words: str, token_file: Path | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.submit", "--address", cluster.address, *words],
        cwd=cwd, env=cluster.environment(token_file), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def train(storage: Path, name: str, *words: str) -> list[str]:
    return ["--image-has-it", "--", "train", "--dataset", "digits", "--num-workers", "2",
            "--storage-path", str(storage), "--name", name, *words]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(cluster: Head, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a submitted run, and what submit printed."""
    storage = tmp_path_factory.mktemp("storage")
    done = submit(cluster, *train(storage, "undisturbed", "--max-epochs", "3"))
    assert done.returncode == 0, done.stdout + done.stderr
    return storage / "undisturbed", done.stdout


def test_a_submitted_run_is_shown_and_complete(undisturbed: tuple[Path, str]) -> None:
    run, said = undisturbed
    assert re.search(r"^job raysubmit_\w+; to follow it: python -m launch.submit", said)
    assert "epoch 3/3" in said
    assert "done in" in said
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


def test_a_failing_job_gives_its_own_code(cluster: Head, tmp_path: Path) -> None:
    # A name that is taken is refused on the cluster, with 2.
    (tmp_path / "taken").mkdir()
    done = submit(cluster, *train(tmp_path, "taken"))
    assert done.returncode == 2
    assert "--name taken" in done.stdout


def test_interrupting_saves_and_a_later_submit_goes_on_to_the_same_bits(
    cluster: Head, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    words = train(tmp_path, "stopped", "--max-epochs", "3")
    running = subprocess.Popen(
        [sys.executable, "-m", "launch.submit", "--address", cluster.address, *words],
        cwd=ROOT, env=cluster.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert running.stdout is not None
    job = running.stdout.readline().split()[1].rstrip(";")
    _until(running, "epoch 1/3")
    assert_in_no_title(cluster.token_file.read_bytes())
    running.send_signal(signal.SIGINT)
    _until(running, "asked the job to save and stop")
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"{job} runs on; to follow it: python -m launch.submit" in said

    followed = submit(cluster, "--follow", job)
    assert followed.returncode == 130
    assert "to go on: python -m cifar_dist.train --name stopped --resume" in followed.stdout
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert len((tmp_path / "stopped" / "metrics.csv").read_text().splitlines()) < 4

    done = submit(cluster, *train(tmp_path, "stopped", "--resume"))
    assert done.returncode == 0, done.stdout + done.stderr
    digests = [
        json.loads((run / "summary.json").read_text())["weights_sha256"]
        for run in (undisturbed[0], tmp_path / "stopped")
    ]
    assert digests[0] == digests[1]


def _until(running: subprocess.Popen[str], begins: str) -> None:
    """Read a process's lines until one begins so."""
    assert running.stdout is not None
    seen = []
    for line in running.stdout:
        seen.append(line)
        if line.startswith(begins):
            return
    raise AssertionError("".join(seen))


def test_a_job_can_be_left_listed_stopped_and_followed(cluster: Head, tmp_path: Path) -> None:
    sent = submit(cluster, "--no-wait", *train(tmp_path, "left"))
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


def test_no_secret_is_left_anywhere(cluster: Head, undisturbed: tuple[Path, str]) -> None:
    secret = cluster.token_file.read_bytes()
    searched = 0
    for folder in (cluster.folder, undisturbed[0]):
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                searched += 1
                assert secret not in file.read_bytes(), file
    assert searched > 20
    assert_in_no_title(secret)
    assert secret.decode() not in undisturbed[1]


def assert_in_no_title(secret: bytes) -> None:
    """See that no process of the machine shows it in its command line."""
    for title in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            assert secret not in title.read_bytes()
