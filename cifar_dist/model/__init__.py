"""Networks, their weights, and what a training step computes with them."""
