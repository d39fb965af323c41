"""Convolutions and scans over the sequences of a step, each with a state that is carried on.

The scans go one step of time after the other, with the state in registers: sequences, heads and
channels run side by side. With `slots` (sources and targets, int64 [S]) states lie in a page
[n, ...] dense but for its first dimension: s starts from states[sources[s]], or from zeros where
that is negative, and leaves its last in states[targets[s]]. All are right for padding and for any
mix of lengths, and ask nothing of the host but how many sequences there are, so they can be
recorded.
Source: Gu & Dao 2023, Algorithm 2; Dao & Gu 2024, section 2; Yang, Kautz & Hatamizadeh 2024,
eq. 10.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.launch import Launcher, ceil_div, power_of_two

Slots = tuple[Tensor, Tensor]


@triton.jit
def _find_sequence(starts_ptr, tile, num_sequences, BLOCK_T: tl.constexpr):
    """The sequence of a tile of tokens: sequence s begins at tile start // BLOCK_T + s."""
    low: tl.int32 = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // BLOCK_T + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _state_of(sequence, slots_ptr, stride, HAS_SLOTS: tl.constexpr):
    """(whether there is such a state, where it begins)."""
    slot = sequence.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + sequence)
    return slot >= 0, slot * stride


@triton.jit(do_not_specialize=["num_sequences"])
def conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    states_ptr,
    sources_ptr,
    starts_ptr,
    out_ptr,
    num_sequences,
    channels,
    x_stride,
    state_stride,
    W: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_T tokens of one sequence, BLOCK_C channels."""
    tile = tl.program_id(0)
    sequence = _find_sequence(starts_ptr, tile, num_sequences, BLOCK_T)
    begin = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - begin
    first = (tile - (begin // BLOCK_T + sequence)) * BLOCK_T
    if first >= length:
        return
    t = first + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = (c < channels)[None, :]
    mask = (t < length)[:, None] & is_channel
    has_state, before = _state_of(sequence, sources_ptr, state_stride, HAS_SLOTS)
    states = states_ptr + before + (c * (W - 1))[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for w in range(W):
        source = t + (w - (W - 1))
        rows = x_ptr + ((begin + source).to(tl.int64) * x_stride)[:, None] + c[None, :]
        is_new = (source >= 0)[:, None]
        value = tl.load(rows, mask=mask & is_new, other=0.0).to(tl.float32)
        is_old = mask & ~is_new & has_state
        old = tl.load(states + (source + (W - 1))[:, None], mask=is_old, other=0.0)
        value += old.to(tl.float32)
        weight = tl.load(weight_ptr + c * W + w, mask=c < channels, other=0.0).to(tl.float32)
        acc += value * weight[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    place = out_ptr + ((begin + t).to(tl.int64) * channels)[:, None] + c[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_state_kernel(
    x_ptr,
    states_ptr,
    sources_ptr,
    targets_ptr,
    starts_ptr,
    channels,
    x_stride,
    state_stride,
    W: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The last W - 1 inputs of one sequence into its state."""
    sequence = tl.program_id(0)
    begin = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - begin
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.arange(0, BLOCK_W)
    mask = (c < channels)[:, None] & (w < W - 1)[None, :]
    source = w + (length - (W - 1))
    has_state, before = _state_of(sequence, sources_ptr, state_stride, HAS_SLOTS)
    _, after = _state_of(sequence, targets_ptr, state_stride, HAS_SLOTS)
    states = states_ptr + (c * (W - 1))[:, None]
    is_new = (source >= 0)[None, :]
    rows = x_ptr + ((begin + source).to(tl.int64) * x_stride)[None, :] + c[:, None]
    value = tl.load(rows, mask=mask & is_new, other=0.0).to(tl.float32)
    is_old = mask & ~is_new & has_state
    old = tl.load(states + before + (w + length)[None, :], mask=is_old, other=0.0)
    # All of the old state is read before any of it is overwritten.
    tl.debug_barrier()
    kept = (value + old.to(tl.float32)).to(states_ptr.dtype.element_ty)
    tl.store(states + after + w[None, :], kept, mask=mask)


