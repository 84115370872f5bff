"""The commit that a run was started from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """Return the commit of the checkout that this package is imported from, if it is one."""
    checkout = Path(__file__).resolve().parent.parent.parent
    # Git searches upwards: for a package that is installed in another project's virtual environment
    # it would give that project's commit.
    if not (checkout / ".git").exists():
        return None
    asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
