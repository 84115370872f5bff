"""What a GPU makes of it: the project against a bare loop with the same settings.

``python -m benchmarks.gpu`` trains ResNet-18 with the ``cifar`` stem on one GPU, in turn as a bare
PyTorch loop (batches ready on the device, nothing augmented) and as the project without Ray, at
batch sizes 128, 512 and 1024, in float32 with TF32 and in bf16, with and without channels-last and
compile. Of each it gives images a second, all but the first epoch's, and the share of the device's
matrix peak, which it measures by a product of two large bf16 matrices, that the network's own
operations make up. Then: what determinism costs, the loader's transforms on the device, and two Ray
workers that share the GPU by fractions. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import images as measured
from benchmarks.side_by_side import arguments, in_turn, output, say, write
from cifar_dist.runs import RunDirectory

EPOCHS = 3
BATCH_SIZES = (128, 512, 1024)
MATRIX = 8192
PRODUCTS = 30
LOADER_BATCHES = 200


def bare(folder: Path, device: str, settings: dict[str, Any]) -> dict[str, float]:
    """The plain loop of `benchmarks.bare`."""
    words = [sys.executable, "-m", "benchmarks.bare", "loop", str(folder), f"--epochs={EPOCHS}"]
    rates = json.loads(
        output([*words, "--settings", json.dumps({**settings, "device": device})]).splitlines()[-1]
    )
    return {"images_per_second": statistics.median(rates[1:])}


def project(folder: Path, device: str, settings: dict[str, Any], *more: str) -> dict[str, float]:
    """``python -m cifar_dist.train``, without Ray unless told otherwise."""
    with tempfile.TemporaryDirectory() as runs:
        words = [
            sys.executable, "-m", "cifar_dist.train", "--data-dir", str(folder),
            "--num-workers", "0", "--max-epochs", str(EPOCHS), "--name", "run",
            "--storage-path", runs, "--no-report", "--checkpoint-every", str(EPOCHS),
            "--no-deterministic",
            *(["--use-gpu"] if device != "cpu" else []), *flags(settings), *more,
        ]  # fmt: skip
        output(words)
        rows = RunDirectory.at(runs, "run").read_metrics()
        return {"images_per_second": statistics.median(r["images_per_second"] for r in rows[1:])}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the project's command takes them."""
    words: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    return words


def matrix_peak(device: str, side: int) -> float:
    """Operations a second of a product of two ``[side, side]`` bf16 matrices; the best of three."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(3):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(PRODUCTS):
            a @ b
        synchronize(device)
        best = max(best, PRODUCTS * 2 * side**3 / (time.perf_counter() - began))
    return best


def operations_per_image() -> float:
    """Of a training step, forward and backward, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from cifar_dist.model.resnet import resnet18

    network, count = resnet18(10, "cifar"), 8
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(count, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / count


def loader(folder: Path, device: str, size: int) -> dict[str, float]:
    """Images a second that the data module augments and normalises where the network is."""
    from cifar_dist.config import TrainConfig
    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datamodule import ImageDataModule
    from cifar_dist.data.sources import find_source

    dataset = prepare("cifar10", find_source("cifar10", str(folder)))
    module = ImageDataModule(TrainConfig(data_dir=str(folder), batch_size=size), dataset)
    seen = began = 0.0
    for number, batch in enumerate(itertools.chain(*[module.train_dataloader()] * 20)):
        if number == 5:  # behind the first ones, which start the device
            synchronize(device)
            seen, began = 0, time.perf_counter()
        moved = module.transfer_batch_to_device(batch, torch.device(device), 0)
        seen += len(module.ready(moved).images)
        if number == LOADER_BATCHES:
            break
    synchronize(device)
    return {"images_per_second": seen / (time.perf_counter() - began)}


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def in_words(settings: dict[str, Any]) -> str:
    """Settings for a table's row."""
    named = [f"batch {settings['batch_size']}"]
    named.append("bf16" if settings["precision"] == "bf16-mixed" else "TF32")
    named += [name.replace("_", "-") for name in ("channels_last", "compile") if settings[name]]
    return ", ".join(named)


def combinations(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """All that are measured."""
    return [
        {
            "batch_size": size,
            "precision": precision,
            "channels_last": channels_last,
            "compile": compiled,
            "stem": "cifar",
        }
        for size in sizes
        for precision in ("32", "bf16-mixed")
        for channels_last in (False, True)
        for compiled in (False, True)
    ]


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = arguments(__doc__, "gpu")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--part", choices=("settings", "beside"), nargs="+",
                        default=("settings", "beside"))  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu tries the code, its figures say nothing")  # fmt: skip
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("gpu: skipped, torch finds no GPU here")
        return
    of = functools.partial
    figures: dict[str, list[dict[str, float]]] = {}
    peak = matrix_peak(chosen.device, MATRIX if chosen.device == "cuda" else 512)
    operations = operations_per_image()
    print(f"matrix peak {peak / 1e12:.1f} Tflop/s, {operations / 1e9:.2f} Gflop an image")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured.write_folder(folder, chosen.images, 100)
        if "settings" in chosen.part:
            for settings in combinations(tuple(chosen.batch_sizes)):
                # A pair at a time: they run side by side in time.
                pair: dict[str, Callable[[], dict[str, float]]] = {
                    f"bare loop, {in_words(settings)}": of(bare, folder, chosen.device, settings),
                    f"cifar_dist, {in_words(settings)}": of(
                        project, folder, chosen.device, settings
                    ),
                }
                found = in_turn(pair, chosen.repeats, chosen.warm_ups)
                for runs in found.values():
                    for run in runs:
                        rate = run["images_per_second"]
                        run["share of matrix peak"] = rate * operations / peak
                say(found, "images_per_second", next(iter(pair)), "images a second")
                say(found, "share of matrix peak", next(iter(pair)), "share of peak", ".3f")
                figures |= found
        if "beside" in chosen.part:
            settings = {
                "batch_size": 512, "precision": "bf16-mixed", "channels_last": True, "stem": "cifar"
            }  # fmt: skip
            halves = ["--num-workers", "2", "--cpus-per-worker", "1"]
            if chosen.device == "cuda":
                halves += ["--gpus-per-worker", "0.5"]
            alone = of(project, folder, chosen.device, settings)
            found = in_turn(
                {
                    "not deterministic": alone,
                    "deterministic": lambda: alone("--deterministic"),
                    "two workers by fractions": lambda: alone(*halves),
                    "the transforms alone": of(loader, folder, chosen.device, 512),
                },
                chosen.repeats,
                chosen.warm_ups,
            )
            say(found, "images_per_second", "not deterministic", "images a second")
            figures |= found
    write(
        chosen.output, figures, images=chosen.images, source=measured.source(),
        device=chosen.device, matrix_peak=peak, operations_per_image=operations,
    )  # fmt: skip


if __name__ == "__main__":
    main()
