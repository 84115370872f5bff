"""From the words on the command line to a config."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any, TypeVar

import tyro

from cifar_dist.config.fields import flag, unknown_name
from cifar_dist.config.files import read_settings
from cifar_dist.config.model import EvaluateConfig, ExportConfig, ModelConfig, PredictConfig
from cifar_dist.config.presets import PRESETS
from cifar_dist.config.report import ReportConfig
from cifar_dist.config.train import TrainConfig, make_config, setting_names, with_preset
from cifar_dist.config.tune import (
    DEFAULT_MAX_EPOCHS,
    TuneConfig,
    make_tune_config,
    split_settings,
    tune_setting_names,
)
from cifar_dist.config.versions import as_given
from cifar_dist.errors import UserError
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.search.directory import SearchDirectory


def parse_train(words: Sequence[str]) -> TrainConfig:
    """Return the config that a ``train`` command line means.

    Precedence, lowest first: defaults, preset, ``--config`` file, flags. With ``--resume`` the
    settings that the run was started with come in place of preset and file. What follows from
    other settings, and was not given, follows from the final ones.

    Args:
        words: the command line after the program's name.

    Raises:
        UserError: an unknown flag, key or bad value.
        SystemExit: after ``--help``.
    """
    early = _before_the_rest(words)
    settings = _under_the_flags(early, RunDirectory.at, make_config)
    defaults = _unchecked(TrainConfig, with_preset(settings))
    return _parse(
        words, _Train, "train", ["config", *setting_names()], _Train(settings=defaults)
    ).settings


def parse_tune(words: Sequence[str]) -> TuneConfig:
    """Return the config that a ``tune`` command line means; precedence as of `parse_train`.

    A setting that is typed as a flag keeps its value, also if the space holds it.

    Raises:
        UserError: an unknown flag, key or bad value.
        SystemExit: after ``--help``.
    """
    early = _before_the_rest(words)
    settings = _under_the_flags(early, SearchDirectory.at, make_tune_config)
    own, of_trials = split_settings(settings)
    trials = _unchecked(TrainConfig, {"max_epochs": DEFAULT_MAX_EPOCHS, **of_trials})
    defaults = _unchecked(TuneConfig, {**own, "train": trials})
    names = ["config", *tune_setting_names(), *setting_names()]
    parsed = _parse(words, _Tune, "tune", names, _Tune(settings=defaults))
    # From the words themselves: a parsed config does not show whether a value was typed or is the
    # default.
    typed = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words}
    fixed = tuple(name for name in setting_names() if typed & {name, f"no_{name}"})
    return parsed.settings.replace(fixed=fixed)


def parse_evaluate(words: Sequence[str]) -> EvaluateConfig:
    """Return the config that an ``evaluate`` command line means.

    Raises:
        UserError: an unknown flag or bad value.
        SystemExit: after ``--help``.
    """
    return _parse_model(words, EvaluateConfig, "evaluate")


def parse_predict(words: Sequence[str]) -> PredictConfig:
    """Return the config that a ``predict`` command line means; raises as `parse_evaluate`."""
    return _parse_model(words, PredictConfig, "predict")


def parse_export(words: Sequence[str]) -> ExportConfig:
    """Return the config that an ``export`` command line means; raises as `parse_evaluate`."""
    return _parse_model(words, ExportConfig, "export")


_Config = TypeVar("_Config", TrainConfig, TuneConfig)


def _unchecked(kind: type[_Config], settings: Mapping[str, Any]) -> _Config:
    """Return the defaults under some settings as they were given, for the parser alone.

    The constructor would check them, and resolve what follows from others, before the flags that
    change them are known.
    """
    defaults = object.__new__(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(defaults, field.name, settings.get(field.name, field.default))
    return defaults


_Model = TypeVar("_Model", bound=ModelConfig)


def _parse_model(words: Sequence[str], kind: type[_Model], command: str) -> _Model:
    names = [field.name for field in dataclasses.fields(kind)]
    return _parse(words, kind, command, names)


def parse_report(words: Sequence[str]) -> ReportConfig:
    """Return the config that a ``report`` command line means.

    Raises:
        UserError: an unknown flag or bad value.
        SystemExit: after ``--help``.
    """
    names = [field.name for field in dataclasses.fields(ReportConfig)]
    return _parse(words, ReportConfig, "report", names)


def _under_the_flags(
    early: argparse.Namespace,
    at: Callable[[str, str], RunDirectory | SearchDirectory],
    make: Callable[[Mapping[str, Any], str], object],
) -> dict[str, Any]:
    """Return the settings that flags override: of what is resumed, else of file and preset."""
    if early.resume:
        storage_path, name = _resumed(early)
        saved = at(storage_path, name).read_config()
        return {**saved.given(), "storage_path": storage_path}
    settings = {} if early.config is None else _from_file(early, make)
    if early.preset is not None:
        settings["preset"] = early.preset
    return settings


def _resumed(early: argparse.Namespace) -> tuple[str, str]:
    """Return storage path and name of what ``--resume`` names."""
    for name in ("config", "preset"):
        if (value := getattr(early, name)) is not None:
            raise UserError(
                f"--{name} {value}: --resume keeps the settings that the run was started with; "
                f"omit --{name}"
            )
    if early.name is None:
        raise UserError("--resume: say which run to resume, --name NAME")
    storage_path = early.storage_path or TrainConfig.storage_path
    named = TrainConfig(name=early.name, storage_path=storage_path)  # checks both
    return named.storage_path, early.name


def _from_file(
    early: argparse.Namespace, make: Callable[[Mapping[str, Any], str], object]
) -> dict[str, Any]:
    """Return the settings of ``--config``, checked, so that messages name the file."""
    settings = as_given(read_settings(early.config))
    make(settings, f" (in {early.config})")
    if settings.get("resume"):
        raise UserError(f"resume (in {early.config}): type --resume instead, with --name")
    if early.preset in PRESETS and PRESETS[early.preset].keys() <= settings.keys():
        raise UserError(
            f"--preset {early.preset}: {early.config} sets everything that it would; "
            "omit one of them"
        )
    return settings


def _before_the_rest(words: Sequence[str]) -> argparse.Namespace:
    """Return the flags that decide what the other flags' defaults are."""
    _check_switches(words)
    # By default argparse completes abbreviations: --pre would be a preset here, and then be refused
    # as unknown by the whole parser.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "name", "storage-path"):
        # A flag without its value is none of this parser's business: the whole one refuses it in
        # one line.
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parser.parse_known_args(list(words))[0]
    except SystemExit:  # e.g. --resume=yes: the whole parser reports what is wrong
        return argparse.Namespace(
            config=None, preset=None, name=None, storage_path=None, resume=False
        )


