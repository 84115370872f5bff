"""How the same commands reach a cluster."""
