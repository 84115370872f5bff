"""The spaces that a search draws from: their checks, and the configurations drawn.

A draw is a pure function of (seed, trial), so a search that is resumed after its driver was killed
draws what it would have drawn. This module loads neither torch nor Ray.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cifar_dist.config.checks import check_image_side
from cifar_dist.config.fields import flag, unknown_name
from cifar_dist.config.files import read_settings
from cifar_dist.config.train import MAY_CHANGE_ON_RESUME, TrainConfig, make_config, setting_names
from cifar_dist.errors import UserError
from cifar_dist.registry import SCHEDULES
from cifar_dist.storage import AnyPath, at

if TYPE_CHECKING:  # it loads tyro, which workers do not need
    from cifar_dist.config.tune import TuneConfig

KINDS = {
    "choice": "a list of values",
    "grid": "a list of values",
    "uniform": "[low, high]",
    "loguniform": "[low, high], both greater than 0",
    "quniform": "[low, high, step]",
    "randint": "[low, high], whole numbers, high excluded",
}
"""The kinds of a space's values, and what each takes; the meanings are Ray Tune's."""

SEARCHABLE = tuple(
    name
    for name in setting_names()
    # Settings of where a run runs are no hyperparameters, and accuracies on two data sets do not
    # compare.
    if name not in MAY_CHANGE_ON_RESUME | {"dataset", "preset"}
)
"""Settings that a space may hold."""


@dataclass(frozen=True)
class Domain:
    """The values or the interval that one setting is drawn from."""

    kind: str
    values: tuple[Any, ...]
    """The values of ``choice`` and ``grid``; else the bounds, and the step of ``quniform``."""

    @property
    def listed(self) -> bool:
        """Whether every value is written out."""
        return self.kind in ("choice", "grid")

    def extremes(self) -> tuple[Any, ...]:
        """Return values such that a setting's range that holds them holds all that is drawn."""
        if self.listed:
            return self.values
        low, high = self.values[:2]
        if self.kind == "randint":
            # The bound itself is never drawn, and may lie outside the setting's range.
            return (low, high - 1)
        if self.kind == "quniform":
            return tuple(round_to(value, self.values[2]) for value in (low, high))
        return (float(low), float(high))  # as they are drawn: whole-number settings refuse them

    def draw(self, generator: random.Random) -> Any:
        """Draw a value; not from a ``grid``, whose values are all taken in turn."""
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.values[:2]
        if self.kind == "randint":
            return generator.randrange(low, high)
        if self.kind == "loguniform":
            drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
            return min(max(drawn, low), high)  # exp(log(x)) may miss x by a rounding
        drawn = generator.uniform(low, high)
        return round_to(drawn, self.values[2]) if self.kind == "quniform" else drawn


def round_to(value: float, step: float) -> Any:
    """Return the nearest multiple of a step; whole where the step is a whole number."""
    # Divided and multiplied back, 0.15 would be 0.15000000000000002.
    multiple = float(f"{round(value / step) * step:.12g}")
    return int(multiple) if isinstance(step, int) else multiple


