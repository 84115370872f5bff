"""Where training steps wait for the GPU, by file and line.

A step that reads a value from the device, or copies to it from pageable memory, makes the CPU wait
until the device has done all that was queued; the device then idles until the next kernels are
queued. ``torch.cuda.set_sync_debug_mode`` reports each such place. It is switched on from the
first step of an epoch to the end of its last one, so that what an epoch reads at its end, and its
validation, do not count.
"""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

REPORTED = re.compile("called a synchronizing")
"""torch's words, in mode ``warn``."""
ROOT = str(Path(__file__).resolve().parent.parent)


class WaitsInSteps(Callback):
    """Collects the places in an epoch's steps that wait for the device.

    Args:
        mode: ``warn`` counts each place; ``error`` raises RuntimeError at the first.
        switch: sets the mode; where there is no GPU, something else.
    """

    def __init__(
        self, mode: str = "warn", switch: Callable[[str], None] = torch.cuda.set_sync_debug_mode
    ) -> None:
        self.mode = mode
        self.places: Counter[str] = Counter()
        """Waits by place: ``file:line`` of the project's innermost call, and torch's if other."""
        self.steps = 0
        """Steps that were watched."""
        self._switch = switch
        self._watching = contextlib.ExitStack()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._watching.enter_context(self._watched())
        self.steps += 1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.is_last_batch:
            self._watching.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._watching.close()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        # Within the epoch: the project and Lightning set filters of their own before it.
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            show = warnings.showwarning

            def note(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
                if REPORTED.search(str(message)):
                    self.places[_place(filename, lineno)] += 1
                else:
                    show(message, category, filename, lineno, *more)

            warnings.showwarning = note
            self._switch(self.mode)
            try:
                yield
            finally:
                self._switch("default")


def _place(filename: str, lineno: int) -> str:
    called = f"{_short(filename)}:{lineno}"
    for frame in reversed(traceback.extract_stack()):
        file = frame.filename
        if file.startswith(ROOT) and "site-packages" not in file and file != __file__:
            mine = f"{_short(file)}:{frame.lineno}"
            return mine if mine == called else f"{mine} ({called})"
    return called


def _short(file: str) -> str:
    """The path within the project, or within ``site-packages``."""
    return file.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]


@contextlib.contextmanager
def callback_added(callback: Callback) -> Iterator[None]:
    """While this lasts, give every new `Trainer` of this process one more callback.

    It is called before the trainer's other callbacks.
    """
    original = pl.Trainer.__init__

    def init(self: pl.Trainer, *args: Any, **options: Any) -> None:
        options["callbacks"] = [callback, *(options.get("callbacks") or [])]
        original(self, *args, **options)

    pl.Trainer.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        pl.Trainer.__init__ = original  # type: ignore[method-assign]
