"""Model families, their layers, and how weights are read."""
