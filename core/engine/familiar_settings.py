"""Settings by the names that users of vLLM know."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from quire.core.errors import ConfigError

_RENAMED = {
    "gpu_memory_utilization": "device_memory_fraction",
    "kv_cache_dtype": "cache_dtype",
    "cpu_offload_gb": None,
    "enforce_eager": None,
    "disable_log_stats": None,
    "swap_space": None,
    "max_seq_len_to_capture": None,
}
"""To our name; None: it has no meaning here."""
_ONLY = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "trust_remote_code": False,
    "skip_tokenizer_init": False,
    "tokenizer_mode": "auto",
}
"""Settings of which one value is served."""


def translate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under our names. What has no meaning here is left out with a warning.

    Raises: ConfigError for a value that is not served.
    """
    translated: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _ONLY:
            if value != _ONLY[name]:
                raise ConfigError(f"{name} is {value!r}; only {_ONLY[name]!r} is served")
        elif name not in _RENAMED:
            translated[name] = value
        elif (ours := _RENAMED[name]) is not None:
            translated[ours] = value
        else:
            warnings.warn(f"{name} has no meaning here and is ignored", stacklevel=3)
    return translated
