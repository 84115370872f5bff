"""Seeds and the switches for determinism."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import numpy as np
import torch

from cifar_dist.events import Listener, Warned

WARN_ONLY = True
"""Whether an operation that torch has no deterministic algorithm for is a warning, not an error."""
_NOT_DETERMINISTIC = (
    " does not have a deterministic implementation",
    "this operation is not deterministic because it uses CuBLAS",
)
"""In torch's warnings."""


def set_seed(seed: int, deterministic: bool = True, tf32: bool = True) -> None:
    """Seed every generator of this process.

    Python's, NumPy's, torch's on the CPU and on every GPU, and, for processes started from
    here, the hashing of strings (``PYTHONHASHSEED``).

    Args:
        seed: 0 to 2**32 - 1. Workers give their seed plus their rank.
        deterministic: take deterministic algorithms (see `set_deterministic`).
        tf32: let a GPU's convolutions in float32 use TF32, as torch's default does.
    """
    os.environ["PYTHONHASHSEED"] = str(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    set_deterministic(deterministic)
    torch.backends.cudnn.allow_tf32 = tf32


def set_deterministic(on: bool) -> None:
    """Choose between algorithms that repeat to the bit and the fastest ones.

    Where torch has no deterministic algorithm for an operation it warns and continues; see
    `nondeterminism_reported`.

    Source: torch's notes on reproducibility.
    """
    # cuBLAS repeats its sums only with a workspace of fixed size. torch reads this once in a
    # process, at its first product on a GPU: where that is a trial's that need not be
    # deterministic, one that must be may come after it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = on
    # A benchmark picks the algorithm that was fastest just then, which may be another one in a
    # rerun and round differently.
    torch.backends.cudnn.benchmark = not on
    torch.use_deterministic_algorithms(on, warn_only=WARN_ONLY)
    # Filling memory that nothing reads before it is written only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def nondeterminism_reported(listener: Listener, reported: set[str] | None = None) -> Iterator[None]:
    """While this lasts, report each operation that is not deterministic, once, as `Warned`.

    Other warnings are shown or ignored as before.

    Args:
        listener: notified of the operation, in one line.
        reported: operations that need no report any more; grows.
    """
    known = set() if reported is None else reported

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if not any(each in text for each in _NOT_DETERMINISTIC):
            before(message, category, filename, lineno, file, line)
            return
        what = text.split(_NOT_DETERMINISTIC[0])[0] if _NOT_DETERMINISTIC[0] in text else "cuBLAS"
        if what not in known:
            known.add(what)
            said = f"{what} is not deterministic here: a rerun may give other bits"
            listener(Warned(said))

    with warnings.catch_warnings():
        # In front of the filters that silence torch. ``always``, since Python shows a warning once
        # a place by default: the second run in a process would report nothing.
        for each in _NOT_DETERMINISTIC:
            warnings.filterwarnings("always", message=f".*{each}")
        before, warnings.showwarning = warnings.showwarning, show
        yield


def generator_states() -> dict[str, Any]:
    """Return the state of every generator of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        # A tensor and plain values: with weights_only, torch.load refuses NumPy arrays.
        "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
        "torch": torch.get_rng_state(),
        # Asking a GPU that was not used so far would open a context on it.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set every generator of this process to the state that `generator_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, *rest = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
