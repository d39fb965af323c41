"""Quire's core: knows no device."""
