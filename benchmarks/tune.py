"""What a search costs beside its training: twelve short trials of real training on two slots.

``python -m benchmarks.tune`` searches the learning rate of ResNet-18 on the digits, two epochs a
trial, one CPU each, as the project does and as Ray documents it for Lightning (a function that
builds a Trainer with ``TuneReportCallback``), each as a process of its own on a Ray of its own, in
turn. Of the seconds from the call to the table, what is not training (the epochs of all trials,
validation with them, over the slots) is counted per trial.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import arguments, in_turn, say, write

TRIALS, SLOTS, EPOCHS, BATCH = 12, 2, 2, 128


def project(folder: Path) -> dict[str, float]:
    """The project's search."""
    from cifar_dist.config.tune import make_tune_config
    from cifar_dist.tune import search

    settings = {
        "dataset": "digits", "num_samples": TRIALS, "max_epochs": EPOCHS, "scheduler": "none",
        "report": False, "storage_path": str(folder), "name": "search", "max_concurrent": SLOTS,
    }  # fmt: skip
    began = time.time()
    searched = search(make_tune_config(settings))
    seconds = time.time() - began
    trained = [
        sum(row["seconds"] for row in searched.directory.trial(number).read_metrics())
        for number in range(TRIALS)
    ]
    return {"seconds": seconds, "training": sum(trained)}


def documented(folder: Path) -> dict[str, float]:
    """Ray's "Using PyTorch Lightning with Tune", on the digits."""
    import lightning.pytorch as pl
    import numpy as np
    import torch
    from ray import tune
    from ray.tune.integration.pytorch_lightning import TuneReportCallback
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset
    from torchvision.models import resnet18

    class Module(pl.LightningModule):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.lr, self.model = lr, resnet18(num_classes=10)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            right = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
            self.log("val_accuracy", right, sync_dist=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    class Clock(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.began = time.time()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            name = f"{tune.get_context().get_trial_id()}-{trainer.current_epoch}"
            (folder / f"{name}.seconds").write_text(repr(time.time() - self.began))

    def trial(config: dict[str, float]) -> None:
        digits = load_digits()
        pixels = np.kron(digits.images, np.ones((1, 4, 4)))[:, None].repeat(3, 1) / 16
        images, labels = torch.tensor(pixels).float(), torch.tensor(digits.target)
        train, val = TensorDataset(images[:1350], labels[:1350]), TensorDataset(
            images[1350:1500], labels[1350:1500]
        )  # fmt: skip
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", enable_progress_bar=False,
            callbacks=[
                Clock(), TuneReportCallback({"val_accuracy": "val_accuracy"}, on="validation_end")
            ],
        )  # fmt: skip
        loaders = DataLoader(train, BATCH, shuffle=True), DataLoader(val, BATCH)
        trainer.fit(Module(config["lr"]), *loaders)

    began = time.time()
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(
            metric="val_accuracy", mode="max", num_samples=TRIALS, max_concurrent_trials=SLOTS
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    results.get_dataframe()
    seconds = time.time() - began
    files = list(folder.glob("*.seconds"))
    assert len(files) == TRIALS * EPOCHS
    return {"seconds": seconds, "training": sum(float(file.read_text()) for file in files)}


SUBJECTS = {"cifar_dist": project, "Ray Tune as documented": documented}


def measured(which: str) -> dict[str, float]:
    """One search, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"  # not printed: Ray prints among it
        words = [sys.executable, "-m", "benchmarks.tune", "--run", which, str(file)]
        env = {**os.environ, "RAY_ADDRESS": "local"}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, float] = json.loads(file.read_text())
    beside = (found["seconds"] * SLOTS - found["training"]) / TRIALS
    return {**found, "beside training, slot seconds a trial": beside}


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = arguments(__doc__, "tune")
    parser.add_argument("--run", nargs=2, help="for the searches' own processes")
    chosen = parser.parse_args()
    if chosen.run:
        which, file = chosen.run
        with tempfile.TemporaryDirectory() as folder:
            Path(file).write_text(json.dumps(SUBJECTS[which](Path(folder))))
        return
    figures = in_turn(
        {name: functools.partial(measured, name) for name in SUBJECTS},
        chosen.repeats,
        chosen.warm_ups,
    )
    for key, title in (
        ("seconds", "seconds in all"),
        ("beside training, slot seconds a trial", "seconds a trial that are not training"),
    ):
        say(figures, key, "Ray Tune as documented", title, ".1f")
    about = {"trials": TRIALS, "slots": SLOTS, "epochs": EPOCHS}
    write(chosen.output, figures, **about)


if __name__ == "__main__":
    main()
