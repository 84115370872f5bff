"""Images a second of training: the project against the loops that a user would write.

``python -m benchmarks.step`` trains ResNet-18 (torchvision's stem, 32x32 pixels, batch 128, AdamW,
float32, CPU) in turn as a bare PyTorch loop, in plain Lightning and as the project without Ray and
with one Ray worker, with as many threads as there are cores; as a bare loop and one Ray worker with
one thread; and with two processes that share the cores as torchrun's DDP and as the project with
two Ray workers. torchrun's DDP runs with torch's defaults, and as someone who knows it would write
it: fused optimizer, gradients as views of buckets, no broadcast of buffers, and glibc told to keep
what a step frees. The project augments, counts accuracy and keeps its record in this time; the
peers' batches lie ready in memory. All but each process's first two epochs count. Determinism
costs something by itself, so the project runs with it, as is its default, and without, as its peers
do.
Where a step's time goes is measured in runs of their own, see `benchmarks.shares`, and what it
costs the host with a network of nothing in others, see `benchmarks.host`.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import images as measured
from benchmarks import shares
from benchmarks.side_by_side import Figures, arguments, cell, in_turn, output, say, write
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training.memory import LARGEST_MMAP_THRESHOLD, LARGEST_TRIM_THRESHOLD

IMAGES = 2_560
EPOCHS = 4
UNCOUNTED = 2
"""Epochs of a process: one warms up, and in the second the first one's checkpoint is written."""
LR = "1e-12"
"""So that no later epoch is better than the first, whose checkpoint is then the only one before the
end: what checkpoints cost is what `benchmarks.checkpoint` measures, and the peers write none."""
CORES = len(os.sched_getaffinity(0))
Measure = Callable[[], dict[str, float]]


KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST_MMAP_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": str(LARGEST_TRIM_THRESHOLD),
}
"""What the project tells glibc, as the environment says it."""


