"""What a benchmark ran on."""

from __future__ import annotations

import os
from typing import Any


def machine() -> dict[str, Any]:
    """Versions, hardware and commit."""
    # Not above: the first needs tyro, without which the rest of `benchmarks` is of use.
    from cifar_dist.runs.commit import git_commit
    from cifar_dist.training.environment import environment

    return {**environment(), "cores": os.cpu_count(), "git_commit": git_commit()}
