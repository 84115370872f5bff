"""Parts of the GPU campaign that try promises: tests, equal bits, a shared GPU, NCCL."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.findings import Lacking
from benchmarks.gpu_parts.here import BATCH, Here, started, succeeded
from benchmarks.side_by_side import cell

CHECKPOINT_STEPS = {"cuda": 20, "cpu": 3}
RUN_EPOCHS = {"cuda": 3, "cpu": 2}
"""Of runs that are killed and resumed."""


def tests(here: Here) -> None:
    """Run the tests marked ``gpu``."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(f for f in (root / "tests").rglob("test_*.py") if _marked_gpu(f))
    if importlib.util.find_spec("tyro") is None:
        # Their conftest.py imports the commands, and one that fails to load ends pytest.
        here.found.say("tests/training", "skipped: needs tyro")
        files = [file for file in files if file.parent.name != "training"]
    # Without the options of pyproject.toml, which name plugins that may not be installed. Side by
    # side where that can be had: most of a test's seconds are the start of its process or run.
    several = ["-n", "6"] if importlib.util.find_spec("xdist") and here.device == "cuda" else []
    words = [
        sys.executable, "-m", "pytest", "-v", "-rsfE", "-m", "gpu", "-o", "addopts=", *several,
        "-p", "benchmarks.gpu_parts.failures",
        "-p", "no:cacheprovider", "--continue-on-collection-errors", "--durations", "8",
        "--basetemp", str(here.work / "pytest"), *map(str, files),
    ]  # fmt: skip
    lines = []
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)  # as it comes: a campaign that is cut off has it
            lines.append(line.strip().strip("= "))
    lines = [line for line in lines if line]
    here.found.say(f"pytest -m gpu, {len(files)} files", lines[-1] if lines else "nothing printed")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            here.found.say(line.split(" - ")[0], line.partition(" - ")[2] or "failed")
    # 5: no test was selected.
    if running.returncode not in (0, 5):
        here.found.claim("all pass", False, f"pytest's exit code {running.returncode}")


def _marked_gpu(file: Path) -> bool:
    return "mark.gpu" in file.read_text(encoding="utf-8")


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
    running = {name: started(here.train(name, "few", *words)) for name in names}
    _wait_for_step_checkpoint(here.runs / "killed", running["killed"])
    os.killpg(running["killed"].pid, signal.SIGKILL)
    code = running["killed"].wait()
    here.found.claim("a run was killed on its way", code == -signal.SIGKILL, f"exit code {code}")
    kept = sorted(f.name for f in (here.runs / "killed" / "checkpoints").glob("*.ckpt"))
    resumed = started(here.command("train", "--name", "killed", "--resume"))
    for process in (running["first"], running["again"], resumed):
        succeeded(process)
    found = {name: here.read_summary(name) for name in names}
    hashes = {name: found[name]["weights_sha256"] for name in names}
    here.found.figures["weights_sha256"] = hashes
    here.found.claim("a rerun has the same bits", hashes["first"] == hashes["again"])
    here.found.claim(
        "resumed after SIGKILL, the same bits", hashes["first"] == hashes["killed"],
        f"from {kept[-1]}",
    )  # fmt: skip
    _evaluate_on_both(here, "first")


def _wait_for_step_checkpoint(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when a run has written a checkpoint in the middle of an epoch."""
    while process.poll() is None:
        if list((run / "checkpoints").glob("epoch-*-step-*.ckpt")):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{run.name}: ended with {process.returncode} before its first checkpoint")


def _evaluate_on_both(here: Here, name: str) -> None:
    run, into = str(here.runs / name), str(here.work / "evaluation")
    words = [sys.executable, "-m", "cifar_dist.evaluate", run, "--format", "json", "--output"]
    devices = {"cpu": [], "gpu": ["--use-gpu"]} if here.device == "cuda" else {"cpu": []}
    running = {
        place: started([*words, f"{into}-{place}", *gpu], stdout=subprocess.PIPE)
        for place, gpu in devices.items()
    }
    found = {place: json.loads(succeeded(process)) for place, process in running.items()}
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
    running = {name: started(here.train(name, "few", *words)) for name in names}
    _wait_for_step_checkpoint(here.runs / "disturbed", running["disturbed"])
    workers = [
        pid
        for pid, title in descendants(running["disturbed"].pid).items()
        if "ray::RayTrainWorker" in title
    ]
    os.kill(max(workers), signal.SIGKILL)
    for process in running.values():
        succeeded(process)
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
    succeeded(started(here.command("tune", *words)))
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
