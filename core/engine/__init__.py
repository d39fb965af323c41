"""The loop, its fronts, and the process it runs in."""
