"""Ray: starting workers, placing and restarting them."""
