"""What a worker does not load."""

from __future__ import annotations

import subprocess
import sys

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
