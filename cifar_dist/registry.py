"""The registries: names that settings may have as values, and the code that each stands for.

An addition is one file (or one function) and one line here. Names are known without loading what
they stand for, so that ``--help`` and every refusal stay quick; nothing here imports the modules
that it names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar


class Registry(Mapping[str, Any]):
    """Objects by the name that a setting gives them, each imported when it is asked for.

    Args:
        kind: what they are, for messages, e.g. ``data set``.
        places: ``module:attribute`` by name.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)
        self._loaded: dict[str, Any] = {}

    def register(self, name: str, entry: Any) -> None:
        """Add an object, or replace the one of that name, in this process.

        Workers of a cluster are processes of their own: what they are to find too belongs into
        this file.
        """
        # A name that is replaced keeps its place in the order, which is that of the columns of
        # ``metrics.csv``.
        self._places.setdefault(name, "")
        self._loaded[name] = entry

    # A mapping compares by its contents and so has no hash, which metadata of a type needs.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            module, _, attribute = self._places[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class Entry:
    """The place of an object; subclasses add facts that are known without loading it."""

    place: str = ""
    """``module:attribute``"""


@dataclass(frozen=True)
class Schedule(Entry):
    """A schedule, and which other settings concern it."""

    needs_horizon: bool = False
    """Whether its rates depend on ``--max-epochs``, which a resumed run must then keep."""
    has_warmup: bool = False
    """Whether its rate first rises, for ``--warmup-epochs``."""


@dataclass(frozen=True)
class Column(Entry):
    """A column of ``metrics.csv``, and how it is read back and compared."""

    whole: bool = False
    """Whether its numbers are whole."""
    timing: bool = False
    """Whether it differs between two runs of the same settings."""


E = TypeVar("E", bound=Entry)


class DescribedRegistry(Registry, Generic[E]):
    """A registry that also holds facts about its objects, which are known without loading them.

    Args:
        kind: what they are, for messages.
        described: the type of the entries.
        entries: place and facts by name.
    """

    def __init__(self, kind: str, described: type[E], entries: Mapping[str, E]) -> None:
        super().__init__(kind, {name: each.place for name, each in entries.items()})
        self._described = described
        self._entries = dict(entries)

    def register(self, name: str, entry: Any, **facts: Any) -> None:
        """Add an object as `Registry.register` does, with its facts."""
        super().register(name, entry)
        self._entries[name] = self._described(**facts)

    def about(self, name: str) -> E:
        """Return the facts about an object."""
        return self._entries[name]


DATASETS = Registry(
    "data set",
    {
        "cifar10": "cifar_dist.data.datasets.cifar10:find_cifar10",
        "cifar100": "cifar_dist.data.datasets.cifar100:find_cifar100",
        "digits": "cifar_dist.data.datasets.digits:find_digits",
    },
)
"""By ``--dataset``; see `cifar_dist.data.datasets`."""


@dataclass(frozen=True)
class DatasetTraits:
    """Facts about a data set that settings and messages need before any image is read."""

    title: str | None = None
    """Its name in messages, e.g. ``CIFAR-10``; None for the one in the registry."""
    mirrored_alike: bool = True
    """Whether a mirrored image is still one of its class, so that flips are on by default."""
    needs_folder: bool = True
    """Whether its images are read from ``--data-dir``; False where a package brings them along."""
    download: Callable[[Path], object] | None = None
    """Downloads it into a folder; None where the user has to."""


Find = TypeVar("Find", bound=Callable[..., Any])


def with_traits(traits: DatasetTraits) -> Callable[[Find], Find]:
    """Return a decorator that notes a data set's traits on the function that finds it.

    The function's module should import NumPy and the like only where they are used: settings read
    the traits, and would load them with it.
    """

    def noted(find: Find) -> Find:
        vars(find)["traits"] = traits
        return find

    return noted


def dataset_traits(name: str) -> DatasetTraits:
    """Return a data set's traits; those of most data sets where its function notes none."""
    traits: DatasetTraits = getattr(DATASETS.get(name), "traits", DatasetTraits())
    return traits


NETWORKS = Registry(
    "network",
    {
        "resnet18": "cifar_dist.model.resnet:resnet18",
        "resnet34": "cifar_dist.model.resnet:resnet34",
    },
)
"""By ``--network``; see `cifar_dist.model.networks`."""

AUGMENTATIONS = Registry(
    "augmentation",
    {
        "crop-flip": "cifar_dist.data.transforms:crop_flip",
        "none": "cifar_dist.data.transforms:no_augmentation",
    },
)
"""By ``--augment``; see `cifar_dist.data.transforms`."""

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "cifar_dist.model.optim:adamw",
        "sgd": "cifar_dist.model.optim:sgd",
    },
)
"""By ``--optimizer``; see `cifar_dist.model.optim`."""

SCHEDULES = DescribedRegistry(
    "schedule",
    Schedule,
    {
        "steplr": Schedule("cifar_dist.model.optim:StepLR"),
        "cosine": Schedule("cifar_dist.model.optim:Cosine", needs_horizon=True, has_warmup=True),
        "onecycle": Schedule(
            "cifar_dist.model.optim:OneCycle", needs_horizon=True, has_warmup=True
        ),
    },
)
"""By ``--schedule``; see `cifar_dist.model.optim`."""

LOGGERS = Registry(
    "logger",
    {
        "tensorboard": "cifar_dist.training.trackers:tensorboard",
        "wandb": "cifar_dist.training.trackers:wandb",
        "mlflow": "cifar_dist.training.trackers:mlflow",
    },
)
"""By ``--logger``, beside ``none``; see `cifar_dist.training.trackers`."""

COLUMNS = DescribedRegistry(
    "metric",
    Column,
    {
        "epoch": Column("cifar_dist.training.columns:epoch", whole=True),
        "step": Column("cifar_dist.training.columns:step", whole=True),
        "samples": Column("cifar_dist.training.columns:samples", whole=True),
        "world_size": Column("cifar_dist.training.columns:world_size", whole=True),
        "lr": Column("cifar_dist.training.columns:lr"),
        "train_loss": Column("cifar_dist.training.columns:train_loss"),
        "train_accuracy": Column("cifar_dist.training.columns:train_accuracy"),
        "val_loss": Column("cifar_dist.training.columns:val_loss"),
        "val_accuracy": Column("cifar_dist.training.columns:val_accuracy"),
        "images_per_second": Column("cifar_dist.training.columns:images_per_second", timing=True),
        "seconds": Column("cifar_dist.training.columns:seconds", timing=True),
    },
)
"""The columns of ``metrics.csv``, in their order; see `cifar_dist.training.columns`."""
