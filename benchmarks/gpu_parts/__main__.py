"""Runs one part of the GPU campaign by hand or for `benchmarks.gpu_campaign`.

``python -m benchmarks.gpu_parts NAME --work FOLDER --found FILE``: what the part finds is written
to the file as it is found, so that a part which is killed at its limit leaves what it has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu_parts import RUNS
from benchmarks.gpu_parts.findings import Findings, Lacking, reported
from benchmarks.gpu_parts.here import Here


def main() -> int:
    """Run one part; return 1 if a promise that it tests does not hold."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=RUNS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--found", type=Path, required=True)
    chosen = parser.parse_args()
    found = Findings(chosen.found)
    with reported(found):
        if chosen.device == "cuda" and not torch.cuda.is_available():
            raise Lacking("torch finds no GPU here")
        RUNS[chosen.part](Here(chosen.device, chosen.work, found))
    return int(bool(found.reason) and not found.skipped)


if __name__ == "__main__":
    sys.exit(main())
