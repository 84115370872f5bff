"""Ray: starting workers, placing and restarting them, and what the person at the terminal sees."""
