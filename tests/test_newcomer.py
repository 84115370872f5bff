"""A newcomer's path: `make train`, then what the output says to type, and what that says."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command

pytestmark = pytest.mark.slow


def suggested(said: str) -> tuple[str, list[str]]:
    """Module and words of the command that an output ends with."""
    found = re.findall(r"^next: (.*)$", said, re.MULTILINE)
    python, dash_m, module, *words = shlex.split(found[-1])
    assert (python, dash_m) == ("python", "-m")
    return module, words


def make_train() -> list[str]:
    """The words of the command that `make train` types."""
    said = subprocess.run(
        ["make", "--dry-run", "--assume-old=setup", "train"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    words = shlex.split(next(line for line in said if "cifar_dist.train" in line))
    return words[words.index("cifar_dist.train") + 1 :]


def test_each_output_names_the_next_step(tmp_path: Path) -> None:
    if not (ROOT / "Makefile").exists():
        pytest.skip("the path begins with the Makefile")
    done = run_command(tmp_path, *make_train())
    gone = []
    while "next: " in done.out + done.err:
        assert done.code == 0, done.err
        module, words = suggested(done.out + done.err)
        gone.append(module.removeprefix("cifar_dist."))
        assert len(gone) < 9, gone
        done = run_command(tmp_path, *words, module=module)
    assert (done.code, gone) == (0, ["evaluate", "predict", "export"])
    assert "297 of 297 get the same class" in done.out
    assert "to load it: " in done.out
    run = next((tmp_path / "runs").iterdir())
    assert {each.name for each in run.iterdir()} >= {
        "evaluation-test.json", "evaluation-test.csv", "hardest-test", "model.pt2", "report.html",
    }  # fmt: skip
