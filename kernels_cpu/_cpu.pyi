"""The compiled module: addresses and numbers. Call the package's checked functions."""

from collections.abc import Sequence

def isa() -> str: ...
def available_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def paged_attention(
    dtype: int,
    q: int,
    k_cache: int,
    v_cache: int,
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
    element_size: int,
    source: int,
    cache: int,
    slots: int,
    sizes: Sequence[int],
    strides: Sequence[int],
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
