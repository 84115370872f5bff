"""What each use of Ray's private names gains at a run's start: all of them, and all but one.

``python -m benchmarks.ray_gains`` runs a run of two workers and one step, with the gains of
`cifar_dist.cluster.ray_internals` that shorten a start, then with each switched off by itself, then
with the public API only, in turn (A B C ... A B C ...). Two figures of each: seconds from the
command's start to the first epoch's end, and to the command's end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.side_by_side import arguments, in_turn, say, write

TRAIN = [
    "--dataset", "digits", "--num-workers", "2", "--max-epochs", "1", "--batch-size", "1350",
    "--no-report", "--name", "run",
]  # fmt: skip


def cluster_whole() -> None:
    """Start the cluster with autoscaler and log monitor."""
    from cifar_dist.cluster import ray_internals

    ray_internals.lean_cluster = lambda log_monitor: contextlib.nullcontext()


def nodes_shared_out() -> None:
    """Ask for nodes through the process that shares them out."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    from cifar_dist.cluster import ray_internals

    ray_internals._fixed_number = FixedScalingPolicy


def all_callbacks() -> None:
    """Keep the controller's callbacks that the project has no use for."""
    import ray.train.v2.api.data_parallel_trainer  # binds the real ones
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback

    class Nothing:
        pass

    assert ray.train.v2.api.data_parallel_trainer
    datasets.DatasetsCallback = Nothing
    placement_group_callback.PlacementGroupCleanerCallback = Nothing


def torch_in_controller() -> None:
    """Have Ray's own configuration make the process group, which loads torch in the controller."""
    from cifar_dist.cluster import ray_internals

    def process_group(backend: str) -> Any:
        from ray.train.torch import TorchConfig

        return TorchConfig(backend=backend)

    ray_internals._process_group = process_group


OFF: dict[str, Callable[[], None]] = {
    "the cluster's monitors": cluster_whole,
    "a fixed number of workers": nodes_shared_out,
    "no unused callbacks": all_callbacks,
    "no torch in the controller": torch_in_controller,
}
"""What switches a gain off in the driver, by the gain's name."""


def started(gain: str, plain: str = "0") -> Callable[[], dict[str, float]]:
    """Return what measures a run without one gain; with all of them if ``gain`` is empty."""

    def measure() -> dict[str, float]:
        env = {**os.environ, "CIFAR_DIST_PLAIN_RAY": plain, "RAY_ADDRESS": "local"}
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "benchmarks.ray_gains", "--run-without", gain]
            words += [f"--folder={folder}"]
            began, first = time.time(), 0.0
            with subprocess.Popen(
                words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as running:
                assert running.stdout is not None
                for line in running.stdout:
                    if line.startswith("epoch 1/1"):
                        first = time.time() - began
            assert running.returncode == 0
            return {"first": first, "whole": time.time() - began}

    return measure


def main() -> None:
    """Measure, or be one of the measured runs."""
    parser = arguments(__doc__, "ray_gains", repeats=3)
    parser.add_argument("--run-without", choices=("", *OFF))
    parser.add_argument("--folder")
    chosen = parser.parse_args()
    if chosen.run_without is not None:
        from cifar_dist import train

        if chosen.run_without:
            OFF[chosen.run_without]()
        sys.exit(train.main([*TRAIN, "--storage-path", chosen.folder]))
    subjects = {"all gains": started(""), **{f"without {name}": started(name) for name in OFF}}
    subjects["public API only"] = started("", plain="1")
    figures = in_turn(subjects, chosen.repeats, chosen.warm_ups)
    say(figures, "first", "all gains", "first epoch done, s", ".1f")
    say(figures, "whole", "all gains", "command ended, s", ".1f")
    write(chosen.output, figures)


if __name__ == "__main__":
    main()
