"""Images a second of training: the project against the loops that a user would write.

``python -m benchmarks.step`` trains ResNet-18 (torchvision's stem, 32x32 pixels, batch 128, AdamW,
float32, CPU) in turn as a bare PyTorch loop, in plain Lightning and as the project with no and
with one Ray worker, each with as many threads as there are cores; and with two processes of half as
many as torchrun's DDP and as the project with two Ray workers. The project augments, counts
accuracy and keeps its record in this time; the peers' batches lie ready in memory. All but the
first epoch count. Determinism costs something by itself, so the project runs with it, as is its
default, and without, as its peers do.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import images as measured
from benchmarks.side_by_side import arguments, in_turn, ratios, say, write
from cifar_dist.runs import RunDirectory

IMAGES = 2_560
EPOCHS = 3
CORES = len(os.sched_getaffinity(0))


def output(words: list[str]) -> str:
    """What a command prints; it must succeed."""
    env = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def peer(which: str, folder: Path, processes: int, deterministic: bool) -> dict[str, float]:
    """A loop of `benchmarks.bare`."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    words = [*start, "benchmarks.bare", which, str(folder), f"--threads={CORES // processes}"]
    words += ["--epochs", str(EPOCHS), *(["--deterministic"] if deterministic else [])]
    rates = json.loads(output(words).strip().splitlines()[-1])
    return {"images_per_second": statistics.median(rates[1:])}


def project(folder: Path, workers: int, deterministic: bool) -> dict[str, float]:
    """``python -m cifar_dist.train``."""
    with tempfile.TemporaryDirectory() as runs:
        words = [
            sys.executable, "-m", "cifar_dist.train", "--data-dir", str(folder),
            "--num-workers", str(workers), "--max-epochs", str(EPOCHS), "--name", "run",
            "--storage-path", runs, "--checkpoint-every", str(EPOCHS),
            "--cpus-per-worker", str(CORES // max(workers, 1)),
            "--deterministic" if deterministic else "--no-deterministic",
        ]  # fmt: skip
        output(words)
        rows = RunDirectory.at(runs, "run").read_metrics()
        return {"images_per_second": statistics.median(r["images_per_second"] for r in rows[1:])}


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = arguments(__doc__, "step")
    parser.add_argument("--images", type=int, default=IMAGES)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured.write_folder(folder, chosen.images, 100)
        of = functools.partial
        alone: dict[str, Callable[[], dict[str, float]]] = {
            "bare loop": of(peer, "loop", folder, 1, False),
            "bare loop, deterministic": of(peer, "loop", folder, 1, True),
            "Lightning": of(peer, "lightning", folder, 1, False),
            "cifar_dist, no Ray": of(project, folder, 0, True),
            "cifar_dist, 1 worker": of(project, folder, 1, True),
            "cifar_dist, 1 worker, not deterministic": of(project, folder, 1, False),
        }
        pair: dict[str, Callable[[], dict[str, float]]] = {
            "torchrun DDP": of(peer, "loop", folder, 2, False),
            "torchrun DDP, deterministic": of(peer, "loop", folder, 2, True),
            "cifar_dist, 2 workers": of(project, folder, 2, True),
            "cifar_dist, 2 workers, not deterministic": of(project, folder, 2, False),
        }
        figures = in_turn({**alone, **pair}, chosen.repeats, chosen.warm_ups)
    for names, first in ((alone, "bare loop"), (pair, "torchrun DDP")):
        part = {each: figures[each] for each in names}
        say(part, "images_per_second", first, "images a second")
        for each, values in ratios(part, "images_per_second", f"{first}, deterministic").items():
            print(f"{each} over {first}, deterministic: {statistics.median(values):.3f}")
    about = {"images": chosen.images, "cores": CORES, "source": measured.source()}
    write(chosen.output, figures, **about)


if __name__ == "__main__":
    main()
