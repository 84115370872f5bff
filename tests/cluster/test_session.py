"""The connection to Ray."""

import subprocess
import sys

from cifar_dist.cluster.session import find_token, token_advice
from tests.conftest import NEEDS_RAY_INTERNALS, ROOT
from tests.processes import PATIENCE_S

SESSION = """
import os

from cifar_dist.cluster.ray_internals import started_here
from cifar_dist.cluster.session import session
from tests.processes import descendants

with session():
    running = [title for pid, title in descendants().items() if pid != os.getpid()]
    print(started_here(), any("raylet" in each for each in running))
    print([each for each in running if "/monitor.py" in each or "/log_monitor.py" in each])
"""


@NEEDS_RAY_INTERNALS
def test_a_session_starts_no_processes_that_it_has_no_use_for() -> None:
    words = [sys.executable, "-c", SESSION]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert done.stdout.splitlines() == ["True True", "[]"]


def test_the_public_api_takes_a_token_when_told_to(monkeypatch) -> None:
    monkeypatch.setenv("CIFAR_DIST_PLAIN_RAY", "1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert token_advice().endswith("to use that of RAY_AUTH_TOKEN set RAY_AUTH_MODE=token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert token_advice() == "the cluster wants another token than that of RAY_AUTH_TOKEN"


def test_tokens_are_found_where_ray_finds_them(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token() is None
    default = tmp_path / ".ray" / "auth_token"
    default.parent.mkdir()
    default.write_text("t")
    assert find_token() == str(default)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert find_token() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert find_token() == "RAY_AUTH_TOKEN"
