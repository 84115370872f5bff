"""Jobs on a real cluster that wants a token."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
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


def test_interrupting_saves_and_a_second_submit_goes_on(
    cluster: Head, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    words = train(tmp_path, "stopped", "--max-epochs", "3")
    running = subprocess.Popen(
        [sys.executable, "-m", "launch.submit", "--address", cluster.address, *words],
        cwd=ROOT, env=cluster.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if line.startswith("epoch 1/3"):
            running.send_signal(signal.SIGINT)
            break
    rest = running.stdout.read()
    assert running.wait(120) == 130, "".join(lines) + rest
    assert "asked the job to save and stop" in rest
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    done = submit(cluster, *train(tmp_path, "stopped", "--resume"))
    assert done.returncode == 0, done.stdout + done.stderr
    digest = [
        json.loads((run / "summary.json").read_text())["weights_sha256"]
        for run in (undisturbed[0], tmp_path / "stopped")
    ]
    assert digest[0] == digest[1]


def test_a_job_can_be_left_followed_listed_and_stopped(cluster: Head, tmp_path: Path) -> None:
    sent = submit(cluster, "--no-wait", *train(tmp_path, "left", "--max-epochs", "500"))
    assert sent.returncode == 0
    job = sent.stdout.split()[1].rstrip(";")
    deadline = time.monotonic() + 120
    while not (tmp_path / "left" / "metrics.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(1)
    assert re.search(rf"^{job} +RUNNING", submit(cluster, "--list").stdout, re.MULTILINE)
    assert submit(cluster, "--stop", job).returncode == 0
    followed = submit(cluster, "--follow", job)
    assert followed.returncode == 130
    assert "to go on: python -m cifar_dist.train --name left --resume" in followed.stdout


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
    for title in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert secret not in title.read_bytes()
        except OSError:
            continue
    assert secret.decode() not in undisturbed[1]
