"""Configuration: complete before the engine exists, and every correction has its reason."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from quire.core.config import EngineConfig, resolve
from quire.core.errors import ConfigError
from quire.core.interface import Capabilities


@dataclass(frozen=True)
class Facts:
    """A model of bfloat16 and 4096 tokens."""

    checkpoint_dtype: str = "bfloat16"
    max_model_len: int = 4096
    pooling: object = None
    needs_whole_prompts: bool = False
    sees_whole_prompts: bool = False


def test_from_user_with_unknown_settings_names_them_all() -> None:
    """A misspelt setting must never be ignored."""
    with pytest.raises(ConfigError, match="'dtyp', 'gpu'"):
        EngineConfig.from_user(model="m", dtyp="x", gpu=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"device_memory_fraction": 1.5}, "device_memory_fraction is 1.5"),
        ({"scheduling_policy": "random"}, "choose fcfs or priority"),
        ({"load_format": "pickle"}, "choose auto or dummy"),
        ({"model": ""}, "model is empty"),
    ],
)
def test_config_out_of_range_says_what_is_allowed(settings: dict[str, object], said: str) -> None:
    """Bad settings fail where they are written."""
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**{"model": "m", **settings})  # type: ignore[arg-type]


def test_resolve_fills_every_open_setting_and_says_why() -> None:
    """Afterwards nothing is left to choose."""
    resolved = resolve(
        EngineConfig(model="m"), Capabilities(dtypes=("bfloat16", "float32")), Facts()
    )
    config = resolved.config
    assert (config.dtype, config.cache_dtype, config.block_size) == ("bfloat16", "float32", 16)
    assert config.max_model_len == 4096
    assert config.overlap_scheduling is False
    assert {change.setting for change in resolved.changes} >= {"dtype", "cache_dtype", "block_size"}
    assert all(change.why for change in resolved.changes)


def test_resolve_dtype_auto_falls_back_to_what_the_device_claims() -> None:
    """A checkpoint's dtype is taken only where the device computes in it."""
    assert resolve(EngineConfig(model="m"), Capabilities(), Facts()).config.dtype == "float32"


def test_resolve_keeps_what_the_user_asked_for() -> None:
    """A wish is refused in planning or granted, never silently replaced."""
    user = EngineConfig(model="m", dtype="float16", block_size=48, max_model_len=100)
    resolved = resolve(user, Capabilities(), Facts())
    assert (resolved.config.dtype, resolved.config.block_size) == ("float16", 48)
    assert resolved.config.max_model_len == 100


def test_resolve_twice_changes_nothing() -> None:
    """A resolved config is a fixed point."""
    once = resolve(EngineConfig(model="m"), Capabilities(), Facts()).config
    again = resolve(once, Capabilities(), Facts())
    assert again.config == once
    assert again.changes == ()


def test_resolve_longer_than_the_model_is_refused() -> None:
    """Positions that the model never saw give nonsense, not an answer."""
    with pytest.raises(ConfigError, match="made for 4096"):
        resolve(EngineConfig(model="m", max_model_len=5000), Capabilities(), Facts())


def test_resolve_without_chunking_makes_room_for_a_whole_prompt() -> None:
    """A prompt that cannot be split must fit into a step."""
    user = EngineConfig(model="m", enable_chunked_prefill=False, max_num_batched_tokens=512)
    assert resolve(user, Capabilities(), Facts()).config.max_num_batched_tokens == 4096


def test_resolve_caps_at_the_devices_buckets() -> None:
    """A device with fixed shapes cannot run more than its largest."""
    capabilities = Capabilities(request_buckets=(1, 8), token_buckets=(16, 256))
    config = resolve(EngineConfig(model="m"), capabilities, Facts()).config
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (8, 256)


def test_resolve_overlap_on_a_synchronous_device_is_corrected_aloud() -> None:
    """Nothing can overlap there; the user is told."""
    resolved = resolve(EngineConfig(model="m", overlap_scheduling=True), Capabilities(), Facts())
    assert resolved.config.overlap_scheduling is False
    assert "synchronous" in str(resolved.changes)
