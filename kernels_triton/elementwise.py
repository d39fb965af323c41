"""Gated activations, the soft cap and rotary embeddings."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.functions import tanh
from quire.kernels_triton.launch import Launcher, ceil_div, power_of_two

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@triton.jit
def gated_activation_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    width,
    x_stride,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of act(x[:, :I]) * x[:, I:]; KIND is 0 for SiLU, 1 for GELU, 2 for its tanh form."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    place = x_ptr + (row * x_stride)[:, None] + column[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
    if KIND == 0:
        active = gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = 0.5 * gate * (1.0 + tanh(inner))
    out = out_ptr + (row * width)[:, None] + column[None, :]
    tl.store(out, (active * up).to(out_ptr.dtype.element_ty), mask=mask)


def gated_activation(launcher: Launcher, x: Tensor, kind: str, out: Tensor) -> None:
    """act(x[:, :I]) * x[:, I:] for x [T, 2I] (dense rows) into out [T, I], contiguous.

    `kind` is one of `ACTIVATIONS`. Source: Shazeer 2020 (GLU variants), eq. 5.
    """
    num_rows, width = out.shape
    entry = launcher.find("gated_activation")
    tile = entry.constants["TILE"]
    block = min(power_of_two(width), tile)
    rows = max(1, min(tile // block, power_of_two(num_rows)))
    launcher.start(
        gated_activation_kernel,
        (ceil_div(num_rows, rows), ceil_div(width, block)),
        [x, out, num_rows, width, x.stride(0)],
        {"KIND": ACTIVATIONS.index(kind), "ROWS": rows, "BLOCK": block},
        entry,
    )


@triton.jit
def soft_cap_kernel(x_ptr, num_elements, cap, BLOCK: tl.constexpr):
    """BLOCK elements of cap * tanh(x / cap), in place."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_elements
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + index, (cap * tanh(x / cap)).to(x_ptr.dtype.element_ty), mask=mask)


def soft_cap(launcher: Launcher, x: Tensor, cap: float) -> None:
    """X = cap * tanh(x / cap) for a contiguous x, in place. Source: Gemma 2 report, section 2."""
    entry = launcher.find("soft_cap")
    block = entry.constants["TILE"]
    grid = (ceil_div(x.numel(), block),)
    launcher.start(soft_cap_kernel, grid, [x, x.numel(), cap], {"BLOCK": block}, entry)


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    num_tokens,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    angle_stride,
    NUM_HEADS: tl.constexpr,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """BLOCK_T tokens of one head: of q below NUM_HEADS, of k from there on."""
    head = tl.program_id(1)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (token < num_tokens)[:, None] & (f < F)[None, :]
    if head < NUM_HEADS:
        rows = q_ptr + token * q_token_stride + head * q_head_stride
    else:
        rows = k_ptr + token * k_token_stride + (head - NUM_HEADS) * k_head_stride
    angle = (token * angle_stride)[:, None] + f[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    if IS_INTERLEAVED:
        first = rows[:, None] + 2 * f[None, :]
        second = first + 1
    else:
        first = rows[:, None] + f[None, :]
        second = first + F
    a = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(second, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (a * cos - b * sin).to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(second, (b * cos + a * sin).to(q_ptr.dtype.element_ty), mask=mask)


def rotary(
    launcher: Launcher, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool
) -> None:
    """Rotates the first 2F features of q [T, Hq, D] and k [T, Hk, D] in place, in one launch.

    cos, sin float32 [T, F], alike in strides; heads may be strided, their last dimension is dense.
    Source: Su et al. 2021, eq. 34.
    """
    num_tokens, num_heads, _ = q.shape
    num_pairs = cos.shape[-1]
    entry = launcher.find("rotary")
    block_f = power_of_two(num_pairs)
    block_t = max(1, min(entry.constants["TILE"] // block_f, power_of_two(num_tokens)))
    launcher.start(
        rotary_kernel,
        (ceil_div(num_tokens, block_t), num_heads + k.shape[1]),
        [q, k, cos, sin, num_tokens, *q.stride()[:2], *k.stride()[:2], cos.stride(0)],
        {
            "NUM_HEADS": num_heads,
            "F": num_pairs,
            "BLOCK_F": block_f,
            "BLOCK_T": block_t,
            "IS_INTERLEAVED": is_interleaved,
        },
        entry,
    )
