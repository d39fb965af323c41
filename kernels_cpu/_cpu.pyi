"""The compiled module: addresses and numbers. Call the package's checked functions."""

from collections.abc import Sequence
from typing import overload

def isa() -> str: ...
def available_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def pin_threads(cpus: Sequence[int]) -> bool: ...
def paged_attention(
    dtype: int,
    stored: int,
    q: int,
    k_cache: int,
    v_cache: int,
    k_scales: int,
    v_scales: int,
    out: int,
    block_table: int,
    seq_lens: int,
    query_start_loc: int,
    sinks: int,
    alibi_slopes: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    scale: float,
    window: int,
    chunk: int,
    soft_cap: float,
) -> None: ...
def write_cache(
    dtype: int,
    stored: int,
    element_size: int,
    source: int,
    cache: int,
    scales: int,
    slots: int,
    sizes: Sequence[int],
    strides: Sequence[int],
) -> None: ...
def quantize(
    bits: int,
    dtype: int,
    weight: int,
    codes: int,
    scales: int,
    zeros: int,
    num_outputs: int,
    num_inputs: int,
    row_stride: int,
    group_size: int,
) -> None: ...
def rms_norm(
    dtype: int,
    x: int,
    residual: int,
    weight: int,
    out: int,
    rows: int,
    n: int,
    x_stride: int,
    residual_stride: int,
    out_stride: int,
    eps: float,
) -> None: ...
def gated_activation(
    dtype: int, gate: int, x: int, out: int, rows: int, n: int, x_stride: int, out_stride: int
) -> None: ...
def rotary(
    dtype: int,
    x: int,
    cos: int,
    sin: int,
    num_tokens: int,
    num_heads: int,
    num_pairs: int,
    token_stride: int,
    head_stride: int,
    cos_stride: int,
    sin_stride: int,
    is_interleaved: bool,
) -> None: ...
def num_lanes(format_code: int, num_outputs: int, num_inputs: int, /) -> int: ...
def pack_lanes(
    format_code: int,
    source: int,
    row_bytes: int,
    num_outputs: int,
    num_inputs: int,
    target: int,
    /,
) -> None: ...
def read_memory(address: int, num_words: int) -> int: ...

class Linear:
    def __init__(
        self,
        format_code: int,
        rounding: int,
        lanes: int,
        scale_dtype: int,
        scales: int,
        zeros: int,
        bias: int,
        num_outputs: int,
        num_inputs: int,
        group_size: int,
        zero: int,
        /,
    ) -> None: ...
    def multiply(
        self, dtype: int, x: int, out: int, rows: int, x_stride: int, out_stride: int, /
    ) -> None: ...

class Experts:
    @overload
    def __init__(
        self,
        format_code: int,
        gate_up: int,
        gate_up_bias: int,
        down: int,
        down_bias: int,
        count: int,
        hidden_size: int,
        inner_size: int,
        gate: int,
        alpha: float,
        limit: float,
        /,
    ) -> None: ...
    @overload
    def __init__(
        self,
        gate_up: Sequence[Linear],
        down: Sequence[Linear],
        gate: int,
        alpha: float,
        limit: float,
        /,
    ) -> None: ...
    def run(
        self,
        dtype: int,
        x: int,
        shares: int,
        chosen: int,
        out: int,
        tokens: int,
        num_chosen: int,
        x_stride: int,
        out_stride: int,
        weighs_input: bool,
        /,
    ) -> None: ...

