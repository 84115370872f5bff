"""The parts of the GPU campaign; `benchmarks.gpu_campaign` starts each as a process of its own.

``python -m benchmarks.gpu_parts NAME --work FOLDER --found FILE`` runs one by hand. What it finds
is written to the file as it is found, so that a part which is killed at its limit leaves what it
has.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import images as measured
from benchmarks.side_by_side import cell

MATRIX_SIDE = {"cuda": 8192, "cpu": 256}
PRODUCTS = {"cuda": 30, "cpu": 2}
TURNS = {"cuda": 3, "cpu": 1}
"""How often two things that are compared run, in turn."""
RATE_EPOCHS = {"cuda": 4, "cpu": 2}
"""Of each of these runs; the first does not count."""
PRESET_EPOCHS = {"cuda": 15, "cpu": 1}
DATA = {
    "cuda": {"full": (50_000, 10_000), "rates": (25_000, 512), "few": (10_000, 1_000)},
    "cpu": {"full": (144, 32), "rates": (144, 32), "few": (144, 32)},
}
"""Training and test images of each data set; a tenth of the training images validate."""
BATCH = {"cuda": 128, "cpu": 16}
"""Batch size on ``few``: some 70 steps an epoch on a GPU, some 9 in a rehearsal."""
CHECKPOINT_STEPS = {"cuda": 20, "cpu": 3}
RUN_EPOCHS = {"cuda": 3, "cpu": 2}
"""Of runs that are killed and resumed."""


class Lacking(Exception):
    """The machine has not what a part needs."""


class Findings:
    """What a part has found so far, in a file.

    Args:
        file: where to write; rewritten at each finding.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.skipped = False
        self.reason = ""
        self.rows: list[tuple[str, str]] = []
        self.figures: dict[str, Any] = {}

    def say(self, what: str, value: str, **figures: Any) -> None:
        """Add a row to the table, and figures by name."""
        self.rows = [row for row in self.rows if row[0] != what] + [(what, value)]
        self.figures |= figures
        print(f"{what}: {value}", flush=True)
        self.write()

    def claim(self, what: str, holds: bool, detail: str = "") -> None:
        """Add a row that says whether a promise holds; one that does not fails the part."""
        self.say(what, ("yes" if holds else "**no**") + (f", {detail}" if detail else ""))
        if not holds:
            self.reason = "; ".join(filter(None, [self.reason, f"not so: {what}"]))
            self.write()

    def write(self) -> None:
        """Write all of it, whole."""
        found = {name: getattr(self, name) for name in ("skipped", "reason", "rows", "figures")}
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(found))
        beside.replace(self.file)


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


