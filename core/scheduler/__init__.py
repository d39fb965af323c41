"""Decides which tokens each step computes. Knows no tensors."""
