"""Seeds and the switches for determinism."""

import os
import random

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
