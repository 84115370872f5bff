"""What parts of the GPU campaign work with: a device, data sets, runs, and commands they start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import images as measured
from benchmarks.gpu_parts.findings import Findings

DATA = {
    "cuda": {"full": (50_000, 10_000), "rates": (25_000, 512), "few": (10_000, 1_000)},
    "cpu": {"full": (144, 32), "rates": (144, 32), "few": (144, 32)},
}
"""Training and test images of each data set; a tenth of the training images validate."""
BATCH = {"cuda": 128, "cpu": 16}
"""Batch size on ``few``: some 70 steps an epoch on a GPU, some 9 in a rehearsal."""


@dataclass(frozen=True)
class Here:
    """What a part works with."""

    device: str
    """``cuda`` or ``cpu``."""
    work: Path
    """A folder that goes when the campaign ends; parts share the data sets in it."""
    found: Findings

    def folder(self, data: str) -> Path:
        """Return the folder of a data set, written if it is not there."""
        given = os.environ.get("CIFAR_DIST_DATA")
        if data == "full" and given and self.device == "cuda":
            return Path(given)
        folder = self.work / f"data-{data}"
        if not folder.exists():
            beside = self.work / f"unfinished-{data}"
            shutil.rmtree(beside, ignore_errors=True)
            measured.write_folder(beside, *DATA[self.device][data])
            beside.rename(folder)
        return folder

    @property
    def runs(self) -> Path:
        """Where runs go."""
        return self.work / "runs"

    def fitted(self, name: str, data: str, settings: Mapping[str, Any], **options: Any) -> Any:
        """Train in this process, without the command line and Ray; return `fit`'s outcome.

        Args:
            name: the run's.
            data: the data set.
            settings: of `TrainConfig`; a ``preset`` counts.
            options: of `fit`.
        """
        from cifar_dist.config.train import make_config
        from cifar_dist.data.cache import prepare
        from cifar_dist.data.datasets import find_source
        from cifar_dist.runs.directory import RunDirectory
        from cifar_dist.training.fit import fit

        config = make_config(
            {
                "data_dir": str(self.folder(data)), "num_workers": 0, "report": False,
                "use_gpu": self.device == "cuda", "storage_path": str(self.runs), "name": name,
                **settings,
            }
        )  # fmt: skip
        run = RunDirectory.create(config)
        run.write_config(config)
        dataset = prepare(config.dataset, find_source(config.dataset, str(config.data_dir)))
        return fit(config, run, dataset, **options)

    def command(self, command: str, *words: str) -> list[str]:
        """Return ``python -m cifar_dist.COMMAND`` with the flags that all runs have."""
        gpu = ["--use-gpu"] if self.device == "cuda" else []
        shared = ["--storage-path", str(self.runs), "--no-report", *gpu]
        return [sys.executable, "-m", f"cifar_dist.{command}", *shared, *words]

    def train(self, name: str, data: str, *words: str) -> list[str]:
        """Return the command that trains a run of this name."""
        return self.command("train", "--name", name, "--data-dir", str(self.folder(data)), *words)

    def read_summary(self, name: str) -> dict[str, Any]:
        """Return ``summary.json`` of a run."""
        found: dict[str, Any] = json.loads((self.runs / name / "summary.json").read_text())
        return found


def started(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own."""
    print("+", " ".join(words), flush=True)
    return subprocess.Popen(words, start_new_session=True, **options)


def succeeded(process: subprocess.Popen[bytes]) -> str:
    """Return what a command printed where that was piped; it must exit with 0."""
    output = process.communicate()[0]
    if process.returncode:
        words = " ".join(map(str, process.args))  # type: ignore[arg-type]
        raise RuntimeError(f"exit code {process.returncode} of: {words}")
    return output.decode() if output else ""
