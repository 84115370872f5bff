"""``python -m cifar_dist.evaluate``: what a run's weights, or any, are worth."""

from __future__ import annotations

import json
import re
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.cli import parse_evaluate, run_command
from cifar_dist.config.model import EvaluateConfig
from cifar_dist.config.train import with_absolute_paths
from cifar_dist.errors import RunFailed, UserError
from cifar_dist.events import Listener, ignore
from cifar_dist.inference.lookup import run_of, trained_config, weights_file
from cifar_dist.storage import AnyPath, as_json, at, delete_folder, write_atomically
from cifar_dist.terminal.hints import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cifar_dist.config.train import TrainConfig
    from cifar_dist.data.cache import CachedDataset
    from cifar_dist.data.datasets import LabelledImages
    from cifar_dist.inference.scores import Scores


HARDEST = 24
"""Images that are written as files."""


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` returns."""

    weights_file: AnyPath
    dataset: str
    split: str
    scores: Scores
    folder: AnyPath | None
    """Where ``evaluation-<split>.json`` and ``.csv`` were written, and, on a disk, the images that
    were the hardest, in ``hardest-<split>/``."""

    def to_dict(self) -> dict[str, Any]:
        """What ``evaluation-<split>.json`` holds."""
        about = {"weights": str(self.weights_file), "dataset": self.dataset, "split": self.split}
        return {**about, **self.scores.to_dict()}


def evaluate(config: EvaluateConfig, listener: Listener = ignore) -> Evaluated:
    """Measure a model on a split of its data set, each image once.

    Args:
        config: the evaluation. With ``num_workers=0`` it runs in this process without Ray.
        listener: notified of waiting for a cluster that grows, and of a precision that needs a GPU.

    Raises:
        UserError: no such model, bad weights or data, or too few resources.
        RunFailed: a worker failed, or a file cannot be written.
    """
    file = weights_file(config)
    trained = with_absolute_paths(
        trained_config(
            config,
            listener,
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            cpus_per_worker=config.cpus_per_worker,
            precision=config.precision,
            wait_for_resources=config.wait_for_resources,
            verbose=config.verbose,
        )
    )

    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datasets import find_source

    dataset = prepare(trained.dataset, find_source(trained.dataset, str(trained.data_dir)))
    run = run_of(config)
    if run and run.started_with_fingerprint() not in (None, dataset.fingerprint):
        raise UserError(
            f"--data-dir {trained.data_dir}: holds other data than the run was trained on; name "
            "the folder that it was trained on"
        )
    logits = _logits(config, trained, dataset, listener)

    from cifar_dist.training.torchmetrics_alone import load_torchmetrics_alone

    load_torchmetrics_alone()
    from cifar_dist.inference.scores import score

    images, members = dataset.part(config.split)
    scores = score(logits, images.labels[members], dataset.classes)
    folder = at(config.output) if config.output else run.path if run else None
    evaluated = Evaluated(file, dataset.name, config.split, scores, folder)
    if folder:
        _write(folder, evaluated)
        if isinstance(folder, Path):
            _write_hardest(folder, config.split, logits, images, members, dataset.classes)
    return evaluated


def _logits(
    config: EvaluateConfig, trained: TrainConfig, dataset: CachedDataset, listener: Listener
) -> NDArray[np.float32]:
    from cifar_dist.model.resnet import read_weights

    where = str(weights_file(config))
    if config.num_workers == 0:
        from cifar_dist.data.datamodule import Shard
        from cifar_dist.inference.model import load_trained
        from cifar_dist.inference.sharded import shard_logits
        from cifar_dist.model.seeding import set_seed

        set_seed(trained.seed, trained.deterministic, trained.tf32)
        model = load_trained(where, read_weights(where), trained, dataset.about)
        return shard_logits(model, dataset, config.split, config.batch_size, Shard(0, 1))

    from safetensors.torch import save

    from cifar_dist.cluster.evaluator import Work, logits_on_ray
    from cifar_dist.cluster.resources import have_resources
    from cifar_dist.cluster.session import session

    weights = save(read_weights(where))
    with session(trained.verbose):
        have_resources(trained, listener)
        return logits_on_ray(
            Work(trained, dataset.fingerprint, where, weights, config.split, config.batch_size)
        )


def _write(folder: AnyPath, evaluated: Evaluated) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made ({error.strerror})") from None
    write_atomically(folder / f"evaluation-{evaluated.split}.json", as_json(evaluated.to_dict()))
    write_atomically(folder / f"evaluation-{evaluated.split}.csv", _csv(evaluated))


def _write_hardest(
    folder: Path,
    split: str,
    logits: NDArray[np.float32],
    images: LabelledImages,
    members: NDArray[np.int64],
    classes: tuple[str, ...],
) -> None:
    """Write the images whose label the model found the least probable, the hardest first."""
    import torch
    from PIL import Image

    labels = images.labels[members]
    log_odds = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    found = log_odds[range(len(labels)), labels]
    into = folder / f"hardest-{split}"
    delete_folder(into)  # another model's
    into.mkdir()
    for place, number in enumerate(found.argsort(kind="stable")[:HARDEST], start=1):
        pixels = images.images[members[number]].transpose(1, 2, 0)
        name = re.sub(r"[^\w.+-]+", "_", classes[labels[number]])  # it may hold a slash
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        picture.save(into / f"{place:02}-{name}.png")


def _csv(evaluated: Evaluated) -> bytes:
    text: str = evaluated.scores.per_class.to_csv(index=False, lineterminator="\n")
    return text.encode()


def _text(evaluated: Evaluated, model: str) -> str:
    scores = evaluated.scores
    lines = [
        f"{shown(evaluated.weights_file)} on {scores.images:,} {evaluated.split} images of "
        f"{evaluated.dataset}:",
        f"accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}, calibration error (ECE) "
        f"{scores.ece:.4f}",
        scores.per_class.to_string(index=False, float_format="{:.4f}".format),
        *_confusion(scores),
    ]
    if (folder := evaluated.folder) is not None:
        names = [f"evaluation-{evaluated.split}.json", f"evaluation-{evaluated.split}.csv"]
        hardest = folder / f"hardest-{evaluated.split}"
        if isinstance(hardest, Path):
            names.append(f"{hardest.name}/")
        lines.append(f"files in {shown(folder)}: {' '.join(names)}")
        if isinstance(hardest, Path):
            words = [model, str(shown(hardest)), "--top", "3"]
            lines.append(f"next: {shlex.join(['python', '-m', 'cifar_dist.predict', *words])}")
    return "\n".join(lines)


def _confusion(scores: Scores) -> list[str]:
    import pandas as pd

    from cifar_dist.inference.scores import MATRIX_CLASSES

    classes = list(scores.per_class["class"])
    if len(classes) > MATRIX_CLASSES:
        return [f"confusion of {len(classes)} classes: too wide to print; --format json has it"]
    table = pd.DataFrame(scores.confusion, classes, classes)
    return ["confusion, a row for each label, a column for each answer:", table.to_string()]


def main(words: list[str]) -> None:
    """Parse, evaluate, and print what came of it."""
    config = parse_evaluate(words)
    try:
        evaluated = evaluate(config, lambda event: print(event["message"], file=sys.stderr))
    except (UserError, RunFailed):
        raise
    except Exception:
        raise RunFailed(traceback.format_exc().strip()) from None
    if config.format == "json":
        print(json.dumps(evaluated.to_dict(), indent=2))
    elif config.format == "csv":
        print(_csv(evaluated).decode(), end="")
    else:
        print(_text(evaluated, config.model))


if __name__ == "__main__":
    run_command(main)