def causal_conv1d(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    starts: Tensor,
    *,
    has_silu: bool,
    slots: Slots | None = None,
) -> Tensor:
    """Convolves x [T, C] (dense rows) of S sequences; overwrites states [n, C, W - 1].

    weight [C, W], bias [C], states are contiguous; starts int32 [S + 1]. Returns [T, C].
    """
    num_tokens, channels = x.shape
    width, count = weight.shape[1], len(starts) - 1
    sources, targets = slots or (starts, starts)
    has_slots = {"HAS_SLOTS": slots is not None}
    out = x.new_empty((num_tokens, channels))
    entry = launcher.find("conv")
    block_t, block_c = entry.constants["BLOCK_T"], entry.constants["BLOCK_C"]
    launcher.start(
        conv_kernel,
        (num_tokens // block_t + count, ceil_div(channels, block_c)),
        [
            *(x, weight, x if bias is None else bias, states, sources, starts, out),
            *(count, channels, x.stride(0), states.stride(0)),
        ],
        {
            "W": width,
            "HAS_BIAS": bias is not None,
            "HAS_SILU": has_silu,
            **has_slots,
            **entry.constants,
        },
        entry,
    )
    if width > 1:
        entry = launcher.find("conv_state")
        launcher.start(
            conv_state_kernel,
            (count, ceil_div(channels, entry.constants["BLOCK_C"])),
            [
                *(x, states, sources, targets, starts),
                *(channels, x.stride(0), states.stride(0)),
            ],
            {"W": width, "BLOCK_W": power_of_two(width - 1), **has_slots, **entry.constants},
            entry,
        )
    return out


@triton.jit
def selective_scan_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    states_ptr,
    sources_ptr,
    targets_ptr,
    starts_ptr,
    out_ptr,
    channels,
    x_stride,
    dt_stride,
    b_stride,
    c_stride,
    state_stride,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """One sequence, BLOCK_C channels: h = exp(dt a) h + dt b x; out = h . c + d x."""
    sequence = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    is_channel, is_state = channel < channels, n < N
    mask = is_channel[:, None] & is_state[None, :]
    index = channel[:, None] * N + n[None, :]
    a = tl.load(a_ptr + index, mask=mask, other=0.0)
    has_state, before = _state_of(sequence, sources_ptr, state_stride, HAS_SLOTS)
    _, after = _state_of(sequence, targets_ptr, state_stride, HAS_SLOTS)
    h = tl.load(states_ptr + before + index, mask=mask & has_state, other=0.0)
    skip = tl.zeros([BLOCK_C], tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + channel, mask=is_channel, other=0.0)
    begin = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - begin
    for step in range(length):
        t = begin.to(tl.int64) + step
        x = tl.load(x_ptr + t * x_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + t * dt_stride + channel, mask=is_channel, other=0.0)
        b = tl.load(b_ptr + t * b_stride + n, mask=is_state, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + t * c_stride + n, mask=is_state, other=0.0).to(tl.float32)
        h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b[None, :]
        y = tl.sum(h * c[None, :], 1) + skip * x
        out = out_ptr + t * channels + channel
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=is_channel)
    tl.store(states_ptr + after + index, h, mask=mask)


def selective_scan(
    launcher: Launcher,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    starts: Tensor,
    slots: Slots | None = None,
) -> Tensor:
    """Mamba's scan of x [T, C]; overwrites states float32 [n, C, N]; see `Ops.selective_scan`.

    Rows are dense; a, d and states contiguous.
    """
    num_tokens, channels = x.shape
    size = a.shape[1]
    out = x.new_empty((num_tokens, channels))
    entry = launcher.find("selective_scan")
    block = min(entry.constants["BLOCK_C"], power_of_two(channels))
    launcher.start(
        selective_scan_kernel,
        (len(starts) - 1, ceil_div(channels, block)),
        [
            *(x, dt, a, b, c, x if d is None else d, states, *(slots or (starts, starts))),
            *(starts, out, channels, x.stride(0), dt.stride(0), b.stride(0), c.stride(0)),
            states.stride(0),
        ],
        {
            "N": size,
            "BLOCK_N": power_of_two(size),
            "BLOCK_C": block,
            "HAS_D": d is not None,
            "HAS_SLOTS": slots is not None,
        },
        entry,
    )
    return out


