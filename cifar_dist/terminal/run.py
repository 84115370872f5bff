"""What the person at the terminal sees of a run: one live line, or one plain line an epoch."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from cifar_dist.events import Event

_ERASE = "\r\x1b[K"


class Display:
    """Draws a run's events: on a terminal over one live line, elsewhere a line an epoch."""

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
        shows = {
            "plan": self._plan,
            "start": self._start,
            "step": self._step,
            "epoch": self._epoch,
            "lost": self._lost,
            "warning": lambda event: self.line(event["message"]),
            "waiting": lambda event: self.line(event["message"]),
        }
        shows[event["kind"]](event)

    def line(self, text: str) -> None:
        """A line of its own, over the live one if there is one."""
        self.stream.write(f"{_ERASE if self._open else ''}{text}\n")
        self.stream.flush()
        self._open = False

    def close(self) -> None:
        """End the live line, so that what is printed next begins a new one."""
        if self._open:
            self.line("")

    def _plan(self, event: Event) -> None:
        self._max_epochs, self._steps_per_epoch = event["max_epochs"], event["steps_per_epoch"]
        for text in event["lines"]:
            self.line(text)

    def _start(self, event: Event) -> None:
        self._starts += 1
        self._first_epoch = None
        self._began = time.monotonic()
        if self._starts > 1:
            again = f"from {event['checkpoint']}" if event["checkpoint"] else "from the beginning"
            self.line(f"restarted with {event['world_size']} workers {again}")

    def _lost(self, event: Event) -> None:
        self.line(f"workers lost: {event['message']}")

    def _step(self, event: Event) -> None:
        if not self._live:
            return
        done = event["epoch"] - 1 + event["step"] / self._steps_per_epoch
        text = (
            f"epoch {event['epoch']}/{self._max_epochs}"
            f"  step {event['step']}/{self._steps_per_epoch}"
            f"  loss {event['loss']:.4f}  accuracy {event['accuracy']:.4f}"
            f"  {event['images_per_second']:,.0f} images/s  {self._left(event['epoch'], done)}"
        )
        columns = shutil.get_terminal_size().columns
        self.stream.write(f"{_ERASE}{text[: columns - 1]}")
        self.stream.flush()
        self._open = True

    def _epoch(self, event: Event) -> None:
        left = self._left(event["epoch"], event["epoch"])
        self.line(
            f"epoch {event['epoch']}/{self._max_epochs}  loss {event['train_loss']:.4f}"
            f"  accuracy {event['train_accuracy']:.4f}  val_loss {event['val_loss']:.4f}"
            f"  val_accuracy {event['val_accuracy']:.4f}"
            f"  {event['images_per_second']:,.0f} images/s  {left}"
        )

    def _left(self, epoch: int, done: float) -> str:
        """Time left, from the pace of the epochs that this start has done."""
        if self._first_epoch is None:
            self._first_epoch = epoch
        here = done - (self._first_epoch - 1)
        seconds = (time.monotonic() - self._began) / here * (self._max_epochs - done)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """``3:05`` or ``1:02:03``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
