"""``python -m cifar_dist.predict``: what a model takes images for."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.cli import parse_predict, run_command
from cifar_dist.config.model import PredictConfig
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, ignore
from cifar_dist.inference.model import model_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cifar_dist.data.cache import DatasetInfo
    from cifar_dist.inference.model import TrainedModel

STANDARD_INPUT = "-"
EXPORT = ("python", "-m", "cifar_dist.export")


@dataclass(frozen=True)
class Prediction:
    """What a model takes an image for."""

    image: str
    """Its file, as it was found; ``-`` for standard input."""
    classes: tuple[tuple[str, float], ...]
    """The most probable classes with their probabilities, the first one first."""
    error: str | None = None
    """Why the image could not be read, in a line; it then has no classes."""


def predict(config: PredictConfig, listener: Listener = ignore) -> Iterator[Prediction]:
    """Load a model, and classify images, in the order in which they are named.

    Args:
        config: the model and the images.
        listener: notified of a precision that needs a GPU.

    Returns:
        An iterator that does a batch at a time.

    Raises:
        UserError: no such model or folder, or bad weights. An image that cannot be read raises
            nothing; its prediction says so.
    """
    return _predictions(config, *model_of(config, listener, use_gpu=config.use_gpu))


def _predictions(
    config: PredictConfig, model: TrainedModel, about: DatasetInfo
) -> Iterator[Prediction]:
    import torch

    with ThreadPoolExecutor() as pool:
        for batch in _batches(_inputs(config.images), config.batch_size):
            read = list(pool.map(lambda each: _read(each[1], about), batch))
            pixels = [each for each in read if not isinstance(each, str)]
            found: Iterator[tuple[tuple[str, float], ...]] = iter(())
            if pixels:
                logits = model.logits(torch.stack([torch.from_numpy(each) for each in pixels]))
                top = logits.double().softmax(dim=1).topk(min(config.top, len(about.classes)))
                found = (
                    tuple((about.classes[int(k)], float(p)) for k, p in zip(*row, strict=True))
                    for row in zip(top.indices, top.values, strict=True)
                )
            for (name, _), each in zip(batch, read, strict=True):
                if isinstance(each, str):
                    yield Prediction(name, (), each)
                else:
                    yield Prediction(name, next(found))


def _inputs(words: Iterable[str]) -> Iterator[tuple[str, Path | bytes]]:
    from cifar_dist.inference.images import pictures_in

    for word in words:
        if word == STANDARD_INPUT:
            yield from _from_standard_input(sys.stdin.buffer.read())
        elif Path(word).is_dir():
            found = pictures_in(Path(word))
            if not found:
                raise UserError(f"{word}: holds no images; name another folder, or files")
            yield from ((str(file), file) for file in found)
        else:
            yield word, Path(word)


def _from_standard_input(content: bytes) -> Iterator[tuple[str, Path | bytes]]:
    """An image, or names of images."""
    lines = content.splitlines()
    if all(Path(line.decode(errors="replace")).exists() for line in lines[:1]) and lines:
        yield from ((name, Path(name)) for name in map(bytes.decode, lines) if name)
    else:
        yield STANDARD_INPUT, content


def _batches(
    inputs: Iterator[tuple[str, Path | bytes]], size: int
) -> Iterator[list[tuple[str, Path | bytes]]]:
    while batch := list(islice(inputs, size)):
        yield batch


def _read(source: Path | bytes, about: DatasetInfo) -> NDArray[np.uint8] | str:
    from cifar_dist.inference.images import read_picture

    try:
        return read_picture(source, about.side, about.channels)
    except ValueError as error:
        return str(error)


def _line(prediction: Prediction, form: str) -> str:
    if form == "jsonl":
        classes = [{"class": name, "probability": p} for name, p in prediction.classes]
        return json.dumps({"image": prediction.image, "classes": classes})
    found = "  ".join(f"{name:<10} {p:.4f}" for name, p in prediction.classes)
    return f"{found}  {prediction.image}"


def main(words: list[str]) -> None:
    """Parse, predict, print a line an image, and to standard error what goes wrong and how fast."""
    config = parse_predict(words)
    done = wrong = 0
    predictions = predict(config, lambda event: print(event["message"], file=sys.stderr))
    began = time.monotonic()
    for prediction in predictions:
        if prediction.error is not None:
            wrong += 1
            print(f"error: {prediction.image}: {prediction.error}", file=sys.stderr)
            continue
        done += 1
        print(_line(prediction, config.format))
    seconds = time.monotonic() - began
    print(
        f"{done:,} images, {wrong:,} errors; {done / seconds:,.0f} images/s",
        file=sys.stderr,
    )
    print(f"next: {shlex.join([*EXPORT, config.model])}", file=sys.stderr)
    if wrong:
        sys.stdout.flush()
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