@triton.jit
def ssd_scan_kernel(
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    states_ptr,
    sources_ptr,
    targets_ptr,
    starts_ptr,
    out_ptr,
    x_token_stride,
    x_head_stride,
    dt_stride,
    b_token_stride,
    b_group_stride,
    c_token_stride,
    c_group_stride,
    state_stride,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """One sequence, one head, BLOCK_P channels: h = exp(dt a) h + dt x b^T; out = h c + d x."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    is_channel, is_state = p < P, n < N
    mask = is_channel[:, None] & is_state[None, :]
    group = head // GROUP
    a = tl.load(a_ptr + head)
    has_state, before = _state_of(sequence, sources_ptr, state_stride, HAS_SLOTS)
    _, after = _state_of(sequence, targets_ptr, state_stride, HAS_SLOTS)
    place = states_ptr + head * P * N + p[:, None] * N + n[None, :]
    h = tl.load(place + before, mask=mask & has_state, other=0.0)
    skip = tl.full([], 0.0, tl.float32)
    if HAS_D:
        skip += tl.load(d_ptr + head)
    begin = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - begin
    for step in range(length):
        t = begin.to(tl.int64) + step
        x_place = x_ptr + t * x_token_stride + head * x_head_stride + p
        x = tl.load(x_place, mask=is_channel, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + t * dt_stride + head)
        b_place = b_ptr + t * b_token_stride + group * b_group_stride + n
        b = tl.load(b_place, mask=is_state, other=0.0).to(tl.float32)
        c_place = c_ptr + t * c_token_stride + group * c_group_stride + n
        c = tl.load(c_place, mask=is_state, other=0.0).to(tl.float32)
        h = tl.exp(dt * a) * h + (dt * x)[:, None] * b[None, :]
        y = tl.sum(h * c[None, :], 1) + skip * x
        out = out_ptr + (t * M + head) * P + p
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=is_channel)
    tl.store(place + after, h, mask=mask)


def ssd_scan(
    launcher: Launcher,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    starts: Tensor,
    slots: Slots | None = None,
) -> Tensor:
    """Mamba-2's scan of x [T, M, P]; overwrites states float32 [n, M, P, N]; see `Ops.ssd_scan`.

    Last dimensions are dense; a, d and states contiguous.
    """
    num_tokens, heads, channels = x.shape
    groups, size = b.shape[1:]
    out = x.new_empty((num_tokens, heads, channels))
    entry = launcher.find("ssd_scan")
    block = min(entry.constants["BLOCK_P"], power_of_two(channels))
    launcher.start(
        ssd_scan_kernel,
        (len(starts) - 1, heads, ceil_div(channels, block)),
        [
            *(x, dt, a, b, c, x if d is None else d, states, *(slots or (starts, starts))),
            *(starts, out, *x.stride()[:2], dt.stride(0), *b.stride()[:2], *c.stride()[:2]),
            states.stride(0),
        ],
        {
            "M": heads,
            "GROUP": heads // groups,
            "P": channels,
            "N": size,
            "BLOCK_P": block,
            "BLOCK_N": power_of_two(size),
            "HAS_D": d is not None,
            "HAS_SLOTS": slots is not None,
        },
        entry,
    )
    return out


@triton.jit
def gated_delta_rule_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    beta_ptr,
    states_ptr,
    sources_ptr,
    targets_ptr,
    starts_ptr,
    out_ptr,
    q_token_stride,
    q_group_stride,
    k_token_stride,
    k_group_stride,
    v_token_stride,
    v_head_stride,
    decay_stride,
    beta_stride,
    state_stride,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """One sequence, one head, BLOCK_V features of its values."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_key, is_value = d < D, e < DV
    mask = is_key[:, None] & is_value[None, :]
    group = head // GROUP
    has_state, before = _state_of(sequence, sources_ptr, state_stride, HAS_SLOTS)
    _, after = _state_of(sequence, targets_ptr, state_stride, HAS_SLOTS)
    place = states_ptr + head * D * DV + d[:, None] * DV + e[None, :]
    h = tl.load(place + before, mask=mask & has_state, other=0.0)
    begin = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - begin
    for step in range(length):
        t = begin.to(tl.int64) + step
        q_place = q_ptr + t * q_token_stride + group * q_group_stride + d
        q = tl.load(q_place, mask=is_key, other=0.0).to(tl.float32)
        k_place = k_ptr + t * k_token_stride + group * k_group_stride + d
        k = tl.load(k_place, mask=is_key, other=0.0).to(tl.float32)
        v_place = v_ptr + t * v_token_stride + head * v_head_stride + e
        v = tl.load(v_place, mask=is_value, other=0.0).to(tl.float32)
        h = tl.exp(tl.load(decay_ptr + t * decay_stride + head)) * h
        recalled = tl.sum(h * k[:, None], 0)
        change = tl.load(beta_ptr + t * beta_stride + head) * (v - recalled)
        h += k[:, None] * change[None, :]
        y = tl.sum(h * q[:, None], 0)
        out = out_ptr + (t * M + head) * DV + e
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=is_value)
    tl.store(place + after, h, mask=mask)


def gated_delta_rule(
    launcher: Launcher,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    states: Tensor,
    starts: Tensor,
    slots: Slots | None = None,
) -> Tensor:
    """The gated delta rule over v [T, M, Dv]; overwrites states float32 [n, M, D, Dv].

    q, k [T, G, D]; see `Ops.gated_delta_rule`. Last dimensions are dense, states contiguous.
    """
    num_tokens, heads, v_size = v.shape
    groups, size = q.shape[1:]
    out = v.new_empty((num_tokens, heads, v_size))
    entry = launcher.find("gated_delta_rule")
    block = min(entry.constants["BLOCK_V"], power_of_two(v_size))
    launcher.start(
        gated_delta_rule_kernel,
        (len(starts) - 1, heads, ceil_div(v_size, block)),
        [
            *(q, k, v, decay, beta, states, *(slots or (starts, starts)), starts, out),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], decay.stride(0), beta.stride(0)),
            states.stride(0),
        ],
        {
            "M": heads,
            "GROUP": heads // groups,
            "D": size,
            "DV": v_size,
            "BLOCK_D": power_of_two(size),
            "BLOCK_V": block,
            "HAS_SLOTS": slots is not None,
        },
        entry,
    )
    return out
