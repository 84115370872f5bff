"""Tests leave no process behind."""

from __future__ import annotations

import subprocess
import sys

from tests import processes


def test_a_process_that_left_its_parent_and_its_session_is_found_and_ended(monkeypatch) -> None:
    monkeypatch.setenv(processes.MARK, "")  # restored afterwards
    mark = processes.mark_own()
    # The one that sleeps outlives its parent, in a session of its own.
    parent = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(600)'], start_new_session=True, stdout=-3, stderr=-3).pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    )
    orphan = int(done.stdout)
    assert list(processes.end_marked(mark, wait_s=0)) == [orphan]
    assert processes.end_marked(mark, wait_s=10) == {}
