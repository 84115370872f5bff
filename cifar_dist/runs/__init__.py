"""A run's directory and files, and reading them back."""
