"""What malloc does with memory that a step frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cifar_dist.training.memory import _glibc
from tests.processes import PATIENCE_S

STEPS = """
import resource, threading
from contextlib import nullcontext
import numpy as np
from cifar_dist.training.memory import freed_memory_kept, threads_share_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(2**18) for _ in range(32)]  # 2 MiB each, written to
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def steps():
    with {how}():
        first = faults_of_a_step()
        print(first, min(faults_of_a_step() for _ in range(3)))

threads_share_memory()
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""
PAGES = 32 * 2**21 // 4096
"""Of a step."""


@pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")
@pytest.mark.parametrize("kept", [False, True])
def test_later_steps_take_no_new_memory_where_it_is_kept(kept: bool) -> None:
    steps = STEPS.replace("{how}", "freed_memory_kept" if kept else "nullcontext")
    words = [sys.executable, "-c", steps]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    first, later = map(int, done.stdout.split())
    assert first > PAGES / 2
    if kept:
        assert later < PAGES / 100
    else:  # else there were nothing to mend
        assert later > PAGES / 10
