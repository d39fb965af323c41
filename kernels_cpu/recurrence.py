"""Convolutions and scans over the sequences of a step.

Sequence s owns rows [starts[s], starts[s + 1]) of T; starts int32 [S + 1], contiguous. Rows past
the last start are not written. With `slots` (int64 [S] each: sources and targets), `states` is a
page [n, ...] dense but for its first dimension: s starts from states[sources[s]], or from zeros
where that is negative, and leaves its last in states[targets[s]]; targets are distinct, and none
is another's source. Without, n is S, and s has states[s]. Every step of time is computed alone, in
float32: a token's result is bitwise the same whoever is in the batch and however its prompt was
cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from torch import Tensor

    Slots: TypeAlias = tuple[Tensor, Tensor]

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    starts: Tensor,
    out: Tensor,
    *,
    has_silu: bool,
    slots: Slots | None = None,
) -> None:
    """out[t] = act(sum_w weight[:, w] * input[t - W + 1 + w] + bias).

    x [T, C] with dense rows; weight [C, W], bias [C], states [n, C, W - 1] (the inputs before each
    sequence, overwritten by its last ones) and out [T, C]; all of x's dtype, contiguous.
    Raises: ValueError, TypeError. Source: Gu & Dao 2023, section 3.4.
    """
    dtype = x.dtype
    stride = checks.check_dense("x", x, dtype, 2)[0]
    num_rows, channels = x.shape
    taps = weight.shape[1]
    num_sequences = _check_starts(starts)
    name = str(dtype).removeprefix("torch.")
    checks.check_contiguous("weight", weight, name, (channels, taps))
    places = _place(states, dtype, (channels, taps - 1), num_sequences, slots)
    checks.check_contiguous("out", out, name, (num_rows, channels))
    if bias is not None:
        checks.check_contiguous("bias", bias, name, (channels,))
    _cpu.causal_conv1d(
        checks.dtype_code(dtype),
        x.data_ptr(),
        weight.data_ptr(),
        checks.address_of(bias),
        states.data_ptr(),
        out.data_ptr(),
        starts.data_ptr(),
        places,
        (num_sequences, num_rows, channels, taps, stride),
        has_silu,
    )


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    starts: Tensor,
    out: Tensor,
    *,
    slots: Slots | None = None,
) -> None:
    """h = exp(dt[t] a) h + dt[t] b[t] x[t]; out[t] = h . c[t] + d x[t].

    x [T, C] and out [T, C], contiguous, of one dtype; dt float32 [T, C], a float32 [C, N],
    b, c [T, N] of any dtype of the kernels, d float32 [C] or None, states float32 [n, C, N],
    overwritten. Raises: ValueError, TypeError. Source: Gu & Dao 2023, eq. 2.
    """
    x_stride = checks.check_dense("x", x, x.dtype, 2)[0]
    num_rows, channels = x.shape
    size = a.shape[1]
    num_sequences = _check_starts(starts)
    checks.check_contiguous("out", out, str(x.dtype).removeprefix("torch."), (num_rows, channels))
    checks.check_contiguous("a", a, "float32", (channels, size))
    places = _place(states, dt.dtype, (channels, size), num_sequences, slots)
    dt_stride = _check_rows("dt", dt, (num_rows, channels), "float32")
    strides = [_check_rows(name, y, (num_rows, size)) for name, y in (("b", b), ("c", c))]
    if d is not None:
        checks.check_contiguous("d", d, "float32", (channels,))
    _cpu.selective_scan(
        checks.dtype_code(x.dtype),
        x.data_ptr(),
        dt.data_ptr(),
        a.data_ptr(),
        checks.dtype_code(b.dtype),
        b.data_ptr(),
        checks.dtype_code(c.dtype),
        c.data_ptr(),
        checks.address_of(d),
        states.data_ptr(),
        out.data_ptr(),
        starts.data_ptr(),
        places,
        (num_sequences, num_rows, channels, size, x_stride, dt_stride, *strides),
    )


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    starts: Tensor,
    out: Tensor,
    *,
    slots: Slots | None = None,
) -> None:
    """h = exp(dt[t] a) h + dt[t] x[t] b[t]^T; out[t] = h c[t] + d x[t], head by head.

    x [T, M, P] and out, contiguous, of one dtype; dt float32 [T, M], a float32 [M], b, c [T, G, N]
    of any dtype of the kernels, d float32 [M] or None, states float32 [n, M, P, N], overwritten.
    The last two dimensions of x, b and c are dense. Raises: ValueError, TypeError.
    Source: Dao & Gu 2024, section 2.
    """
    num_rows, heads, channels = x.shape
    groups, size = b.shape[1:]
    num_sequences = _check_starts(starts)
    _check_groups(heads, groups)
    name = str(x.dtype).removeprefix("torch.")
    checks.check_contiguous("out", out, name, (num_rows, heads, channels))
    checks.check_contiguous("a", a, "float32", (heads,))
    places = _place(states, dt.dtype, (heads, channels, size), num_sequences, slots)
    x_stride = _check_rows("x", x, (num_rows, heads, channels))
    dt_stride = _check_rows("dt", dt, (num_rows, heads), "float32")
    strides = [_check_rows(name, y, (num_rows, groups, size)) for name, y in (("b", b), ("c", c))]
    if d is not None:
        checks.check_contiguous("d", d, "float32", (heads,))
    sizes = (num_sequences, num_rows, heads, channels, groups, size, x_stride, dt_stride, *strides)
    _cpu.ssd_scan(
        checks.dtype_code(x.dtype),
        x.data_ptr(),
        dt.data_ptr(),
        a.data_ptr(),
        checks.dtype_code(b.dtype),
        b.data_ptr(),
        checks.dtype_code(c.dtype),
        c.data_ptr(),
        checks.address_of(d),
        states.data_ptr(),
        out.data_ptr(),
        starts.data_ptr(),
        places,
        sizes,
    )


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    states: Tensor,
    starts: Tensor,
    out: Tensor,
    *,
    slots: Slots | None = None,
) -> None:
    """h = exp(decay[t]) h; h = h + k[t] (beta[t] (v[t] - h^T k[t]))^T; out[t] = h^T q[t].

    q, k [T, G, D] of any dtype of the kernels; v [T, M, Dv] and out, contiguous, of one dtype;
    decay, beta float32 [T, M]; states float32 [n, M, D, Dv], overwritten. The last two dimensions
    of q, k and v are dense. Raises: ValueError, TypeError.
    Source: Yang, Kautz & Hatamizadeh 2024, eq. 10.
    """
    num_rows, heads, v_size = v.shape
    groups, size = q.shape[1:]
    num_sequences = _check_starts(starts)
    _check_groups(heads, groups)
    name = str(v.dtype).removeprefix("torch.")
    checks.check_contiguous("out", out, name, (num_rows, heads, v_size))
    places = _place(states, decay.dtype, (heads, size, v_size), num_sequences, slots)
    strides = [_check_rows("v", v, (num_rows, heads, v_size))]
    strides += [_check_rows(name, y, (num_rows, groups, size)) for name, y in (("q", q), ("k", k))]
    strides += [
        _check_rows(name, y, (num_rows, heads), "float32")
        for name, y in (("decay", decay), ("beta", beta))
    ]
    _cpu.gated_delta_rule(
        checks.dtype_code(v.dtype),
        v.data_ptr(),
        checks.dtype_code(q.dtype),
        q.data_ptr(),
        checks.dtype_code(k.dtype),
        k.data_ptr(),
        decay.data_ptr(),
        beta.data_ptr(),
        states.data_ptr(),
        out.data_ptr(),
        starts.data_ptr(),
        places,
        (num_sequences, num_rows, heads, v_size, groups, size, *strides),
    )


def _place(
    states: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    num_sequences: int,
    slots: Slots | None,
) -> tuple[int, int, int, int]:
    """Addresses of sources and targets (0: each its own), the number of states, their stride."""
    checks.check_dense("states", states, dtype, 1 + len(shape))
    checks.check_shape("states", states, (len(states), *shape))
    if not states.is_contiguous() and len(states) and not states[0].is_contiguous():
        raise ValueError(f"states: each is to be dense (strides {states.stride()})")
    if slots is None:
        checks.check_shape("states", states, (num_sequences, *shape))
        return 0, 0, num_sequences, states.stride(0)
    for name, where in zip(("sources", "targets"), slots, strict=True):
        checks.check_list(name, where, "int64", num_sequences)
    return slots[0].data_ptr(), slots[1].data_ptr(), len(states), states.stride(0)


def _check_starts(starts: Tensor) -> int:
    """The number of sequences."""
    native.require_native()
    checks.check_list("starts", starts, "int32")
    if starts.shape[0] == 0:
        raise ValueError("starts is empty: it ends with the number of rows")
    return starts.shape[0] - 1


def _check_groups(heads: int, groups: int) -> None:
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups evenly")


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: str = "") -> int:
    """A tensor whose dimensions but the first are dense; returns the stride of the first."""
    checks.check_shape(name, tensor, shape)
    checks.check_dense(name, tensor, tensor.dtype, len(shape))
    if dtype and str(tensor.dtype) != f"torch.{dtype}":
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if len(shape) == 3 and tensor.stride(1) != shape[2] and shape[1] != 1:
        raise ValueError(f"{name}: the last two dimensions are not dense ({tensor.stride()})")
    return tensor.stride(0)
