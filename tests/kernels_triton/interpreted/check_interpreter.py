"""The repairs of the interpreter, each against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from quire.kernels_triton import interpreter

pytestmark = pytest.mark.usefixtures("launcher")


@triton.jit
def convert_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    tl.store(c_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


@triton.jit
def add_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


@triton.jit
def sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz]
)
def test_cast_from_float32_rounds_as_torch_does(dtype):
    """Casts round to nearest even, bit for bit, ties and small numbers included."""
    x = torch.cat(
        [torch.randn(1000) * 10.0 ** torch.randint(-3, 2, (1000,)), torch.arange(24) / 16]
    )
    y = torch.zeros(1024, dtype=dtype)
    convert_kernel[(1,)](x, y, 1024, BLOCK=1024)
    assert torch.equal(y.view(torch.uint8), x.to(dtype).view(torch.uint8))


def test_cast_from_bfloat16_keeps_every_value():
    """All 65536 patterns widen to what torch has."""
    bits = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    wide = interpreter.widen(bits.view(torch.uint16).numpy())
    assert np.array_equal(wide, bits.float().numpy(), equal_nan=True)
    finite = ~np.isnan(wide)
    again = interpreter.round_to_bfloat16(wide)
    assert np.array_equal(again[finite], bits.view(torch.uint16).numpy()[finite])


def test_dot_of_bfloat16_multiplies_numbers():
    """Not their bit patterns."""
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, N=16)
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-5)


@pytest.mark.parametrize("kernel", [add_kernel, sum_kernel])
def test_arithmetic_in_bfloat16_raises(kernel):
    """Instead of working on integers."""
    with pytest.raises(Exception, match="float32 first"):
        kernel[(1,)](torch.randn(16).bfloat16(), torch.zeros(16).bfloat16(), N=16)


def test_read_past_a_tensor_raises():
    """A missing mask is found although the memory behind a tensor can be read."""
    with pytest.raises(Exception, match="outside every tensor"):
        convert_kernel[(1,)](torch.randn(60), torch.zeros(64), 64, BLOCK=64)


def test_write_past_a_tensor_raises():
    """And so is one at the target."""
    with pytest.raises(Exception, match="outside every tensor"):
        convert_kernel[(1,)](torch.randn(64), torch.zeros(60), 64, BLOCK=64)
