"""Environment variables that are set for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def variables_restored(*names: str) -> Iterator[None]:
    """Give these environment variables their values back, or none, when this ends.

    In a notebook the process outlives a run, and what one has set would hold for the next. Also a
    decorator of functions.
    """
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def variables_set(settings: Mapping[str, str], keep: bool = False) -> Iterator[None]:
    """Set environment variables while this lasts.

    Args:
        settings: their values by name.
        keep: leave those as they are that are set.
    """
    with variables_restored(*settings):
        for name, value in settings.items():
            if not (keep and name in os.environ):
                os.environ[name] = value
        yield
