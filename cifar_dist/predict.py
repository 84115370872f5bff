"""``python -m cifar_dist.predict``: classify images with a trained model."""

from __future__ import annotations

import codecs
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.cli import parse_predict
from cifar_dist.config.model import PredictConfig
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, ignore
from cifar_dist.exits import run_command
from cifar_dist.terminal.hints import in_one_line, message_to_stderr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cifar_dist.data.cache import DatasetInfo
    from cifar_dist.inference.model import TrainedModel

STANDARD_INPUT = "-"
EXPORT = ("python", "-m", "cifar_dist.export")


@dataclass(frozen=True)
class Prediction:
    """The classes that a model predicts for an image."""

    image: str
    """Its file, as it was found; ``-`` for standard input."""
    classes: tuple[tuple[str, float], ...]
    """The most probable classes with their probabilities, in falling order."""
    error: str | None = None
    """Why the image could not be read, in one line; it then has no classes."""


def predict(config: PredictConfig, listener: Listener = ignore) -> Iterator[Prediction]:
    """Load a model, and classify images, in the order in which they are named.

    Args:
        config: the model and the images.
        listener: notified of a precision that needs a GPU.

    Returns:
        An iterator that computes a batch at a time.

    Raises:
        UserError: no such model or folder, or bad weights. An image that cannot be read raises
            nothing; its prediction says so.
    """
    from cifar_dist.inference.model import model_of

    # A generator would load the model at the first image: returned from a function, a bad model is
    # refused at the call.
    return _predictions(config, *model_of(config, listener, use_gpu=config.use_gpu))


def _predictions(
    config: PredictConfig, model: TrainedModel, about: DatasetInfo
) -> Iterator[Prediction]:
    # Threads suffice, since Pillow decodes without the interpreter's lock; a batch at a time, so
    # that a folder of any size takes the memory of one.
    with ThreadPoolExecutor() as pool:
        for inputs in _chunks(_inputs(config.images), config.batch_size):
            read = list(pool.map(lambda each: _read(each[1], about), inputs))
            pixels = [each for each in read if not isinstance(each, str)]
            found = _classified(pixels, config, model, about)
            for (name, _), each in zip(inputs, read, strict=True):
                if isinstance(each, str):
                    yield Prediction(name, (), each)
                else:
                    yield Prediction(name, next(found))


def _classified(
    pixels: list[NDArray[np.uint8]], config: PredictConfig, model: TrainedModel, about: DatasetInfo
) -> Iterator[tuple[tuple[str, float], ...]]:
    """Yield each image's most probable classes."""
    import numpy as np
    import torch

    from cifar_dist.inference.sharded import batched_logits

    if not pixels:
        return
    for logits in batched_logits(model.logits, np.stack(pixels), config.batch_size):
        probabilities = torch.from_numpy(logits).double().softmax(dim=1)
        top = probabilities.topk(min(config.top, len(about.classes)))
        for row in zip(top.indices, top.values, strict=True):
            yield tuple((about.classes[int(k)], float(p)) for k, p in zip(*row, strict=True))


Source = Path | bytes | ValueError
"""A file, an image's content, or why there is neither."""


def _inputs(words: Sequence[str]) -> Iterator[tuple[str, Source]]:
    from cifar_dist.inference.images import pictures_in

    for word in words:
        if word == STANDARD_INPUT:
            yield from _from_standard_input()
        elif os.path.isdir(word):
            if found := pictures_in(Path(word)):
                yield from ((str(file), file) for file in found)
            elif len(words) == 1:
                raise UserError(f"{word}: holds no images; name another folder, or files")
            else:
                yield word, ValueError("holds no images")
        else:
            yield word, Path(word)


def _from_standard_input() -> Iterator[tuple[str, Source]]:
    """Yield an image, or the images whose names standard input holds, a line each."""
    from cifar_dist.inference.images import is_picture

    if sys.stdin is None:
        raise UserError("-: standard input is closed; name files, or pass an image or names to it")
    content = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8)
    # A list of lines, or of names as `find -print0` separates them. Names are bytes, whatever
    # their encoding.
    zeros = b"\0" in content
    parts = content.split(b"\0") if zeros else content.splitlines()
    names = [os.fsdecode(part) for part in parts if part]
    # One file that is there makes a list, whichever name is missing: in an image no line is a
    # file's name. Bytes between zeros may be, of one letter, so that the first one decides.
    if any(map(os.path.isfile, names[:1] if zeros else names)) or not (
        zeros or not names or is_picture(content)
    ):
        yield from ((name, Path(name)) for name in names)
    else:
        yield STANDARD_INPUT, content


def _chunks(inputs: Iterator[tuple[str, Source]], size: int) -> Iterator[list[tuple[str, Source]]]:
    while chunk := list(islice(inputs, size)):
        yield chunk


def _read(source: Source, about: DatasetInfo) -> NDArray[np.uint8] | str:
    from cifar_dist.inference.images import read_picture

    try:
        if isinstance(source, ValueError):
            raise source
        return read_picture(source, about.side, about.channels)
    except ValueError as error:
        return str(error)


def _line(prediction: Prediction, form: str) -> str:
    if form == "jsonl":
        classes = [{"class": name, "probability": p} for name, p in prediction.classes]
        return json.dumps({"image": prediction.image, "classes": classes})
    found = "  ".join(f"{name:<10} {p:.4f}" for name, p in prediction.classes)
    return f"{found}  {in_one_line(prediction.image)}"


def main(words: list[str]) -> None:
    """Parse, predict, print a line an image, and errors and speed to standard error."""
    config = parse_predict(words)
    done = wrong = 0
    predictions = predict(config, message_to_stderr)
    began = time.monotonic()
    for prediction in predictions:
        if prediction.error is not None:
            wrong += 1
            # One bad file among thousands does not end the command; the exit code shows it at the
            # end.
            print(f"error: {in_one_line(prediction.image)}: {prediction.error}", file=sys.stderr)
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
