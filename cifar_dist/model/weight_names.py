"""A network's weights under the names that other programs give them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import NamedTuple

WRAPPERS = ("module.", "model.", "net.", "network.", "backbone.", "average.")
"""What DataParallel, Lightning modules and the like put before names. ``average.`` is the project's
own, in a checkpoint of a run with ``--ema``."""
_PREFERRED = "average."
"""Of two networks in a file that both fit: the averaged weights are what a run evaluates."""
_COMPILED = "_orig_mod."
"""What torch.compile puts before the names of what it compiled."""
_OTHER_RESNET = (("linear.", "fc."), (".shortcut.", ".downsample."))
"""Beginnings and parts of names in the CIFAR ResNets of github.com/kuangliu/pytorch-cifar."""
_SHOWN = 3


class Renamed(NamedTuple):
    """The names of a file's weights, as a network's."""

    names: dict[str, str]
    """The network's by the file's; unknown ones as they are."""
    note: str
    """What was changed, formatted for display; empty where nothing was."""


def renamed(found: Collection[str], expected: Collection[str]) -> Renamed:
    """Return a network's names for a file's, without the wrappers that the file has.

    Names outside of the wrapper that holds the network are another part's of a larger model, and
    are omitted, unless the network lacks them.

    Args:
        found: names in the file.
        expected: names of the network.
    """
    # Within names, too, where a part of the network was compiled.
    plain = {name: name.replace(_COMPILED, "") for name in found}

    def under(chain: str) -> dict[str, str]:
        inside = {n: to.removeprefix(chain) for n, to in plain.items() if to.startswith(chain)}
        own = {name: _own(to, expected) for name, to in inside.items()}
        # Not two for one: where the file has the network's name as well, the other stays unknown.
        return {
            name: to if own[name] in inside.values() else own[name] for name, to in inside.items()
        }

    def fit(chain: str) -> tuple[int, bool, int]:
        fitting = len(set(under(chain).values()).intersection(expected))
        return fitting, chain.endswith(_PREFERRED), -len(chain)

    best = max(sorted({chain for name in plain.values() for chain in _chains(name)}), key=fit)
    names = under(best)
    for name, to in plain.items():
        alone = _own(to.removeprefix(max(_chains(to), key=len)), expected)
        if name not in names and alone in expected and alone not in names.values():
            names[name] = alone
    compiled = _COMPILED if any(name != to for name, to in plain.items()) else ""
    said = [f"omitted {each} from names" for each in (compiled, best) if each]
    for old, new in _OTHER_RESNET:
        if any(old in name and new in to for name, to in names.items()):
            said.append(f"took {old.strip('.')} for {new.strip('.')}")
    if others := [name for name in found if name not in names]:
        said.append(f"ignored {listed(others)}")
    return Renamed(names, ", ".join(said))


def nearest(name: str, found: Collection[str]) -> list[str]:
    """Return names in the order of their likeness to one, as many as a message holds."""
    return difflib.get_close_matches(name, found, n=_SHOWN, cutoff=0)


def listed(names: Collection[str]) -> str:
    """Return names for a message, which shows the first few."""
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _chains(name: str) -> Iterator[str]:
    """Yield the beginnings of a name that are wrappers: none, the first, the first two, ..."""
    chain = ""
    yield chain
    while wrapper := next((w for w in WRAPPERS if name.startswith(chain + w)), None):
        chain += wrapper
        yield chain


def _own(name: str, expected: Collection[str]) -> str:
    """Return the network's name for another program's; the name itself where it has none."""
    other = name
    for old, new in _OTHER_RESNET:
        other = other.replace(old, new)
    return other if name not in expected and other in expected else name
