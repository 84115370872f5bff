"""Memory of a node's workers, and what one more of them costs.

``python -m benchmarks.memory`` trains the project with 1, 2 and 4 Ray workers. At the third step
each worker reads every image through its own mapping of the decoded data set, waits for the
others, and takes from ``/proc/self/smaps`` what the kernel says of it: its private and shared
memory in all, and of the data set's mapping. A mapping's proportional share (Pss) counts a page
that n processes share as 1/n in each, so its sum over workers is what the node spends. Needs Linux,
and real CIFAR-10 images in ``CIFAR_DIST_DATA``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import arguments, cell, in_turn, write
from cifar_dist.errors import RunFailed

FOLDER = "CIFAR_DIST_BENCHMARK_MARKS"
STEP = 3
MIB = 2**20


def smaps(of: str | None = None) -> dict[str, float]:
    """MiB of this process that are private, shared, and proportionally its own.

    Args:
        of: only mappings of files with this in their path.
    """
    sums = {"private": 0, "shared": 0, "proportional": 0}
    counts = of is None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = of is None or of in line
        elif counts and (found := re.match(r"(Private|Shared)_\w+: +(\d+) kB", line)):
            sums[found[1].lower()] += int(found[2]) * 1024
        elif counts and (found := re.match(r"Pss: +(\d+) kB", line)):
            sums["proportional"] += int(found[1]) * 1024
    return {name: value / MIB for name, value in sums.items()}


def measure_at_step(read_all: Callable[[], None], path: str) -> None:
    """Have this worker leave its figures behind its third optimizer step."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = 0

    def hook(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps != STEP:
            return
        read_all()
        torch.distributed.barrier()
        figures = {"all": smaps(), "data set": smaps(path)}
        torch.distributed.barrier()
        rank = torch.distributed.get_rank()
        (Path(os.environ[FOLDER]) / f"memory{rank}").write_text(json.dumps(figures))
        torch.distributed.barrier()
        raise RunFailed("measured")  # nothing else is wanted of this run

    register_optimizer_step_post_hook(hook)


def measured_worker(work: Any) -> Any:
    """The project's worker, which measures itself."""
    import gc

    from cifar_dist.cluster.trainer import train_worker
    from cifar_dist.data.cache import prepare_same

    config = work.config
    dataset = prepare_same(config.dataset, config.data_dir, work.dataset_fingerprint)

    def read_all() -> None:
        from cifar_dist.data.datamodule import ImageDataModule

        modules = [each for each in gc.get_objects() if isinstance(each, ImageDataModule)]
        assert len(modules) == 1
        assert modules[0]._train.images.sum() > 0

    measure_at_step(read_all, dataset.path.name)
    return train_worker(work)


def project(workers: int) -> None:
    """``python -m cifar_dist.train`` with workers that measure themselves."""
    import ray

    from cifar_dist.cluster import trainer
    from cifar_dist.config.train import TrainConfig
    from cifar_dist.train import train

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    trainer.train_on_ray = functools.partial(trainer.train_on_ray, worker=measured_worker)
    config = TrainConfig(
        data_dir=os.environ["CIFAR_DIST_DATA"], num_workers=workers, max_epochs=1,
        storage_path=os.environ[FOLDER], name="run", report=False,
    )  # fmt: skip
    with contextlib.suppress(RunFailed):
        train(config)


def of_run(workers: int) -> dict[str, float]:
    """Sums over a run's workers, in MiB."""
    with tempfile.TemporaryDirectory() as marks:
        words = [sys.executable, "-m", "benchmarks.memory", "--run", str(workers)]
        env = {**os.environ, FOLDER: marks}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [Path(marks) / f"memory{rank}" for rank in range(workers)]
        found = [json.loads(file.read_text()) for file in files]
    return {
        f"{what}, {kind}": sum(each[what][kind] for each in found)
        for what in ("all", "data set")
        for kind in ("private", "shared", "proportional")
    }


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = arguments(__doc__, "memory", repeats=1)
    parser.add_argument("--run", type=int, help="for the runs' own processes")
    chosen = parser.parse_args()
    if chosen.run:
        project(chosen.run)
        return
    if "CIFAR_DIST_DATA" not in os.environ:
        print("memory: skipped, CIFAR_DIST_DATA names no folder of CIFAR-10 images")
        return
    subjects = {f"{count} workers": functools.partial(of_run, count) for count in (1, 2, 4)}
    figures = in_turn(subjects, chosen.repeats, chosen.warm_ups)
    print("| MiB, over all workers | " + " | ".join(subjects) + " |")
    print("|" + "---|" * (len(subjects) + 1))
    for key in figures["1 workers"][0]:
        cells = [cell([each[key] for each in runs], ",.1f") for runs in figures.values()]
        print(f"| {key} | {' | '.join(cells)} |")
    write(chosen.output, figures)


if __name__ == "__main__":
    main()
