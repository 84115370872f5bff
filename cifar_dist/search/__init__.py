"""A search without Ray: what is drawn, what is stopped, and the table of trials."""
