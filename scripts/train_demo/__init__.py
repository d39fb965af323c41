"""Trains the demo model: a small Llama on the standard library of the Python that runs it."""
