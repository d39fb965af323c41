"""What a running engine says about itself: fixed facts, and numbers that change."""

from __future__ import annotations

import msgspec

from quire.core.config import EngineConfig


class PlanFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan decided, without the device that it opened. Crosses from a worker's process."""

    config: EngineConfig
    """Resolved."""
    model_directory: str
    device: str
    """The backend's name."""
    device_name: str
    """As the vendor sells it."""
    kernels: dict[str, str]
    """Operator to who serves it."""
    changes: list[str]
    """What `resolve` filled in or corrected, one sentence each."""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is fixed once an engine runs. Crosses from the engine core to its front."""

    model: str
    """As the user named it."""
    served_model_name: str
    model_directory: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """The most tokens of one request, prompt and output together."""
    num_parameters: int
    weight_bytes: int
    dtype: str
    device: str
    """The backend's name."""
    device_name: str
    """As the vendor sells it."""
    num_blocks: list[int]
    """Of each cache group, block 0 included."""
    num_cache_tokens: int
    """Tokens that the cache holds, all requests together, in the group that holds the fewest."""
    providers: dict[str, str]
    """Operator to who serves it."""
    changes: list[str]
    """What `resolve` filled in or corrected, one sentence each."""
    tasks: list[str] = msgspec.field(default_factory=lambda: ["generate"])
    """What the model does: see `quire.core.engine.pooling.Task`."""
    encoder_input: str | None = None
    """What every request must bring for the model's encoder: `tokens`, `audio`; None: nothing."""
    accepts: list[str] = []
    """What a prompt may bring besides text: `image`, `audio`."""
    source_steps: list[int] = []
    """As `ModelInfo` has them; empty: of every sound the encoder makes as many tokens."""
    max_source_tokens: int = 0
    """The most tokens that the encoder makes of what a request brings."""
    labels: list[str] = []
    """Of a model that classifies, by index."""
    vector_size: int = 0
    """Of a model that makes vectors: how many numbers one has."""
    startup_s: dict[str, float]
    """Seconds of each stage of the start: `plan`, `load`, `measure`, `allocate`, `warm_up`."""


class EngineStatistics(msgspec.Struct, kw_only=True):
    """Numbers of an engine at one moment; the counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    cache_usage: float = 0.0
    """Of the cache's blocks, the part that requests hold, from 0 to 1."""
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens of all requests that were ever scheduled."""
    num_cached_prompt_tokens: int = 0
    """Of these, tokens that the prefix cache held."""
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_failed_steps: int = 0
    """Steps that ran out of memory and were tried again."""
    memory_bytes: dict[str, int] = {}
    """Of the device, by `weights`, `cache`, ..., where known."""
