"""Extension `int8_cache`: keys and values in whole numbers, each token and head with its scale."""

from __future__ import annotations

from quire.conformance import narrow_cache
from quire.conformance.cases import check, dtypes, needs_claim
from quire.conformance.trial import Trial

_NEEDS = needs_claim("cache_dtypes", "int8")


@check(level=1, op="paged_attention", over=dtypes(), on_torch=True, needs=_NEEDS)
def mixed_batch(trial: Trial, *, dtype: str) -> None:
    """Chunks of prompts and decoded tokens over what the cache stores."""
    narrow_cache.mixed_batch(trial, "int8", dtype)


@check(level=1, op="paged_attention", over=dtypes(), on_torch=True, needs=_NEEDS)
def large_numbers(trial: Trial, *, dtype: str) -> None:
    """Scales follow the data: keys and values a thousand times larger are as exact."""
    narrow_cache.mixed_batch(trial, "int8", dtype, scale=1000.0)


@check(level=1, op="paged_attention", over=dtypes(), on_torch=True, needs=_NEEDS)
def moves_blocks(trial: Trial, *, dtype: str) -> None:
    """Blocks go out and come back with every number as it was."""
    narrow_cache.moves_blocks(trial, "int8", dtype)
