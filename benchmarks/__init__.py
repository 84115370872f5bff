"""Every claim about speed, runnable, with its peers in the same run."""
