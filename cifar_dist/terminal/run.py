"""A run at the terminal: one live line, or one plain line an epoch."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from cifar_dist.events import (
    EpochDone,
    Event,
    Plan,
    Started,
    StepDone,
    Waiting,
    Warned,
    WorkersLost,
)
from cifar_dist.terminal.hints import put

_ERASE = "\r\x1b[K"


class Display:
    """Listener that draws a run: on a terminal over one live line, elsewhere a line an epoch."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._live = stream.isatty()
        self._open = False
        self._max_epochs = self._steps_per_epoch = 0
        self._starts = 0
        self._first_epoch: int | None = None
        self._began = 0.0

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Plan():
                self._plan(event)
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case EpochDone():
                self._epoch(event)
            case WorkersLost(message):
                self.line(f"workers lost: {message}")
            case Warned(message) | Waiting(message):
                self.line(message)

    def line(self, text: str) -> None:
        """Write a line of its own, over the live one if there is one."""
        put(self.stream, f"{_ERASE if self._open else ''}{text}\n")
        self._open = False

    def close(self) -> None:
        """End the live line, so that what is printed next begins a new one."""
        if self._open:
            self.line("")

    def _plan(self, plan: Plan) -> None:
        self._max_epochs, self._steps_per_epoch = plan.max_epochs, plan.steps_per_epoch
        for text in plan.lines:
            self.line(text)

    def _start(self, started: Started) -> None:
        self._starts += 1
        self._first_epoch = None
        self._began = time.monotonic()
        checkpoint = (started.checkpoint or "").rpartition("/")[2]
        if self._starts > 1:
            again = f"from {checkpoint or 'the beginning'}"
            self.line(f"restarted with {started.world_size} workers {again}")
        elif checkpoint:
            self.line(f"resumed from {checkpoint}")

    def _step(self, step: StepDone) -> None:
        # In a file each step would leave control characters.
        if not self._live:
            return
        done = step.epoch - 1 + step.step / self._steps_per_epoch
        text = (
            f"epoch {step.epoch}/{self._max_epochs}"
            f"  step {step.step}/{self._steps_per_epoch}"
            f"  loss {step.loss:.4f}  accuracy {step.accuracy:.4f}"
            f"  {step.images_per_second:,.0f} images/s  {self._left(step.epoch, done)}"
        )
        # Asked at each step, since a window may be resized. One column stays free: a line that
        # wraps would not be erased by the next one.
        columns = shutil.get_terminal_size().columns
        put(self.stream, f"{_ERASE}{text[: columns - 1]}")
        self._open = True

    def _epoch(self, done: EpochDone) -> None:
        row = done.row
        left = self._left(row["epoch"], row["epoch"])
        self.line(
            f"epoch {row['epoch']}/{self._max_epochs}  loss {row['train_loss']:.4f}"
            f"  accuracy {row['train_accuracy']:.4f}  val_loss {row['val_loss']:.4f}"
            f"  val_accuracy {row['val_accuracy']:.4f}"
            f"  {row['images_per_second']:,.0f} images/s  {left}"
        )

    def _left(self, epoch: int, done: float) -> str:
        """Return the time left, at the pace of the epochs since this start."""
        if self._first_epoch is None:
            self._first_epoch = epoch
        # Epochs of an earlier start took none of this one's time: counted in, a resumed run would
        # seem nearly done.
        here = done - (self._first_epoch - 1)
        seconds = (time.monotonic() - self._began) / here * (self._max_epochs - done)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return seconds formatted for display: ``3:05`` or ``1:02:03``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
