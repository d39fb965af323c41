"""The default Worker: one step of a model on one torch device."""
