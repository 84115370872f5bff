"""Faults that people met and reported, each as one of them would meet it."""