def peer(
    which: str, folder: Path, processes: int, threads: int, tuned: bool = False
) -> dict[str, float]:
    """A loop of `benchmarks.bare`, with so many threads in each process."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    words = [*start, "benchmarks.bare", which, str(folder), f"--threads={threads}"]
    words += [f"--epochs={EPOCHS}", "--settings", json.dumps({"fused": tuned, "tuned": tuned})]
    if tuned:
        words = ["env", *(f"{name}={value}" for name, value in KEEP_FREED_MEMORY.items()), *words]
    rates = json.loads(output(words).strip().splitlines()[-1])
    return {"images_per_second": statistics.median(rates[UNCOUNTED:])}


def command(folder: Path, runs: str, workers: int, threads: int, deterministic: bool) -> list[str]:
    """The arguments of ``cifar_dist.train``."""
    return [
        "--data-dir", str(folder), f"--num-workers={workers}", f"--max-epochs={EPOCHS}",
        "--name=run", "--storage-path", runs, "--no-report", f"--checkpoint-every={EPOCHS}",
        f"--cpus-per-worker={threads}", f"--lr={LR}",
        "--deterministic" if deterministic else "--no-deterministic",
    ]  # fmt: skip


def project(folder: Path, workers: int, threads: int, deterministic: bool) -> dict[str, float]:
    """``python -m cifar_dist.train``."""
    with tempfile.TemporaryDirectory() as runs:
        words = command(folder, runs, workers, threads, deterministic)
        output([sys.executable, "-m", "cifar_dist.train", *words])
        return rates_of(runs)


def rates_of(runs: str) -> dict[str, float]:
    """Images a second of the run there, the median of the epochs that count."""
    rows = RunDirectory.at(runs, "run").read_metrics()
    rates = [row["images_per_second"] for row in rows[UNCOUNTED:]]
    return {"images_per_second": statistics.median(rates)}


def without_ray(folder: Path) -> dict[str, float]:
    """Two ranks of the project under torchrun, see `benchmarks.without_ray`."""
    with tempfile.TemporaryDirectory() as runs:
        words = command(folder, runs, 2, max(CORES // 2, 1), deterministic=False)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
        output([sys.executable, *torchrun, "-m", "benchmarks.without_ray", *words])
        return rates_of(runs)


def host(which: str) -> dict[str, float]:
    """Milliseconds of a step of `benchmarks.host`, the median of the epochs after the first."""
    found = json.loads(output([sys.executable, "-m", "benchmarks.host", which]).splitlines()[-1])
    return {"milliseconds": statistics.median(found[1:])}


def parts(folder: Path, workers: int, threads: int) -> dict[str, float]:
    """Seconds of each part of a step of the project."""
    with tempfile.TemporaryDirectory() as runs:
        file = Path(runs) / "shares.json"
        os.environ[shares.FILE] = str(file)
        words = command(folder, runs, workers, threads, deterministic=False)
        output([sys.executable, "-m", "benchmarks.shares", *words])
        found: dict[str, float] = json.loads(file.read_text())
        return found


def subjects(folder: Path) -> dict[str, dict[str, Measure]]:
    """What is measured, by part and name; a part's first is what its others are compared with."""
    of = functools.partial
    half = max(CORES // 2, 1)
    return {
        "alone": {
            f"bare loop, {CORES} threads": of(peer, "loop", folder, 1, CORES),
            f"Lightning, {CORES} threads": of(peer, "lightning", folder, 1, CORES),
            f"cifar_dist without Ray, {CORES} threads": of(project, folder, 0, CORES, False),
            f"cifar_dist, 1 worker, {CORES} threads": of(project, folder, 1, CORES, False),
        },
        "one": {
            "bare loop, 1 thread": of(peer, "loop", folder, 1, 1),
            "cifar_dist, 1 worker, 1 thread": of(project, folder, 1, 1, False),
        },
        "two": {
            "torchrun DDP, tuned": of(peer, "loop", folder, 2, half, True),
            "torchrun DDP": of(peer, "loop", folder, 2, half),
            "cifar_dist under torchrun, without Ray": of(without_ray, folder),
            "cifar_dist, 2 workers": of(project, folder, 2, half, False),
            "cifar_dist, 2 workers, deterministic": of(project, folder, 2, half, True),
        },
        "host": {
            "bare loop, nothing": of(host, "loop"),
            "Lightning, nothing": of(host, "lightning"),
            "cifar_dist without Ray, nothing": of(host, "project"),
        },
        "shares": {
            f"without Ray, {CORES} threads": of(parts, folder, 0, CORES),
            "2 workers": of(parts, folder, 2, half),
        },
    }


def show(part: str, figures: Figures) -> None:
    """Print a part's figures as a Markdown table."""
    first = next(iter(figures))
    if part == "host":
        say(figures, "milliseconds", first, "milliseconds of a step of nothing", ".2f")
    elif part != "shares":
        say(figures, "images_per_second", first, "images a second")
    else:
        print("\n| milliseconds of a step | " + " | ".join(figures) + " |\n|---|---|---|")
        for key in figures[first][0]:
            cells = [cell([1000 * each[key] for each in runs], ".1f") for runs in figures.values()]
            print(f"| {key} | {' | '.join(cells)} |")


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = arguments(__doc__, "step")
    parser.add_argument("--images", type=int, default=IMAGES)
    parts_known = tuple(subjects(Path()))
    parser.add_argument("--part", choices=parts_known, nargs="+", default=parts_known)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured.write_folder(folder, chosen.images, 100)
        figures = {
            part: in_turn(each, chosen.repeats, chosen.warm_ups)
            for part, each in subjects(folder).items()
            if part in chosen.part
        }
    for part, found in figures.items():
        show(part, found)
    about = {"images": chosen.images, "cores": CORES, "source": measured.source()}
    flat = {name: runs for found in figures.values() for name, runs in found.items()}
    write(chosen.output, flat, **about)


if __name__ == "__main__":
    main()