@dataclass(frozen=True)
class Space:
    """Domains by setting, and where they came from."""

    source: str
    """The file, for messages."""
    domains: Mapping[str, Domain]

    def without(self, fixed: tuple[str, ...]) -> Space:
        """Return the space that is left when some settings stay as they are.

        Raises:
            UserError: nothing is left.
        """
        left = {name: domain for name, domain in self.domains.items() if name not in fixed}
        if not left:
            given = ", ".join(flag(name) for name in self.domains)
            raise UserError(f"{given}: nothing is left to search in {self.source}; omit one")
        return Space(self.source, left)

    def to_yaml(self) -> str:
        """Return the text of a file that `read_space` reads as this space."""
        return yaml.safe_dump(
            {name: {each.kind: list(each.values)} for name, each in self.domains.items()},
            sort_keys=False,
        )

    def check(self, base: TrainConfig, image_side: int | None = None) -> None:
        """Check that every setting's values could run, the others being those of a config.

        Args:
            base: the config.
            image_side: of the data set's images, in pixels; None while that is not known.

        Raises:
            UserError: one could not; the message names file, key, value and what is allowed.
        """
        for name, domain in self.domains.items():
            for value in domain.extremes():
                config = self.configured(base, {name: value}, alone=True)
                if image_side is not None:
                    self._check_image_side(config, image_side, name, value)

    def _check_image_side(self, config: TrainConfig, side: int, name: str, value: Any) -> None:
        try:
            check_image_side(config, side)
        except UserError as error:
            # The space is named only where its value is at fault: it may be a shared setting that
            # does not fit the images.
            where = f" (in {self.source}: {name} {value})" if flag(name) in str(error) else ""
            raise UserError(f"{error}{where}") from None

    def configured(
        self, base: TrainConfig, drawn: Mapping[str, Any], alone: bool = False
    ) -> TrainConfig:
        """Return the config of a trial.

        Args:
            base: the settings that are not drawn.
            drawn: values by setting.
            alone: the other settings of the space are still open: only what holds for the
                value itself is checked, with the rest at ease.

        Raises:
            UserError: no trial could run it.
        """
        settings = base.given()
        if alone:
            # Two settings of the space may only fit together; whole draws are checked as well.
            settings = {k: v for k, v in settings.items() if k not in self.domains}
            if "cutout" in drawn and "image_size" in self.domains:
                # The largest there is: a cutout must fit some size that may be drawn.
                settings["image_size"] = 1024
            if "warmup_epochs" in drawn and "schedule" in self.domains:
                settings["schedule"] = next(
                    name for name in SCHEDULES if SCHEDULES.about(name).has_warmup
                )
        names = ", ".join(f"{name} {value}" for name, value in drawn.items())
        return make_config({**settings, **drawn}, f" (in {self.source}: {names})")

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination of the ``grid`` values; one empty one where there are none."""
        names = [name for name, domain in self.domains.items() if domain.kind == "grid"]
        rows = itertools.product(*(self.domains[name].values for name in names))
        return [dict(zip(names, row, strict=True)) for row in rows]

    def combinations(self) -> list[dict[str, Any]]:
        """Return every combination of all listed values, for a search over a grid.

        Raises:
            UserError: a setting has an interval, which cannot be listed.
        """
        for name, domain in self.domains.items():
            if not domain.listed:
                raise UserError(
                    f"--search grid: {name} (in {self.source}) is {domain.kind}, which has no end "
                    "of values; use grid or choice, or --search random"
                )
        rows = itertools.product(*(domain.values for domain in self.domains.values()))
        return [dict(zip(self.domains, row, strict=True)) for row in rows]

    def draws(self, seed: int, num_samples: int) -> Iterator[dict[str, Any]]:
        """Draw ``num_samples`` times for each combination of the ``grid`` values, as Ray Tune does.

        A trial's draw depends on the seed and its number alone: with more samples the first
        ones stay what they were.
        """
        trial = 0
        for _ in range(num_samples):
            for row in self.grid():
                # A string is seeded by its SHA-512, the same in every process. By the sum of the
                # two, trial 0 of seed 1 would draw what trial 1 of seed 0 draws.
                generator = random.Random(f"{seed}/{trial}")
                trial += 1
                yield {
                    name: row[name] if name in row else domain.draw(generator)
                    for name, domain in self.domains.items()
                }


def known_spaces() -> list[str]:
    """Return the names of the spaces that are installed with the package."""
    files = resources.files("tune_spaces").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))


def read_space(name_or_file: str) -> Space:
    """Read a space by the name of one that is installed, or from a YAML file.

    Raises:
        UserError: there is none of that name, or something in it cannot be searched; the message
            names file, key and what is allowed.
    """
    file: AnyPath = at(name_or_file) if "://" in name_or_file else Path(name_or_file)
    if name_or_file in known_spaces():
        file = Path(str(resources.files("tune_spaces") / f"{name_or_file}.yaml"))
    elif not file.name.endswith((".yaml", ".yml")) and not file.is_file():
        raise unknown_name("space", name_or_file, " (--space)", known_spaces())
    found = read_settings(file, "--space")
    if not found:
        raise UserError(f"--space {file}: is empty; write e.g. lr: {{loguniform: [1e-4, 1e-2]}}")
    where = f" (in {file})"
    return Space(str(file), {name: _domain(name, value, where) for name, value in found.items()})


def _domain(name: Any, value: Any, where: str) -> Domain:
    if name not in setting_names():
        raise unknown_name("setting", str(name), where, list(SEARCHABLE))
    if name not in SEARCHABLE:
        raise UserError(f"{name}{where}: is not searched; searched are {', '.join(SEARCHABLE)}")
    if not isinstance(value, dict) or len(value) != 1:
        raise UserError(
            f"{name} {value!r}{where}: must be one of {', '.join(KINDS)} with its values, "
            f"e.g. {name}: {{choice: [...]}}"
        )
    ((kind, values),) = value.items()
    if kind not in KINDS:
        raise unknown_name("kind", str(kind), f" of {name}{where}", list(KINDS))
    if not isinstance(values, list) or not _well_formed(kind, values):
        raise UserError(f"{name}: {kind} {values!r}{where}: must be {KINDS[kind]}, low below high")
    return Domain(kind, tuple(values))


def _well_formed(kind: str, values: list[Any]) -> bool:
    if kind in ("choice", "grid"):
        return bool(values) and all(
            v is None or isinstance(v, bool | int | float | str) for v in values
        )
    # True and false are whole numbers to `isinstance`, and would pass as bounds.
    numbers = int if kind == "randint" else (int, float)
    if not all(isinstance(v, numbers) and not isinstance(v, bool) for v in values):
        return False
    if len(values) != (3 if kind == "quniform" else 2) or not all(map(math.isfinite, values)):
        return False
    low, high = values[:2]
    if kind == "quniform" and not 0 < values[2] <= high - low:
        return False
    return bool(low < high and (kind != "loguniform" or low > 0))


def searched_space(config: TuneConfig) -> Space:
    """Read what a search searches, checked against the settings that trials share.

    Raises:
        UserError: the space cannot be read, or holds what no trial could run.
    """
    space = read_space(config.space)
    fixed = tuple(name for name in config.fixed if name in space.domains)
    if fixed:
        space = space.without(fixed)
    space.check(config.trial_base)
    return space
