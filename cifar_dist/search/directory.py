"""A search's directory: the files in it, and reading them back."""

from __future__ import annotations

from typing import Any

from cifar_dist.config.fields import flag
from cifar_dist.config.train import TrainConfig, setting_names
from cifar_dist.config.tune import (
    TuneConfig,
    check_same_search,
    make_tune_config,
    tune_setting_names,
)
from cifar_dist.config.versions import own_settings
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, Warned, ignore
from cifar_dist.runs.create import new_folder
from cifar_dist.runs.directory import Directory, RunDirectory
from cifar_dist.search.space import SEARCHABLE, Space, known_spaces, read_space
from cifar_dist.storage import AnyPath, as_json, at, write_atomically

_FIXED = "# fixed: "
"""How the first line of ``space.yaml`` begins: settings of the space that keep their value."""


def trial_id(number: int) -> str:
    """Return the id of a trial by its number, from 0: ``t0003``, the same when resumed."""
    return f"t{number:04d}"


class SearchDirectory(Directory):
    """A search's directory; ``config.yaml`` holds the settings of search and trials."""

    @classmethod
    def create(cls, config: TuneConfig, space: Space) -> SearchDirectory:
        """Make a new search's directory, with a name from dataset and time unless it has one.

        Raises:
            UserError: the name is taken, or the directory cannot be made.
        """
        train = config.train
        fixed = ", ".join(name for name in config.fixed if name in SEARCHABLE)
        content = {
            # As it is searched, without what is fixed: --resume reads it even if the file it came
            # from is gone.
            "space.yaml": f"{_FIXED}{fixed}\n{space.to_yaml()}".encode(),
            "config.yaml": _as_written(config),
        }
        return cls(new_folder(train.storage_path, train.name, f"tune-{train.dataset}", content))

    @classmethod
    def existing(cls, config: TuneConfig, listener: Listener = ignore) -> SearchDirectory:
        """Return the directory of the search that a config with ``resume`` names.

        Args:
            config: names it.
            listener: notified of an installed space that has changed, as another version's may be;
                the search keeps its own.

        Raises:
            UserError: there is no such search, it cannot be written, or the config would compute
                something else than the search that was started.
        """
        assert config.train.name is not None  # checked when the config was made
        found = cls.at(config.train.storage_path, config.train.name)
        started = found.read_config()
        check_same_search(started, config)
        found._check_same_space(started, config, listener)
        found.check_writable()
        return found

    def _check_same_space(
        self, started: TuneConfig, config: TuneConfig, listener: Listener
    ) -> None:
        kept = self.read_space().domains
        for name in config.fixed:
            if name in kept:
                raise UserError(
                    f"{flag(name)}: the search draws {name} from its space, which --resume keeps; "
                    f"omit {flag(name)}, or start another search with another --name"
                )
        installed = config.space in known_spaces()
        if config.space == started.space and not installed and not at(config.space).exists():
            return
        now = read_space(config.space).domains
        first, *_ = self.space_file.read_text().splitlines()
        if first.startswith(_FIXED):
            not_searched = set(first.removeprefix(_FIXED).split(", "))
        else:  # a version that did not record which
            not_searched = now.keys() - kept.keys()
        names = (kept.keys() | now.keys()) - not_searched
        changed = sorted(name for name in names if kept.get(name) != now.get(name))
        said = (
            f"--space {config.space}: is not what the search was started with: "
            f"{', '.join(changed)} changed, and --resume keeps "
        )
        if changed and installed and config.space == started.space:
            listener(Warned(f"{said}the space in {self.space_file}"))
        elif changed:
            raise UserError(
                f"{said}the space; give --space {self.space_file} for the one that it has, or "
                "start another search with another --name"
            )

    def retry(self, number: int) -> None:
        """Forget that a trial failed, so that it can run again."""
        run = self.trial(number)
        run.error_file.unlink(missing_ok=True)
        run.summary_file.unlink(missing_ok=True)

    def _has_begun(self) -> bool:
        # Once trials have begun the folder holds work, also where a refusal ends the command.
        return self.trials_folder.exists()

    @property
    def space_file(self) -> AnyPath:
        """``space.yaml``: what is searched."""
        return self.path / "space.yaml"

    @property
    def trials_csv(self) -> AnyPath:
        """``trials.csv``: a row a trial."""
        return self.path / "trials.csv"

    @property
    def trials_parquet(self) -> AnyPath:
        """``trials.parquet``: the same."""
        return self.path / "trials.parquet"

    @property
    def history_file(self) -> AnyPath:
        """``history.parquet``: a row a trial and epoch."""
        return self.path / "history.parquet"

    @property
    def best_file(self) -> AnyPath:
        """``best.yaml``: the best trial's settings, for ``train --config``."""
        return self.path / "best.yaml"

    @property
    def trials_folder(self) -> AnyPath:
        """``trials/``: the trials' own run directories."""
        return self.path / "trials"

    def trial(self, number: int) -> RunDirectory:
        """Return the run directory of a trial by its number, from 0, whether it exists or not."""
        return RunDirectory(self.trials_folder / trial_id(number))

    def read_config(self) -> TuneConfig:
        """Read the config that the search was started with.

        Raises:
            UserError: there is no such search, or the file is damaged or a newer version's.
        """
        if not self.config_file.is_file():
            raise UserError(
                f"--resume --name {self.name}: there is no search in {self.path}; omit --resume "
                "to start it"
            )
        if not self.space_file.is_file():
            raise UserError(
                f"--resume --name {self.name}: {self.path} holds a run, not a search; "
                "resume it with train"
            )
        settings = own_settings(self.config_file, [*tune_setting_names(), *setting_names()])
        return make_tune_config(settings, f" (in {self.config_file})")

    def write_config(self, config: TuneConfig) -> None:
        """Write every setting to ``config.yaml``."""
        write_atomically(self.config_file, _as_written(config))

    def read_space(self) -> Space:
        """Read what is searched.

        Raises:
            UserError: the file is damaged.
        """
        return read_space(str(self.space_file))

    def write_best(self, config: TrainConfig) -> None:
        """Write the best trial's settings to ``best.yaml``."""
        write_atomically(self.best_file, config.to_yaml().encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_atomically(self.summary_file, as_json(summary))


def _as_written(config: TuneConfig) -> bytes:
    # The name is the directory's, --resume and --retry-failed are words of one command: none is a
    # setting for whoever starts another search from this file.
    train = config.train.replace(resume=False, name=None)
    return config.replace(retry_failed=False, train=train).to_yaml().encode()
