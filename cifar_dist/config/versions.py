"""Settings in files that other versions of cifar_dist wrote.

- A setting that did not exist when a run was started has its default (`own_settings`), not what
  the run's preset gives it today.
- A setting that only a newer version has is refused (`own_settings`).
- Version 0.1.0 wrote resolved values, where later ones write null for a setting that follows from
  others (`as_given`). Such a file gives ``flip`` and ``gpus_per_worker`` values and has no null
  among the settings that follow. It does not say which values were typed: they all count as given,
  but for resources that equal what they follow from, which follow again, so that ``--use-gpu`` and
  ``--num-workers`` can be changed. A later file in which all of them were typed reads the same
  way: the rule decides where a run runs, never what it computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cifar_dist import __version__
from cifar_dist.config.files import read_settings
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.storage import AnyPath


def own_settings(file: AnyPath, known: Sequence[str]) -> dict[str, Any]:
    """Read a run's or a search's own ``config.yaml``.

    Args:
        file: the file.
        known: the names of all settings that it may hold.

    Raises:
        UserError: the file is damaged, or a newer version wrote it.
    """
    settings = read_settings(file)
    for name in settings:
        # Refused, since what a newer setting meant would be lost, and a resumed run would compute
        # something else.
        if name not in known:
            raise UserError(
                f"{file}: the setting {name} is unknown to this version, {__version__}; use the "
                "newer version of cifar_dist that wrote the file"
            )
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    # Defaults are filled in here, since `make_config` would take what is missing from the preset.
    return {**defaults, **as_given(settings)}


def as_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file, with None for those of version 0.1.0 that follow again."""
    numbers = {name: value for name, value in settings.items() if isinstance(value, int | float)}
    null = [name for name in _FOLLOWING if name in settings and settings[name] is None]
    if null or not {"flip", "gpus_per_worker"} <= numbers.keys():
        return dict(settings)
    follows: dict[str, Any] = {"gpus_per_worker": 1.0 if settings.get("use_gpu") else 0.0}
    if {"workers_per_trial", "cpus_per_worker"} <= numbers.keys():  # a search's file
        workers = numbers["workers_per_trial"]
        follows |= {
            "workers_per_trial": settings.get("num_workers"),
            "cpus_per_trial": workers * numbers["cpus_per_worker"],
            "gpus_per_trial": workers * numbers["gpus_per_worker"],
        }
    again = {name: None for name, value in follows.items() if settings.get(name) == value}
    return {**settings, **again}


_FOLLOWING = ("flip", "gpus_per_worker", "workers_per_trial", "cpus_per_trial", "gpus_per_trial")
"""Settings that version 0.1.0 had, that follow from others, and that are written as null."""
