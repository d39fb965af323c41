"""What may be asked of a device: one frozen record, conservative by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The claims of one opened device.

    The engine gates on this record, `quire plan` prints it and the conformance suite tests it: what
    is not claimed here the users of the device do not get. Every default is the conservative
    answer. Strings are open keys, never closed enums; a vendor's own carry a prefix (`acme:int3`).
    """

    dtypes: tuple[str, ...] = ("float32",)
    """Dtypes of weights and activations, best first; the first is what `dtype="auto"` falls back
    to.
    """
    cache_dtypes: tuple[str, ...] = ("float32",)
    """Dtypes in which keys and values may be stored."""
    block_sizes: tuple[int, ...] = (16,)
    """Tokens in a cache block, preferred first."""
    head_sizes: tuple[int, ...] | None = None
    """Head sizes that attention takes; None: any."""
    attention_kinds: frozenset[str] = frozenset({"causal"})
    """Of `causal`, `sliding_window`, `chunked`, `bidirectional`, `cross`, `mla`, `recurrent`,
    `vendor:name`.
    """
    attention_features: frozenset[str] = frozenset()
    """Of `soft_cap`, `sinks`, `alibi`, `vendor:name`."""
    features: frozenset[str] = frozenset()
    """Extensions of the contract that the device serves: `moe`, `quantized_experts`, `recurrent`,
    `state_slots`, `cache_rows`, `lora`, `speculation`, `vendor:name`."""
    quantizations: frozenset[str] = frozenset()
    """Weight formats beyond the plain dtypes: `int8`, `int4`, `fp8`, `vendor:name`."""
    token_buckets: tuple[int, ...] = ()
    """Numbers of tokens that a step may have, ascending; empty: any.

    The runner pads to the next.
    """
    request_buckets: tuple[int, ...] = ()
    """Numbers of requests that a step may have, ascending; empty: any."""
    step_mode: str = "eager"
    """`eager`, `capture` (record once, replay) or `compile` (a function a bucket)."""
    is_asynchronous: bool = False
    """Work is queued: `Worker.submit` returns before the step is done, so the next can be
    scheduled.
    """
    copy_mode: str = "synchronous"
    """Host-device copies: `synchronous`, `asynchronous` (pinned; a staging buffer must rest until
    its copy is done) or `unified` (one memory).
    """
    samples_on_device: bool = True
    """Sampling runs through this device's Ops; if not, logits come to the host."""
    determinism: str = "none"
    """`none`, `run_to_run`, `batch_invariant`, or `invariant` (batch, chunk and prefix)."""
    max_tensor_parallel: int = 1
    """Devices over which one model may be split."""
    can_sleep: bool = False
    """Whether `Worker.sleep` and `wake` are honoured."""
    index_dtype: str = "int32"
    """Dtype of block tables; slot mappings are always int64."""
    extensions: Mapping[str, str] = field(default_factory=dict)
    """Anything else, as `vendor:name` to a sentence; shown, never interpreted."""
