"""What docs/extending.md shows, done: in a copy of the package, by its lines alone."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.processes import PATIENCE_S

BLOCK = re.compile(
    r"```python\n# (?P<file>\S+?\.py)(?:, (?P<where>[^\n]+))?\n(?P<code>.*?)```", re.S
)
ADDED = {"dataset": "stripes", "network": "tiny", "optimizer": "rmsprop", "schedule": "linear",
         "augment": "invert", "logger": "csv"}  # fmt: skip


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with everything that the page shows."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("cifar_dist", "tune_spaces"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for block in BLOCK.finditer((ROOT / "docs" / "extending.md").read_text()):
        file, where, code = folder / block["file"], block["where"], block["code"]
        if where is None:
            assert not file.exists(), f"{block['file']} is there already"
            file.write_text(code)
        elif where == "at its end":
            file.write_text(f"{file.read_text()}\n\n{code}")
        else:  # in a registry: after the line that opens its names
            registry = where.removeprefix("in ")
            pattern = rf"(^{registry} = \w+\([^{{]*\{{)\s*"
            text, found = re.subn(pattern, rf"\1\n{code}        ", file.read_text(), flags=re.M)
            assert found == 1, registry
            file.write_text(text)
    return folder


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)}, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_page_shows_trains_and_is_evaluated(extended: Path) -> None:
    flags = [f"--{name}={value}" for name, value in ADDED.items()]
    out = run(extended, "cifar_dist.train", *flags, "--num-workers=0", "--max-epochs=3",
              "--batch-size=30", "--lr=0.01", "--image-size=8", "--name=run")  # fmt: skip
    assert "tiny on stripes (270 training, 30 validation, 100 test images)" in out
    folder = extended / "runs" / "run"
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: settings[name] for name in ADDED} == ADDED
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [float(row["val_error"]) for row in rows] == [
        pytest.approx(1 - float(row["val_accuracy"])) for row in rows
    ]
    # A schedule to zero, by step: the last step of 27 is at 1/27 of the first one's rate.
    assert float(rows[-1]["lr"]) == pytest.approx(0.01 / 27)
    logged = list(csv.DictReader((folder / "csv" / "metrics.csv").open()))
    assert [row["val_error"] for row in logged] == [row["val_error"] for row in rows]
    summary = json.loads((folder / "summary.json").read_text())
    said = json.loads(run(extended, "cifar_dist.evaluate", "runs/run", "--format", "json"))
    assert said["accuracy"] == summary["test_accuracy"]
    assert [row["class"] for row in said["per_class"]] == ["noise", "stripes"]


def test_each_addition_takes_under_ten_lines() -> None:
    blocks = list(BLOCK.finditer((ROOT / "docs" / "extending.md").read_text()))
    assert len(blocks) == 15
    for block in blocks:
        assert len([line for line in block["code"].splitlines() if line.strip()]) < 10, block[
            "file"
        ]
