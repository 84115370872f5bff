"""The settings of a search: each of its own with its unit, default and check.

The settings of its trials are those of `cifar_dist.config.TrainConfig`. Loads neither torch nor
Ray.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from cifar_dist.config.fields import (
    DURATION,
    Ranges,
    Resolved,
    as_duration,
    check_ranges,
    coerce_fields,
    flag,
    in_seconds,
    settings_as_yaml,
    unknown_name,
    whole_or_fraction,
)
from cifar_dist.config.train import (
    MAY_CHANGE_ON_RESUME,
    TrainConfig,
    make_config,
    setting_names,
    with_absolute_paths,
    with_preset,
)
from cifar_dist.errors import UserError
from cifar_dist.storage import at

DEFAULT_MAX_EPOCHS = 9
"""Epochs of a trial that is not stopped: three rungs, 1, 3 and 9, with the other defaults."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Resolved):
    """Every setting of a search. Immutable; made by flags, by YAML or in Python.

    ``workers_per_trial``, ``cpus_per_trial`` and ``gpus_per_trial`` follow from the settings that
    trials share where they are not given.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    space: str = "adamw_steplr"
    """Space to search: adamw_steplr, augmentation, sgd_onecycle, or a YAML file."""
    num_samples: int = 16
    """Trials; with grid values in the space, trials for each combination of them. A search over
    a grid runs each combination once instead."""
    grace_period: int = 1
    """ASHA: epochs that every trial runs at least."""
    reduction_factor: float = 3.0
    """ASHA: one trial in this many continues at a rung, and each rung has this many times the
    epochs of the one before."""
    metric: Literal["val_accuracy", "val_loss", "train_accuracy", "train_loss"] = "val_accuracy"
    """Metric that trials are judged by, of their best epoch: highest accuracy or lowest loss."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How configurations are chosen: drawn at random, every combination of listed values, or
    suggested by Optuna from the trials that have ended."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials early; none runs all to the last epoch."""
    workers_per_trial: int | None = None
    """DDP workers of a trial (default: --num-workers)."""
    cpus_per_trial: float | None = None
    """CPUs that a trial reserves, over all its workers (default: --cpus-per-worker for each)."""
    gpus_per_trial: float | None = None
    """GPUs that a trial reserves, over all its workers; fractions share a GPU (default:
    --gpus-per-worker for each)."""
    max_concurrent: int | None = None
    """Trials at a time (default: as many as fit on the cluster)."""
    time_budget: str | None = None
    """Time after which trials are stopped: seconds, or 90s, 30m, 8h; --resume continues them."""
    retry_failed: bool = False
    """With --resume: run the trials again that failed."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(max_epochs=DEFAULT_MAX_EPOCHS)
    )
    """The settings that trials share."""
    fixed: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Settings that keep their value although the space holds them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "time_budget", as_duration(self.time_budget))
        coerce_fields(self, but=_NO_SETTINGS)
        # Refused first: derived from a range, a trial's workers would silently be its upper end.
        if self.train.elastic:
            raise UserError(
                f"--num-workers {self.train.num_workers}: a trial keeps its number of workers; "
                "give one number"
            )
        self._derive("workers_per_trial", self.train.max_workers, "num_workers")
        for resource in ("cpus", "gpus"):
            each = getattr(self.train, f"{resource}_per_worker")
            source = f"workers_per_trial and {resource}_per_worker"
            self._derive(f"{resource}_per_trial", self.workers * each, source)
        check_ranges(self, _RANGES)
        self._check_together()
        _ = self.trial_base  # what each worker gets is checked by making it

    def _check_together(self) -> None:
        if self.grace_period > self.train.max_epochs:
            raise UserError(
                f"--grace-period {self.grace_period}: is above --max-epochs "
                f"{self.train.max_epochs}, so that no trial could be stopped; lower it, or give "
                "--scheduler none"
            )
        if self.retry_failed and not self.train.resume:
            raise UserError(
                "--retry-failed: is for a search that is resumed; add --resume --name NAME"
            )
        if self.train.use_gpu and not self.gpus_per_trial:
            raise UserError("--gpus-per-trial 0: contradicts --use-gpu; omit one of them")
        if self.gpus_per_trial and not self.train.use_gpu:
            raise UserError(f"--gpus-per-trial {self.gpus_per_trial:g}: add --use-gpu")
        assert self.gpus_per_trial is not None  # resolved before
        if not whole_or_fraction(each := self.gpus_per_trial / self.workers):
            raise UserError(
                f"--gpus-per-trial {self.gpus_per_trial:g}: is {each:g} for each of {self.workers} "
                f"workers, and Ray gives whole GPUs or a part of one; use "
                f"{self.workers * int(each)} or {self.workers * (int(each) + 1)}"
            )

    @property
    def workers(self) -> int:
        """DDP workers of a trial."""
        assert self.workers_per_trial is not None  # resolved when the config was made
        return self.workers_per_trial

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a high or a low value of the metric is good."""
        return "min" if self.metric.endswith("loss") else "max"

    @property
    def time_budget_s(self) -> float | None:
        """`time_budget` in seconds."""
        if self.time_budget is None:
            return None
        return in_seconds(self.time_budget)

    @property
    def trial_base(self) -> TrainConfig:
        """The settings of a trial, but for those that are drawn."""
        changes: dict[str, Any] = {"num_workers": self.workers, "name": None, "resume": False}
        for resource in ("cpus", "gpus"):
            # A trial's that was derived is divided into what each worker has anyway; a worker's
            # that was derived stays so, so that best.yaml runs with and without --use-gpu.
            if (name := f"{resource}_per_trial") not in self._derived:
                changes[f"{resource}_per_worker"] = getattr(self, name) / self.workers
        return self.train.replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting of search and trials by name, in one dict of plain values."""
        own = {name: getattr(self, name) for name in tune_setting_names()}
        return {**own, **self.train.to_dict()}

    def derived(self) -> Mapping[str, str]:
        """Return the derived settings of search and trials, each with what it follows from."""
        return {**super().derived(), **self.train.derived()}

    def to_yaml(self) -> str:
        """Return the text of a search's ``config.yaml``, with absolute paths."""
        space = str(at(self.space)) if self.space.endswith((".yaml", ".yml")) else self.space
        return settings_as_yaml(self.replace(train=with_absolute_paths(self.train), space=space))