def route_experts(
    logits: int,
    bias: int,
    weights: int,
    ids: int,
    sizes: Sequence[int],
    scale: float,
    is_sigmoid: bool,
    is_renormalised: bool,
    adds_two_best: bool,
    /,
) -> None: ...
def head_linear(dtype: int, x: int, weight: int, out: int, sizes: Sequence[int], /) -> None: ...
def causal_conv1d(
    dtype: int,
    x: int,
    weight: int,
    bias: int,
    states: int,
    out: int,
    starts: int,
    slots: Sequence[int],
    sizes: Sequence[int],
    has_silu: bool,
    /,
) -> None: ...
def selective_scan(
    dtype: int,
    x: int,
    dt: int,
    a: int,
    b_dtype: int,
    b: int,
    c_dtype: int,
    c: int,
    d: int,
    states: int,
    out: int,
    starts: int,
    slots: Sequence[int],
    sizes: Sequence[int],
    /,
) -> None: ...
def ssd_scan(
    dtype: int,
    x: int,
    dt: int,
    a: int,
    b_dtype: int,
    b: int,
    c_dtype: int,
    c: int,
    d: int,
    states: int,
    out: int,
    starts: int,
    slots: Sequence[int],
    sizes: Sequence[int],
    /,
) -> None: ...
def gated_delta_rule(
    dtype: int,
    v: int,
    q_dtype: int,
    q: int,
    k_dtype: int,
    k: int,
    decay: int,
    beta: int,
    states: int,
    out: int,
    starts: int,
    slots: Sequence[int],
    sizes: Sequence[int],
    /,
) -> None: ...
def mask_tokens(logits: int, rows: int, mask: int, sizes: Sequence[int], /) -> None: ...
def most_likely(
    dtype: int, logits: int, out: int, is_broken: int, sizes: Sequence[int], /
) -> None: ...
def sample(
    logits: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    uniform: int,
    out: int,
    sizes: Sequence[int],
    is_all_greedy: bool,
    needs_filter: bool,
    /,
) -> None: ...
def logprobs(
    logits: int,
    chosen: int,
    selected: int,
    ranks: int,
    top_ids: int,
    top_logprobs: int,
    sizes: Sequence[int],
    /,
) -> None: ...

class StepPart: ...

class Step(StepPart):
    def __init__(
        self,
        query_start_loc: int,
        seq_lens: int,
        block_table: int,
        slots: int,
        sizes: Sequence[int],
    ) -> None: ...

class Rounds(StepPart):
    def __init__(self, rounds: Sequence[Sequence[int]], num_tokens: int) -> None: ...

class Mixing: ...

class CachedMixing(Mixing):
    def bind_cache(
        self,
        stored: int,
        k: int,
        v: int,
        k_scales: int,
        v_scales: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        /,
    ) -> None: ...

class StateMixing(Mixing):
    def bind_pages(self, pages: Sequence[int], /) -> None: ...
    def run(self, x: int, out: int, rounds: Rounds, /) -> None: ...

class HeadAttention(CachedMixing):
    def __init__(
        self,
        dtype: int,
        qkv: Linear,
        output: Linear,
        norms: Sequence[int],
        sinks: int,
        sizes: Sequence[int],
        eps: float,
        scale: float,
        soft_cap: float,
        flags: Sequence[bool],
        /,
    ) -> None: ...

class LatentAttention(CachedMixing):
    def __init__(
        self,
        dtype: int,
        q_down: Linear | None,
        q_up: Linear,
        kv_down: Linear,
        output: Linear,
        norms: Sequence[int],
        key_up: Sequence[int],
        value_up: Sequence[int],
        sizes: Sequence[int],
        eps: float,
        scale: float,
        is_interleaved: bool,
        /,
    ) -> None: ...

class FusedDelta(StateMixing):
    def __init__(
        self,
        dtype: int,
        in_proj: Linear,
        out_proj: Linear,
        tensors: Sequence[int],
        sizes: Sequence[int],
        eps: float,
    ) -> None: ...

class FusedMixer(StateMixing):
    def __init__(
        self,
        dtype: int,
        in_proj: Linear,
        out_proj: Linear,
        x_proj: Linear | None,
        dt_proj: Linear | None,
        tensors: Sequence[int],
        sizes: Sequence[int],
        eps: float,
        is_norm_first: bool,
    ) -> None: ...

class Mixture:
    def __init__(
        self,
        dtype: int,
        router: Linear,
        bias: int,
        experts: Experts,
        shared_gate_up: Linear | None,
        shared_down: Linear | None,
        shared_gate: Linear | None,
        gate: int,
        sizes: Sequence[int],
        scale: float,
        flags: Sequence[bool],
        /,
    ) -> None: ...

class Layer:
    def __init__(
        self,
        dtype: int,
        element_size: int,
        hidden_size: int,
        mixings: Sequence[Mixing],
        gate_up: Linear | None,
        down: Linear | None,
        mixture: Mixture | None,
        norms: Sequence[int],
        gate: int,
        eps: float,
        is_residual_wide: bool,
        /,
    ) -> None: ...

class LayerChain:
    def __init__(
        self,
        layers: Sequence[Layer],
        groups: Sequence[Sequence[int]],
        ropes: Sequence[Sequence[int]],
        /,
    ) -> None: ...
    def run(
        self,
        parts: Sequence[StepPart],
        x: int,
        residual: int,
        angles: Sequence[tuple[int, int, int, int]],
        /,
    ) -> None: ...
