"""The output at the terminal."""
