"""The training body: from a config to a trained network. Knows nothing of who launched it."""
