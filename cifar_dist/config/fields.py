"""The parts of settings: types, ranges, durations, flags, and values derived from others."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml

from cifar_dist.errors import UserError


@dataclass(frozen=True)
class Resolved:
    """Base of configs in which the default of a setting may follow from other settings.

    Such a setting is None when it is not given. Once the object exists all settings hold their
    final values, and the object remembers which of them were derived, so that they follow again
    when another config is made from this one.
    """

    # Not a field, so that it is neither compared nor written. An object that derives a setting
    # has a mapping of its own, which pickle and copy keep.
    _derived: ClassVar[Mapping[str, str]] = {}

    def _derive(self, name: str, value: Any, source: str) -> None:
        """Give a setting that is None the value that follows from ``source``."""
        if getattr(self, name) is None:
            # The class is frozen for everyone but its own construction.
            object.__setattr__(self, name, value)
            object.__setattr__(self, "_derived", {**self._derived, name: source})

    def to_dict(self) -> dict[str, Any]:
        """Return every setting by name, resolved, as plain values that YAML and JSON hold."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def derived(self) -> Mapping[str, str]:
        """Return the settings that were derived, each with what it follows from."""
        return self._derived

    def given(self) -> dict[str, Any]:
        """Return every setting by name as it was given: None where it was derived."""
        return {**self.to_dict(), **dict.fromkeys(self.derived())}

    def replace(self, **changes: Any) -> Self:
        """Return a config with some settings changed; what was derived follows again.

        Raises:
            UserError: a value has the wrong type or lies outside its range.
        """
        again: dict[str, Any] = {**dict.fromkeys(self._derived), **changes}
        return dataclasses.replace(self, **again)


def settings_as_yaml(config: Resolved) -> str:
    """Return the settings of a config as they were given, as the text of a YAML file.

    A derived one is null, with its value in a comment: read back, it follows again.
    """
    resolved, derived = config.to_dict(), config.derived()
    lines = []
    for name, value in config.given().items():
        # One setting at a time, since PyYAML writes no comments of its own.
        lines.append(yaml.safe_dump({name: value}, sort_keys=False).rstrip("\n"))
        if name in derived:
            lines[-1] += f"  # {resolved[name]}: follows from {derived[name]}"
    return "\n".join(lines) + "\n"


def whole_or_fraction(gpus: float) -> bool:
    """Return whether Ray can give a worker so many GPUs: part of one, or a whole number."""
    return gpus <= 1 or gpus == int(gpus)


def flag(name: str) -> str:
    """Return the command-line flag of a setting: ``--weight-decay`` for ``weight_decay``."""
    return "--" + name.replace("_", "-")


def unknown_name(kind: str, name: str, where: str, known: list[str]) -> UserError:
    """Return the error for a name that is not among the known ones, with the nearest of those."""
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return UserError(f"unknown {kind} {name}{where}: {advice}")


def finite(value: float) -> bool:
    """Return whether a number is neither infinite nor NaN."""
    return math.isfinite(value)


DURATION = r"(\d+(?:\.\d+)?)([smh]?)"
"""Seconds, or a number with its unit: ``90``, ``90s``, ``30m``, ``8h``."""


def in_seconds(duration: str) -> float:
    """Return the seconds of what `DURATION` matches."""
    match = re.fullmatch(DURATION, duration)
    assert match is not None  # checked when the config was made
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def as_duration(given: Any) -> Any:
    """Return a number, as YAML has it, as text, and anything else as it is."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    return f"{given:g}" if number else given


Ranges = Sequence[tuple[str, Callable[[Any], object], str]]
"""(setting, predicate, what must hold) for every setting that has a range."""


def check_ranges(config: Any, ranges: Ranges) -> None:
    """Check that every setting that has a range lies in it.

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
        but: fields to skip, since they hold no plain values.

    Raises:
        UserError: a value has another type.
    """
    kinds = _declared(config.__class__)
    for field in dataclasses.fields(config):
        if field.name not in but:
            value = _as_declared(field.name, getattr(config, field.name), kinds[field.name])
            object.__setattr__(config, field.name, value)


@functools.cache  # the hints are text, and evaluating them took 4 ms for each config of a search
def _declared(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config, include_extras=True)


def _as_declared(name: str, value: Any, kind: Any) -> Any:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = typing.get_args(kind) if union else (kind,)
    for annotated in options:
        option = _without_metadata(annotated)
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal:
            # YAML reads `precision: 32` as a number.
            if str(value) in _choices(annotated):
                return str(value)
        # Before the numbers: true is a whole number to `isinstance`, and `num_workers: true` would
        # mean one worker.
        elif isinstance(value, bool) or option is bool:
            if isinstance(value, bool) and option is bool:
                return value
        # In YAML people write 1 for 1.0.
        elif option is float and isinstance(value, int):
            return float(value)
        elif isinstance(option, type) and isinstance(value, option):
            return value
    raise UserError(f"{flag(name)} {value!r}: must be {_described(options)}")


def _without_metadata(option: Any) -> Any:
    return typing.get_args(option)[0] if typing.get_origin(option) is Annotated else option


def _choices(option: Any) -> tuple[str, ...]:
    """Return the choices of a ``Literal``, and the names that its registry has by now."""
    registries = getattr(option, "__metadata__", ())
    names = [name for registry in registries for name in registry]
    return tuple(dict.fromkeys([*typing.get_args(_without_metadata(option)), *names]))


def _described(options: tuple[Any, ...]) -> str:
    """Return the types, formatted for display."""
    types_known = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    found = [
        " or ".join(_choices(option))
        if typing.get_origin(_without_metadata(option)) is Literal
        else types_known[_without_metadata(option)]
        for option in options
        if option is not type(None)
    ]
    return " or ".join(found)
