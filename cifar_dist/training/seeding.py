"""Seeds and the switches for determinism."""

import os
import random
from typing import Any

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = True) -> None:
    """Seed every generator of this process.

    Python's, NumPy's, torch's on the CPU and on every GPU, and, for processes started from
    here, the hashing of strings (``PYTHONHASHSEED``).

    Args:
        seed: 0 to 2**32 - 1. Workers give their seed plus their rank.
        deterministic: take deterministic algorithms (see `set_deterministic`).
    """
    os.environ["PYTHONHASHSEED"] = str(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    set_deterministic(deterministic)


def set_deterministic(on: bool) -> None:
    """Choose between algorithms that repeat to the bit and the fastest ones.

    Where torch has no deterministic algorithm for an operation it warns and goes on.

    Source: torch's notes on reproducibility.
    """
    if on:
        # cuBLAS repeats its sums only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on
    torch.use_deterministic_algorithms(on, warn_only=True)
    # Filling memory that nothing reads before it is written only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def generator_states() -> dict[str, Any]:
    """Where every generator of this process is, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put every generator of this process where `generator_states` found it."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, *rest = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
