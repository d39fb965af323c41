"""Owns the blocks of the cache: ids alone, never their contents."""
