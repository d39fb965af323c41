"""Attention and fused operators of other projects, where installed and asked for by name."""

from quire.backends.torch_accelerator.providers.catalog import PROVIDERS, Provider, find_provider

__all__ = ["PROVIDERS", "Provider", "find_provider"]