def device(here: Here) -> None:
    """Say what the machine and its software are, and how fast it multiplies matrices."""
    say = here.found.say
    packages = ("torch", "torchvision", "triton", "lightning", "torchmetrics", "ray")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    python = sys.version.split()[0]
    say("software", f"Python {python}, {said}", versions=versions, python=python)
    say("CPU", f"{os.cpu_count()} cores", cores=os.cpu_count())
    if here.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        cuda = {
            "name": about.name,
            "memory_gib": about.total_memory / 2**30,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
        say(
            "GPU",
            f"{cuda['name']}, {cuda['memory_gib']:.0f} GiB, driver {cuda['driver']}, CUDA "
            f"{cuda['cuda']}, cuDNN {cuda['cudnn']}, NCCL {cuda['nccl']}",
            **cuda,
        )
    peak = matrix_peak(here.device)
    side = MATRIX_SIDE[here.device]
    say(f"bf16 product of {side} x {side}", f"{peak / 1e12:,.1f} TFLOP/s", matrix_peak=peak)


def _driver() -> str:
    if (program := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def matrix_peak(device: str) -> float:
    """Return the operations a second of a product of two bf16 matrices; the best of three."""
    side, count = MATRIX_SIDE[device], PRODUCTS[device]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(4):  # the first also starts the device
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronize(device)
        best = max(best, count * 2 * side**3 / (time.perf_counter() - began))
    return best


def operations_per_image() -> float:
    """Return the operations of a training step for an image, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from cifar_dist.model.resnet import resnet18

    network, count = resnet18(10, "cifar"), 2
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(count, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / count


def synchronize(device: str) -> None:
    """Wait until the device has done all that was queued."""
    if device == "cuda":
        torch.cuda.synchronize()


def data(here: Here) -> None:
    """Write the data sets and decode them into the cache, which later parts find there."""
    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datasets import find_source

    for name, (train, test) in DATA[here.device].items():
        began = time.perf_counter()
        dataset = prepare("cifar10", find_source("cifar10", str(here.folder(name))))
        took = time.perf_counter() - began
        here.found.say(
            name,
            f"{measured.source()}, {dataset.train_images:,} images to train on, "
            f"{dataset.validation_images:,} to validate, {dataset.test_images:,} to test; "
            f"{took:.1f} s",
            **{name: {"train": train, "test": test, "seconds": took}},
        )


def tests(here: Here) -> None:
    """Run the tests marked ``gpu``."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(f for f in (root / "tests").rglob("test_*.py") if _marked_gpu(f))
    if importlib.util.find_spec("tyro") is None:
        # Their conftest.py imports the commands, and one that fails to load ends pytest.
        here.found.say("tests/training", "skipped: needs tyro")
        files = [file for file in files if file.parent.name != "training"]
    # Without the options of pyproject.toml, which name plugins that may not be installed.
    words = [
        sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-o", "addopts=",
        "-p", "no:cacheprovider", "--continue-on-collection-errors",
        "--basetemp", str(here.work / "pytest"), *map(str, files),
    ]  # fmt: skip
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.strip()]
    here.found.say(f"pytest -m gpu, {len(files)} files", lines[-1] if lines else "nothing printed")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            here.found.say(line.split(" - ")[0], line.partition(" - ")[2] or "failed")
    # 5: no test was selected.
    if done.returncode not in (0, 5):
        here.found.claim("all pass", False, f"pytest's exit code {done.returncode}")


def _marked_gpu(file: Path) -> bool:
    return "mark.gpu" in file.read_text(encoding="utf-8")


def waits(here: Here) -> None:
    """List the places in training steps that wait for the device; then have none raise."""
    from benchmarks.waits import WaitsInSteps, callback_added

    def switch(mode: str) -> None:
        if here.device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    size = BATCH[here.device]
    subjects: dict[str, dict[str, Any]] = {
        "defaults": {"batch_size": size},
        "preset cifar": {"preset": "cifar", "batch_size": size},
    }
    for subject, settings in subjects.items():
        for mode in ("warn", "error"):
            watch = WaitsInSteps(mode, switch)
            with callback_added(watch):
                try:
                    here.fitted(f"{subject.replace(' ', '-')}-{mode}", "few",
                                {**settings, "max_epochs": 1})  # fmt: skip
                except RuntimeError as error:
                    if mode == "warn" or "synchronizing" not in str(error):
                        raise
                    said = " ".join(str(error).split())[:200]
                    here.found.claim(f"{subject}: in mode error no step raises", False, said)
                    continue
            if here.device == "cpu":
                here.found.say(
                    f"{subject}: mode {mode}", f"{watch.steps} steps gone through, none watched"
                )
                continue
            if mode == "error":
                here.found.claim(
                    f"{subject}: in mode error no step raises", True, f"{watch.steps} steps"
                )
                continue
            here.found.claim(
                f"{subject}: no step waits",
                not watch.places,
                f"{watch.places.total()} waits in {watch.steps} steps",
            )
            for place, count in watch.places.most_common():
                here.found.say(f"{subject}: {place}", f"{count} times")
            here.found.figures[subject] = dict(watch.places)


def rates(here: Here) -> None:
    """Measure the project beside a bare loop, and with determinism, in turn."""
    on_gpu = here.device == "cuda"
    _compare(here, TURNS[here.device], 512 if on_gpu else 32, compiled=False, deterministic=True)
    _compare(here, TURNS[here.device], 128 if on_gpu else 16, compiled=False, deterministic=False)


def compiled(here: Here) -> None:
    """Measure the project beside a bare loop, both compiled."""
    size = 512 if here.device == "cuda" else 16
    if here.device == "cpu":
        # Kernels for a CPU take a C++ compiler minutes, and are not those of a GPU: a rehearsal
        # traces the network and its gradients, and runs what it has traced as it is.
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        here.found.say("backend", "aot_eager: traced, no kernels generated")
    _compare(here, min(2, TURNS[here.device]), size, compiled=True, deterministic=False)


def _compare(
    here: Here, turns: int, batch_size: int, *, compiled: bool, deterministic: bool
) -> None:
    settings = {
        "batch_size": batch_size, "precision": "bf16-mixed", "channels_last": True,
        "compile": compiled, "stem": "cifar" if here.device == "cuda" else "imagenet",
    }  # fmt: skip
    subjects: dict[str, Callable[[int], list[float]]] = {
        "bare loop": lambda turn: _bare_rates(here, settings),
        "cifar_dist": lambda turn: _project_rates(here, turn, settings, False),
    }
    if deterministic:
        subjects["cifar_dist, deterministic"] = lambda turn: _project_rates(
            here, turn, settings, True
        )
    title = f"batch {batch_size}, bf16, channels-last" + (", compiled" if compiled else "")
    peak, operations = matrix_peak(here.device), operations_per_image()
    # By turn: a ratio is of two medians of one turn, since clocks and temperatures drift.
    by_turn: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for turn in range(turns):
        for name, measure in subjects.items():
            by_turn[name].append(measure(turn))
            gc.collect()
            every = [rate for epochs in by_turn[name] for rate in epochs]
            share = statistics.median(every) * operations / peak
            said = f"{cell(every)} images/s of {len(every)} epochs"
            if here.device == "cuda":
                said += f", {share:.3f} of the matrix peak"
            key = f"{title}: {name}"
            here.found.say(key, said, **{key: {"by_turn": by_turn[name], "share_of_peak": share}})
        for name, over in (
            ("cifar_dist", "bare loop"),
            ("cifar_dist, deterministic", "cifar_dist"),
        ):
            if name in subjects:
                mine, its = (map(statistics.median, by_turn[each]) for each in (name, over))
                ratios = [a / b for a, b in zip(mine, its, strict=True)]
                key = f"{title}: {name} over {over}"
                here.found.say(
                    key, f"{cell(ratios, '.3f')} of {len(ratios)} turns", **{key: ratios}
                )


def _bare_rates(here: Here, settings: Mapping[str, Any]) -> list[float]:
    from benchmarks.bare import Settings, loop

    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    chosen = Settings(**settings, device=here.device, fused=True)
    return loop(here.folder("rates"), RATE_EPOCHS[here.device], chosen)[1:]


def _project_rates(
    here: Here, turn: int, settings: Mapping[str, Any], deterministic: bool
) -> list[float]:
    from benchmarks.waits import callback_added

    clock = _epoch_clock(here.device)
    epochs = RATE_EPOCHS[here.device]
    name = "-".join(map(str, [*settings.values(), deterministic, turn]))
    shared = {"max_epochs": epochs, "checkpoint_every": epochs, "deterministic": deterministic}
    with callback_added(clock):
        outcome = here.fitted(name, "rates", {**settings, **shared}, test=False)
    shutil.rmtree(here.runs / name)  # several GB over all turns
    images: int = outcome.history[0]["samples"]
    return [images / seconds for seconds in clock.seconds[1:]]


def _epoch_clock(device: str) -> Any:
    """Return a callback that times an epoch's training, to the end of what was queued.

    The project's own column reads its clock without asking what the device has still to do.
    """
    import lightning.pytorch as pl

    class EpochClock(pl.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            synchronize(device)
            self._began = time.perf_counter()

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            synchronize(device)
            self.seconds.append(time.perf_counter() - self._began)

    return EpochClock()


def bits(here: Here) -> None:
    """Train twice, and once killed and resumed, and compare weights; then evaluate on both devices.

    The three runs share the GPU, which must not show in their bits.
    """
    where = here.device
    here.folder("few")  # written once, before three processes look for it
    words = [
        "--num-workers", "0", "--batch-size", str(BATCH[where]), "--precision", "bf16-mixed",
        "--channels-last", "--stem", "cifar" if where == "cuda" else "imagenet",
        "--max-epochs", str(RUN_EPOCHS[where]),
        "--checkpoint-every", f"{CHECKPOINT_STEPS[where]}s",
    ]  # fmt: skip
    names = ("first", "again", "killed")
    running = {name: _started(here.train(name, "few", *words)) for name in names}
    _wait_for_step_checkpoint(here.runs / "killed", running["killed"])
    os.killpg(running["killed"].pid, signal.SIGKILL)
    code = running["killed"].wait()
    here.found.claim("a run was killed on its way", code == -signal.SIGKILL, f"exit code {code}")
    kept = sorted(f.name for f in (here.runs / "killed" / "checkpoints").glob("*.ckpt"))
    resumed = _started(here.command("train", "--name", "killed", "--resume"))
    for process in (running["first"], running["again"], resumed):
        _succeeded(process)
    found = {name: here.read_summary(name) for name in names}
    hashes = {name: found[name]["weights_sha256"] for name in names}
    here.found.figures["weights_sha256"] = hashes
    here.found.claim("a rerun has the same bits", hashes["first"] == hashes["again"])
    here.found.claim(
        "resumed after SIGKILL, the same bits", hashes["first"] == hashes["killed"],
        f"from {kept[-1]}",
    )  # fmt: skip
    _evaluate_on_both(here, "first")


def _evaluate_on_both(here: Here, name: str) -> None:
    run, into = str(here.runs / name), str(here.work / "evaluation")
    words = [sys.executable, "-m", "cifar_dist.evaluate", run, "--format", "json", "--output"]
    devices = {"cpu": [], "gpu": ["--use-gpu"]} if here.device == "cuda" else {"cpu": []}
    running = {
        place: _started([*words, f"{into}-{place}", *gpu], stdout=subprocess.PIPE)
        for place, gpu in devices.items()
    }
    found = {place: json.loads(_succeeded(process)) for place, process in running.items()}
    for place, each in found.items():
        here.found.say(
            f"evaluate on the {place.upper()}",
            f"accuracy {each['accuracy']:.4f}, loss {each['loss']:.6f} over {each['images']:,}",
            **{f"evaluated_{place}": {key: each[key] for key in ("accuracy", "loss")}},
        )
    _compare_logits(here, here.runs / name / "model.safetensors")


def _compare_logits(here: Here, weights: Path) -> None:
    """Say how far logits in float32 are from the CPU's, with and without TF32."""
    from safetensors.torch import load_file

    from cifar_dist.data.datasets import find_source
    from cifar_dist.model.resnet import resnet18

    test = find_source("cifar10", str(here.folder("few"))).decode().test
    images = (torch.from_numpy(test.images.copy()).float() / 255 - 0.47) / 0.25
    network = resnet18(10, "cifar" if here.device == "cuda" else "imagenet")
    network.load_state_dict(load_file(weights))
    network.eval()
    with torch.inference_mode():
        on_cpu = network(images)
        network.to(here.device)
        for tf32 in (False, True):
            torch.backends.cudnn.allow_tf32 = tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            there = network(images.to(here.device)).cpu()
            difference = float((there - on_cpu).abs().max())
            same = int((there.argmax(1) == on_cpu.argmax(1)).sum())
            mode = "TF32" if tf32 else "float32"
            here.found.say(
                f"logits in {mode} against the CPU's",
                f"{'the same bits' if torch.equal(there, on_cpu) else 'other bits'}, largest "
                f"difference {difference:.2e} of values up to {float(on_cpu.abs().max()):.1f}; "
                f"{same} of {len(images)} predictions equal",
                **{f"logits_difference_{mode}": difference},
            )


def preset(here: Here) -> None:
    """Train with the preset ``cifar`` as a user does."""
    epochs = PRESET_EPOCHS[here.device]
    small = ["--batch-size", "32"] if here.device == "cpu" else []
    words = ["--preset", "cifar", "--max-epochs", str(epochs), "--num-workers", "0", *small]
    began = time.perf_counter()
    _succeeded(_started(here.train("preset", "full", *words)))
    took = time.perf_counter() - began
    found = here.read_summary("preset")
    rows = (here.runs / "preset" / "metrics.csv").read_text().splitlines()
    here.found.say(
        f"{epochs} epochs of {measured.source()}",
        f"test accuracy {found['test_accuracy']:.4f}, validation {found['val_accuracy']:.4f}; "
        f"{found['seconds']:.1f} s, {took:.1f} s with the command's start",
        summary=found, command_seconds=took, metrics=rows,
    )  # fmt: skip
    column = rows[0].split(",").index("seconds")
    seconds = [float(row.split(",")[column]) for row in rows[1:]]
    here.found.say("seconds an epoch, validation and checkpoint too", cell(seconds, ".2f"))


def halves(here: Here) -> None:
    """Train with two workers that share the GPU, undisturbed and with a worker killed."""
    from tests.processes import descendants

    where = here.device
    here.folder("few")
    half = ["--gpus-per-worker", "0.5"] if where == "cuda" else []
    words = [
        "--num-workers", "2", *half, "--batch-size", str(BATCH[where]),
        "--max-epochs", str(RUN_EPOCHS[where]),
        "--checkpoint-every", f"{CHECKPOINT_STEPS[where]}s",
    ]  # fmt: skip
    names = ("whole", "disturbed")
    running = {name: _started(here.train(name, "few", *words)) for name in names}
    _wait_for_step_checkpoint(here.runs / "disturbed", running["disturbed"])
    workers = [
        pid
        for pid, title in descendants(running["disturbed"].pid).items()
        if "ray::RayTrainWorker" in title
    ]
    os.kill(max(workers), signal.SIGKILL)
    for process in running.values():
        _succeeded(process)
    found = {name: here.read_summary(name) for name in names}
    for name, each in found.items():
        here.found.say(
            f"two workers, {name}",
            f"{each['seconds']:.1f} s, {each['restarts']} restarts, test accuracy "
            f"{each['test_accuracy']:.4f}",
            **{name: each},
        )
    here.found.claim(
        "a worker was killed, and the run restarted", found["disturbed"]["restarts"] >= 1
    )
    same = len({each["weights_sha256"] for each in found.values()}) == 1
    here.found.claim("with a worker killed, the same bits", same)


def trials(here: Here) -> None:
    """Search with four trials, on a GPU at once."""
    import csv

    share = ["--gpus-per-trial", "0.25"] if here.device == "cuda" else []
    words = [
        "--name", "search", "--data-dir", str(here.folder("few")), "--num-samples", "4",
        "--max-epochs", "2", "--scheduler", "none", *share,
    ]  # fmt: skip
    if here.device == "cpu":
        words += ["--batch-size", "16"]
    began = time.perf_counter()
    _succeeded(_started(here.command("tune", *words)))
    took = time.perf_counter() - began
    with (here.runs / "search" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ended = [row for row in rows if row["status"] == "completed"]
    here.found.claim("four trials completed", len(ended) == 4, f"{took:.1f} s")
    best = max((float(row["val_accuracy"]) for row in ended), default=float("nan"))
    seconds = [float(row["seconds"]) for row in ended]
    here.found.say(
        "best validation accuracy",
        f"{best:.4f}; seconds a trial {cell(seconds, '.1f') if seconds else 'none'}",
        trials=rows, seconds=took,
    )  # fmt: skip


def nccl(here: Here) -> None:
    """Train as the only rank of a process group, and compare with a run without one."""
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import DDPStrategy

    from benchmarks.waits import callback_added

    backend = "nccl" if here.device == "cuda" else "gloo"
    if backend == "nccl" and not torch.distributed.is_nccl_available():
        raise Lacking("this torch is built without NCCL")

    class Asked(Callback):
        backend = ""
        summed = 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.backend = torch.distributed.get_backend()
            number = torch.ones(1, device=pl_module.device)
            torch.distributed.all_reduce(number)
            self.summed = float(number)

    settings = {"batch_size": BATCH[here.device], "max_epochs": 1}
    asked, began = Asked(), time.perf_counter()
    with callback_added(asked):
        strategy = DDPStrategy(process_group_backend=backend)
        grouped = here.fitted("grouped", "few", settings, strategy=strategy)
    steps = grouped.history[-1]["step"]
    here.found.claim(
        f"trains in a process group of one rank, {backend}",
        asked.backend == backend and asked.summed == 1,
        f"{steps} steps, {time.perf_counter() - began:.1f} s",
    )
    torch.distributed.destroy_process_group()
    alone = here.fitted("alone", "few", settings)
    same = alone.weights_sha256 == grouped.weights_sha256
    here.found.say("the same bits as without a process group", "yes" if same else "no")


def _started(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own."""
    print("+", " ".join(words), flush=True)
    return subprocess.Popen(words, start_new_session=True, **options)


def _succeeded(process: subprocess.Popen[bytes]) -> str:
    """Return what a command printed where that was piped; it must exit with 0."""
    output = process.communicate()[0]
    if process.returncode:
        words = " ".join(map(str, process.args))  # type: ignore[arg-type]
        raise RuntimeError(f"exit code {process.returncode} of: {words}")
    return output.decode() if output else ""


def _wait_for_step_checkpoint(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when a run has written a checkpoint in the middle of an epoch."""
    while process.poll() is None:
        if list((run / "checkpoints").glob("epoch-*-step-*.ckpt")):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{run.name}: ended with {process.returncode} before its first checkpoint")


@contextlib.contextmanager
def _reported(found: Findings) -> Iterator[None]:
    """Turn what a part lacks, or what it raises, into its reason."""
    found.write()
    try:
        yield
    except Lacking as lacking:
        found.skipped, found.reason = True, str(lacking)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        found.reason = "; ".join(filter(None, [found.reason, text[:300]]))
        found.write()
        raise
    finally:
        found.write()


RUNS: dict[str, Callable[[Here], None]] = {
    part.__name__: part
    for part in (
        device, data, tests, waits, rates, bits, preset, halves, compiled, trials, nccl
    )
}  # fmt: skip


def main() -> int:
    """Run one part; return 1 if a promise that it tests does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=RUNS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--found", type=Path, required=True)
    chosen = parser.parse_args()
    found = Findings(chosen.found)
    with _reported(found):
        if chosen.device == "cuda" and not torch.cuda.is_available():
            raise Lacking("torch finds no GPU here")
        RUNS[chosen.part](Here(chosen.device, chosen.work, found))
    return int(bool(found.reason) and not found.skipped)


if __name__ == "__main__":
    sys.exit(main())
