"""``python -m cifar_dist.evaluate``: measure a run's weights, or any others, on a split."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.cli import parse_evaluate
from cifar_dist.config.model import EvaluateConfig
from cifar_dist.config.train import with_absolute_paths
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, ignore
from cifar_dist.exits import run_command
from cifar_dist.inference.lookup import run_of, trained_config, weights_file
from cifar_dist.storage import AnyPath, as_json, at, delete_folder, write_atomically
from cifar_dist.terminal.hints import message_to_stderr, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cifar_dist.config.train import TrainConfig
    from cifar_dist.data.cache import CachedDataset
    from cifar_dist.data.datasets import LabelledImages
    from cifar_dist.inference.scores import Scores


HARDEST = 24
"""Number of images that are written as files."""


@dataclass(frozen=True)
class Evaluated:
    """The result of `evaluate`."""

    weights_file: AnyPath
    dataset: str
    split: str
    scores: Scores
    folder: AnyPath | None
    """Folder of ``evaluation-<split>.json`` and ``.csv``, and, on a disk, of the hardest
    images, in ``hardest-<split>/``."""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``evaluation-<split>.json`` holds."""
        about = {"weights": str(self.weights_file), "dataset": self.dataset, "split": self.split}
        return {**about, **self.scores.to_dict()}


def evaluate(config: EvaluateConfig, listener: Listener = ignore) -> Evaluated:
    """Measure a model on a split of its data set, counting each image once.

    Args:
        config: the evaluation. With ``num_workers=0`` it runs in this process without Ray.
        listener: notified of waiting for an autoscaling cluster, and of a precision that needs a
            GPU.

    Raises:
        UserError: no such model, bad weights or data, or too few resources.
        RunFailed: a worker failed, or a file cannot be written.
    """
    # Checked first: a misspelt run is refused before the data set is decoded or downloaded.
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

    run = run_of(config)
    started_with = run.started_with_fingerprint() if run else None
    source = find_source(trained.dataset, str(trained.data_dir))
    dataset = prepare(trained.dataset, source, started_with, listener)
    if started_with not in (None, dataset.fingerprint):
        raise UserError(
            f"--data-dir {trained.data_dir}: holds other data than the run was trained on; name "
            "the folder that it was trained on"
        )
    logits = _logits(config, trained, dataset, listener)

    from cifar_dist.training.torchmetrics_alone import load_torchmetrics_alone

    # Before the next import, which would load SciPy and matplotlib along with torchmetrics.
    load_torchmetrics_alone()
    from cifar_dist.inference.scores import score

    images, members = dataset.part(config.split)
    scores = score(logits, images.labels[members], dataset.classes)
    # A run's folder keeps the evaluation of the run's result, not of one of its checkpoints.
    of_run = run.path if run and file == run.model_file else None
    folder = at(config.output) if config.output else of_run
    evaluated = Evaluated(file, dataset.name, config.split, scores, folder)
    if folder:
        _write(folder, evaluated)
        if isinstance(folder, Path):
            _write_hardest(folder, config.split, logits, images, members, dataset.classes)
    return evaluated


def _logits(
    config: EvaluateConfig, trained: TrainConfig, dataset: CachedDataset, listener: Listener
) -> NDArray[np.float32]:
    from cifar_dist.model.networks import network_weights

    where = str(weights_file(config))
    weights = network_weights(where, trained.network, trained.stem, listener)
    if config.num_workers == 0:
        from cifar_dist.inference.sharded import split_logits

        return split_logits(where, weights, trained, dataset, config.split, config.batch_size)

    from safetensors.torch import save

    from cifar_dist.cluster.evaluator import Work, logits_on_ray
    from cifar_dist.cluster.resources import have_resources
    from cifar_dist.cluster.session import session

    # The weights go along as bytes: their file may lie on the driver's disk alone.
    work = Work(
        trained, dataset.fingerprint, where, save(weights), config.split,
        config.batch_size,
    )  # fmt: skip
    with session(trained.verbose):
        have_resources(trained, listener)
        return logits_on_ray(work)


def _write(folder: AnyPath, evaluated: Evaluated) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be created ({error.strerror})") from None
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
    """Write the images to whose label the model gives the least probability, the hardest first."""
    import torch
    from PIL import Image

    labels = images.labels[members]
    # By the logarithm, in float64 as the scores: probabilities that round to 0 would tie, and the
    # order of the hardest images would be that of the data set.
    log_probabilities = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
    found = log_probabilities[range(len(labels)), labels]
    into = folder / f"hardest-{split}"
    delete_folder(into)  # from an earlier evaluation, maybe of other weights
    into.mkdir()
    # Stable, so that images with the same logits are named alike in every evaluation.
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
    return [
        "confusion matrix, a row for each label, a column for each prediction:",
        table.to_string(),
    ]


def main(words: list[str]) -> None:
    """Parse, evaluate, and print the metrics."""
    config = parse_evaluate(words)
    evaluated = evaluate(config, message_to_stderr)
    if config.format == "json":
        print(json.dumps(evaluated.to_dict(), indent=2))
    elif config.format == "csv":
        print(_csv(evaluated).decode(), end="")
    else:
        print(_text(evaluated, config.model))


if __name__ == "__main__":
    run_command(main)
