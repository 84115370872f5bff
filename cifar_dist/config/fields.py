"""What settings are made of: their types, ranges and durations, and the flags that name them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cifar_dist.errors import UserError


def whole_or_fraction(gpus: float) -> bool:
    """Return whether Ray can give a worker so many GPUs: part of one, or a whole number."""
    return gpus <= 1 or gpus == int(gpus)


def flag(name: str) -> str:
    """The command-line flag of a setting: ``weight_decay`` gives ``--weight-decay``."""
    return "--" + name.replace("_", "-")


def unknown_name(kind: str, name: str, where: str, known: list[str]) -> UserError:
    """The error for a name that is not among the known ones, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return UserError(f"unknown {kind} {name}{where}: {advice}")


def finite(value: float) -> bool:
    """Return whether a number is neither infinite nor NaN."""
    return math.isfinite(value)


DURATION = r"(\d+(?:\.\d+)?)([smh]?)"
"""Seconds, or a number with its unit: ``90``, ``90s``, ``30m``, ``8h``."""


def in_seconds(duration: str) -> float:
    """Seconds of what `DURATION` matches."""
    match = re.fullmatch(DURATION, duration)
    assert match is not None  # checked when the config was made
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def as_duration(given: Any) -> Any:
    """A number, as YAML has it, as text; anything else as it is."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    return f"{given:g}" if number else given


Ranges = Sequence[tuple[str, Callable[[Any], object], str]]
"""(setting, predicate, what must hold) for every setting that has a range."""


def check_ranges(config: Any, ranges: Ranges) -> None:
    """See that every setting that has a range lies in it.

    Raises:
        UserError: one does not.
    """
    for name, holds, rule in ranges:
        value = getattr(config, name)
        if not holds(value):
            raise UserError(f"{flag(name)} {value}: must be {rule}")


def coerce_fields(config: Any, but: tuple[str, ...] = ()) -> None:
    """Turn every field of a frozen config into its declared type, where nothing is lost.

    Args:
        config: the config.
        but: fields that are no plain values.

    Raises:
        UserError: a value has another type.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if field.name not in but:
            value = _as_declared(field.name, getattr(config, field.name), kinds[field.name])
            object.__setattr__(config, field.name, value)


def _as_declared(name: str, value: Any, kind: Any) -> Any:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = typing.get_args(kind) if union else (kind,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal:
            if str(value) in typing.get_args(option):
                return str(value)
        elif isinstance(value, bool) or option is bool:
            if isinstance(value, bool) and option is bool:
                return value
        elif option is float and isinstance(value, int):
            return float(value)
        elif isinstance(option, type) and isinstance(value, option):
            return value
    raise UserError(f"{flag(name)} {value!r}: must be {_in_words(options)}")


def _in_words(options: tuple[Any, ...]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    choices = [
        " or ".join(typing.get_args(option))
        if typing.get_origin(option) is Literal
        else words[option]
        for option in options
        if option is not type(None)
    ]
    return " or ".join(choices)
