"""From the words on the command line to a config, and from an exception to an exit code."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NoReturn, TextIO, TypeVar

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
from cifar_dist.errors import Interrupted, RunFailed, UserError
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.signals import interrupt_on_signals
from cifar_dist.storage import StoreError

MESSAGE_LENGTH = 500
"""Characters of an exception that fit into a line."""


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


def run_command(command: Callable[[list[str]], None]) -> NoReturn:
    """Call a command with the words after the program's name, and exit.

    The exit code says what came of it: 0 done; 1 the run failed, or the program did; 2 bad usage,
    configuration or data, one line on standard error; 130 interrupted.
    """
    # Before the command, which loads modules for seconds: a signal then ends it with 130, too.
    interrupt_on_signals()
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            # File names and classes may hold what the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        command(sys.argv[1:])
    except (UserError, StoreError) as error:
        # A library's part of the message may have several lines.
        _leave(2, f"error: {' '.join(str(error).split())}", error)
    except RunFailed as error:
        _leave(1, f"error: {error}", error)
    except (Interrupted, KeyboardInterrupt) as error:
        _leave(130, str(error) or "interrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (_closed(sys.stdout) or _closed(sys.stderr)):
            _leave(0)  # e.g. `| head -1`, which has read all that it wants
        _leave(1, f"error: {_unforeseen(error)}", error)
    _leave(0)


def _unforeseen(error: Exception) -> str:
    """Return an exception that no code expects as a line, and write its traceback to a file."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MESSAGE_LENGTH].rstrip(": ")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="cifar_dist-", suffix=".txt", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            traceback.print_exception(error, file=file)
    except OSError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{line}; raised at {last.filename}:{last.lineno} (no room for its traceback)"
    return f"{line}; its traceback is in {file.name}"


def _closed(stream: TextIO) -> bool:
    """Return whether nobody reads a stream any more.

    Raises:
        OSError: it cannot be written for another reason.
    """
    try:
        stream.flush()
    except OSError as error:
        # Else Python flushes it once more at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return True
        raise
    # Without a buffer there is nothing to flush: what could not be written is lost already.
    watched = select.poll()
    watched.register(stream, 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _leave(code: int, message: str | None = None, error: Exception | None = None) -> NoReturn:
    try:
        # Flushed first, so that in a file that takes both streams the error comes last.
        _closed(sys.stdout)
    except OSError as failed:
        code = code or 1
        message = message or f"error: the output cannot be written ({failed.strerror})"
    with contextlib.suppress(OSError):
        for line in [message, *getattr(error, "__notes__", [])]:
            if line is not None:
                print(line, file=sys.stderr)
        _closed(sys.stderr)
    sys.exit(code)