# Not `max_epochs`: the rungs follow from it, and other rungs would have stopped other trials.
MAY_CHANGE_ON_TUNE_RESUME = (MAY_CHANGE_ON_RESUME - {"max_epochs"}) | {
    "num_samples",
    "workers_per_trial",
    "cpus_per_trial",
    "gpus_per_trial",
    "max_concurrent",
    "time_budget",
    "retry_failed",
    # Its content is compared instead: the file may have been moved, or changed.
    "space",
}
"""Settings that say where and how long a search runs; all others say what it computes."""

_NO_SETTINGS = ("train", "fixed")
"""Fields that hold a config or names, and are no settings themselves."""

_RANGES: Ranges = [
    ("num_samples", lambda v: 1 <= v <= 9999, "from 1 to 9999 trials, e.g. 16"),
    ("grace_period", lambda v: v >= 1, "1 epoch or more, e.g. 1"),
    ("reduction_factor", lambda v: 1 < v <= 100, "above 1, at most 100, e.g. 3"),
    ("workers_per_trial", lambda v: 1 <= v <= 999_999, "1 worker or more, e.g. 2"),
    ("cpus_per_trial", lambda v: 0 < v < 1e6, "greater than 0, e.g. 1"),
    ("gpus_per_trial", lambda v: 0 <= v < 1e6, "0 or more, e.g. 0.5"),
    ("max_concurrent", lambda v: v is None or v >= 1, "1 trial or more, e.g. 2"),
    (
        "time_budget",
        lambda v: v is None or (re.fullmatch(DURATION, v) and in_seconds(v) > 0),
        "seconds above 0, or e.g. 90s, 30m, 8h",
    ),
]


def tune_setting_names() -> list[str]:
    """Return the names of a search's own settings, in the order of their declaration."""
    names = [each.name for each in dataclasses.fields(TuneConfig)]
    return [name for name in names if name not in _NO_SETTINGS]


def split_settings(
    settings: Mapping[str, Any], where: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a search and those of its trials, the latter over their preset's.

    Raises:
        UserError: an unknown name or preset.
    """
    own_names = tune_setting_names()
    own = {name: value for name, value in settings.items() if name in own_names}
    of_trials = {name: value for name, value in settings.items() if name not in own_names}
    known = [*own_names, *setting_names()]
    for name in of_trials:
        if name not in known:
            raise unknown_name("setting", str(name), where, known)
    return own, with_preset(of_trials, where)


def make_tune_config(
    settings: Mapping[str, Any], where: str = "", fixed: tuple[str, ...] = ()
) -> TuneConfig:
    """Make a search's config of settings by name, its own and its trials' in one mapping.

    Args:
        settings: values by setting name, e.g. ``{"num_samples": 8, "dataset": "digits"}``.
        where: where they came from, for messages.
        fixed: settings that keep their value although the space holds them.

    Raises:
        UserError: an unknown name (the nearest known one is suggested) or a bad value.
    """
    own, of_trials = split_settings(settings, where)
    # Under a preset's own: three rungs are a default, not a limit for a recipe that needs more.
    of_trials = {"max_epochs": DEFAULT_MAX_EPOCHS, **of_trials}
    try:
        return TuneConfig(**own, train=make_config(of_trials), fixed=fixed)
    except UserError as error:
        raise UserError(f"{error}{where}") from None


def check_same_search(started: TuneConfig, now: TuneConfig) -> None:
    """Check that a resumed search would continue what was started.

    Raises:
        UserError: a setting differs that says what is computed, or there are fewer trials.
    """
    before = started.to_dict()
    for name, value in now.to_dict().items():
        if value != before[name] and name not in MAY_CHANGE_ON_TUNE_RESUME:
            raise UserError(
                f"{flag(name)} {value}: the search was started with {before[name]}, which "
                f"--resume keeps; omit {flag(name)}, or start another search with another --name"
            )
    # Trials that have run cannot be taken back: those that were stopped were judged against them.
    if now.num_samples < started.num_samples:
        raise UserError(
            f"--num-samples {now.num_samples}: the search was started with "
            f"{started.num_samples}; give as many or more"
        )
