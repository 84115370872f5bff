"""What a worker does not load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import PATIENCE_S

LOADS = """
import sys
from cifar_dist.training.torchmetrics_alone import load_torchmetrics_alone

load_torchmetrics_alone()
import cifar_dist.training.fit
import lightning.pytorch

print([name for name in ("matplotlib", "scipy") if name in sys.modules])

import torch
from torchmetrics import SumMetric

metric = SumMetric()
metric.update(torch.tensor([1.0, 2.0]))
import matplotlib.pyplot
import scipy.signal

print(float(metric.compute()), matplotlib.pyplot.__name__, scipy.signal.__name__)
"""


def test_workers_load_neither_matplotlib_nor_scipy_unless_they_ask() -> None:
    words = [sys.executable, "-c", LOADS]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert done.stdout.splitlines() == ["[]", "3.0 matplotlib.pyplot scipy.signal"]


def test_a_package_that_needs_a_hidden_one_is_hidden_too(tmp_path: Path) -> None:
    # As on a machine with transformers, which loads scikit-learn, which loads SciPy.
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("import scipy.sparse\n")
    (tmp_path / "transformers-5.17.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n"
    (tmp_path / "transformers-5.17.0.dist-info" / "METADATA").write_text(metadata)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = (
        "import sys; from cifar_dist.training.torchmetrics_alone import load_torchmetrics_alone; "
        "load_torchmetrics_alone(); import torchmetrics; print('transformers' in sys.modules)"
    )
    words = [sys.executable, "-c", asked]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_what_was_hidden_is_found_again() -> None:
    asked = (
        "from cifar_dist.training.torchmetrics_alone import load_torchmetrics_alone; "
        "load_torchmetrics_alone(); from lightning_utilities.core.imports import RequirementCache, "
        "package_available; print(package_available('scipy'), bool(RequirementCache('scipy>=1')))"
    )
    words = [sys.executable, "-c", asked]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert done.stdout == "True True\n"