@dataclasses.dataclass(frozen=True)
class _Train:
    # Its docstring is what --help prints as the command's description.
    """Train an image classifier with DDP workers under Ray."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file of any of these settings; flags override it."""


@dataclasses.dataclass(frozen=True)
class _Tune:
    """Search hyperparameters with Ray Tune: many trials, the worse ones stopped early.

    Every setting of train is one here too. Typed as a flag it keeps its value in all trials,
    also if the space holds it.
    """

    settings: Annotated[TuneConfig, tyro.conf.arg(name="")]
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file of any of these settings; flags override it, and the space's values too."""


_Command = TypeVar("_Command")


def _parse(
    words: Sequence[str],
    kind: type[_Command],
    command: str,
    names: list[str],
    defaults: _Command | None = None,
) -> _Command:
    _check_switches(words)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                kind,
                prog=f"python -m cifar_dist.{command}",
                args=list(words),
                default=tyro.MISSING_NONPROP if defaults is None else defaults,
                # Returned, so that the message can suggest the nearest known flag.
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs),
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        # tyro prints a box of many lines; a refusal is one line.
        raise UserError(_first_sentence(said.getvalue())) from None
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise UserError(f"unexpected word {name!r}: settings are given as --name value")
        raise unknown_name("flag", name, "", list(map(flag, names)))
    command_line: _Command = parsed
    return command_line


def _check_switches(words: Sequence[str]) -> None:
    """Refuse a switch with a value, which tyro would take for the next word.

    Raises:
        UserError: there is one.
    """
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        name, given, value = word.replace("_", "-").partition("=")
        negated = name.startswith("--no-")
        switch = f"--{name.removeprefix('--no-').removeprefix('--')}"
        if switch not in _SWITCHES:
            continue
        if not given:  # `--use-gpu True`, unless that is an image
            if after.lower() not in _YES + _NO or os.path.exists(after):
                continue
            word, value = f"{word} {after}", after
        yes, no = switch, f"--no-{switch.removeprefix('--')}"
        wanted = f"{yes} or {no}"
        if value.lower() in _YES + _NO:
            wanted = yes if (value.lower() in _YES) != negated else no
        raise UserError(f"{word}: {switch} is a switch and takes no value; write {wanted}")


_YES = ("true", "yes", "on", "1")
_NO = ("false", "no", "off", "0")
_SWITCHES = {
    flag(field.name)
    for kind in (TrainConfig, TuneConfig, EvaluateConfig, PredictConfig, ExportConfig, ReportConfig)
    for field in dataclasses.fields(kind)
    if field.type in (bool, "bool")
}


def _first_sentence(box: str) -> str:
    """Return what tyro says in a drawn box of many lines as one line, without box and title."""
    said = []
    for row in box.splitlines():
        text = row.strip(" │┃")
        if text.startswith(("For full helptext", "Argument helptext", "Perhaps you meant")):
            break
        if text and text[0] not in "╭╰─━":
            said.append(text)
    return " ".join(said) or "the command line cannot be read; see --help"
