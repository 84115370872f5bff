"""Images: their sources, their order, and their way to the network."""
