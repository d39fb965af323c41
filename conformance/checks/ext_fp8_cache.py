"""Extension `fp8_cache`: keys and values in eight floating bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.conformance import narrow_cache
from quire.conformance.cases import check, dtypes, product
from quire.conformance.trial import Trial
from quire.core.interface import Capabilities

_FORMATS = {
    "e4m3": {"cache_dtype": "float8_e4m3fn"},
    "e5m2": {"cache_dtype": "float8_e5m2"},
}


def _needs(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if arguments["cache_dtype"] in claims.cache_dtypes:
        return ""
    return f"cache dtype {arguments['cache_dtype']} is not claimed"


@check(level=1, op="paged_attention", over=product(_FORMATS, dtypes()), needs=_needs, on_torch=True)
def mixed_batch(trial: Trial, *, cache_dtype: str, dtype: str) -> None:
    """Chunks of prompts and decoded tokens over what the cache stores."""
    narrow_cache.mixed_batch(trial, cache_dtype, dtype)


@check(level=1, op="paged_attention", over=product(_FORMATS, dtypes("float32")), needs=_needs)
def saturates(trial: Trial, *, cache_dtype: str, dtype: str) -> None:
    """What is too large for the format becomes its largest number, never infinity or NaN."""
    narrow_cache.mixed_batch(trial, cache_dtype, dtype, scale=300.0)


@check(level=1, op="paged_attention", over=product(_FORMATS, dtypes()), needs=_needs, on_torch=True)
def moves_blocks(trial: Trial, *, cache_dtype: str, dtype: str) -> None:
    """Blocks go out and come back with every number as it was."""
    narrow_cache.moves_blocks(trial, cache_dtype, dtype)
