"""What a search costs beside its trials: 64 trials of one second on two slots.

``python -m benchmarks.trial_overhead`` runs the project's search and Ray Tune bare, with fresh and
with reused processes, in turn (A B C A B C ...), each on a Ray cluster of its own. A trial sleeps
for a second and reports one result, so all else is overhead. Two figures of each:

- trials: from the first trial's start to the last one's end, over the ideal (sum of work over
  slots);
- before: seconds from the call to the first trial's start, with Ray running and the libraries
  loaded in the driver.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.side_by_side import arguments, in_turn, say, write

TRIALS, SLOTS, WORK_S = 64, 2, 1.0


def one_second(folder: Path, number: int) -> None:
    """A trial's work; leaves when it began and ended."""
    began = time.time()
    time.sleep(WORK_S)
    (folder / f"{number}.json").write_text(json.dumps([began, time.time()]))


def project(folder: Path) -> None:
    """The project's search."""
    from cifar_dist.cluster.trials import TrialWork
    from cifar_dist.config.tune import make_tune_config
    from cifar_dist.runs.metrics import METRICS
    from cifar_dist.tune import search

    def training(work: TrialWork) -> None:
        number = int(work.run.name.removeprefix("t"))
        one_second(folder, number)
        work.report({**dict.fromkeys(METRICS, 0.0), "epoch": 1, "val_accuracy": number / TRIALS})

    settings = {
        "dataset": "digits",
        "num_samples": TRIALS,
        "max_epochs": 1,
        "report": False,
        "storage_path": str(folder),
        "name": "search",
    }
    searched = search(make_tune_config(settings), training=training)
    assert list(searched.table["status"]) == ["completed"] * TRIALS


def bare(reuse: bool) -> Callable[[Path], None]:
    """Ray Tune as its documentation shows it, with or without reused processes."""

    def run(folder: Path) -> None:
        from ray import tune

        def trial(config: dict[str, int]) -> None:
            one_second(folder, config["number"])
            tune.report({"val_accuracy": config["number"] / TRIALS})

        tuner = tune.Tuner(
            trial,
            param_space={"number": tune.grid_search(list(range(TRIALS)))},
            tune_config=tune.TuneConfig(
                metric="val_accuracy", mode="max", reuse_actors=reuse, num_samples=1
            ),
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        )
        assert not tuner.fit().errors

    return run


SUBJECTS: dict[str, Callable[[Path], None]] = {
    "cifar_dist": project,
    "Ray Tune": bare(reuse=False),
    "Ray Tune, reuse_actors": bare(reuse=True),
}


def measure(run: Callable[[Path], None]) -> dict[str, float]:
    """Run a subject once on a cluster of its own."""
    import ray

    ray.init(
        address="local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            called = time.time()
            run(folder)
            over = time.time()
            spans = [json.loads((folder / f"{n}.json").read_text()) for n in range(TRIALS)]
    finally:
        ray.shutdown()
    first, last = min(began for began, _ in spans), max(ended for _, ended in spans)
    ideal = sum(ended - began for began, ended in spans) / SLOTS
    return {
        "trials_over_ideal": (last - first) / ideal,
        "seconds_before": first - called,
        "seconds_after": over - last,
    }


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    chosen = arguments(__doc__, "trial_overhead").parse_args()
    # What the first of them would load for the others: a driver's imports count for none.
    importlib.import_module("ray.tune")
    importlib.import_module("cifar_dist.cluster.tuner")
    subjects = {name: functools.partial(measure, run) for name, run in SUBJECTS.items()}
    figures = in_turn(subjects, chosen.repeats, chosen.warm_ups)
    for key, title in (("trials_over_ideal", "trials / ideal"), ("seconds_before", "s before")):
        say(figures, key, "Ray Tune", title, ".2f")
    write(chosen.output, figures, trials=TRIALS, slots=SLOTS, work_s=WORK_S)


if __name__ == "__main__":
    main()
