"""The repairs of the interpreter, each against torch."""

from __future__ import annotations

import subprocess
import sys

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


@triton.jit
def scan_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))


@triton.jit
def gather_kernel(x_ptr, ids_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + tl.load(ids_ptr + i)))


@triton.jit
def sequence_kernel(x_ptr, slots_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    mask = (i < N // 2)[:, None] & (tl.load(slots_ptr) >= 0)
    x = tl.load(x_ptr + i[:, None], mask=mask, other=7.0)
    tl.store(y_ptr + i[:, None], x, mask=mask | (i < N // 2)[:, None])


@triton.jit
def count_kernel(x_ptr, ids_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(x_ptr + tl.load(ids_ptr + i), 1)


@triton.jit
def assert_kernel(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.device_assert(x < 3, "three and more")


@triton.jit
def integers_kernel(x_ptr, y_ptr, KIND: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if KIND == "add":
        z = x + y
    elif KIND == "sub":
        z = x - y
    else:
        z = x * y
    tl.store(y_ptr + i, z)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz),
        *(torch.float8_e5m2, torch.float8_e5m2fnuz),
    ],
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2])
def test_cast_from_8_bit_floats_keeps_every_value(dtype):
    """All 256 patterns widen to what torch has, NaN among them."""
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    y = torch.zeros(256)
    convert_kernel[(1,)](x, y, 256, BLOCK=256)
    assert torch.equal(y.nan_to_num(nan=7e7), x.float().nan_to_num(nan=7e7))


@pytest.mark.parametrize("kernel", [add_kernel, sum_kernel, scan_kernel])
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


@pytest.mark.parametrize("number", [-1, 16, 10**6])
def test_gather_from_outside_a_tensor_raises(number):
    """Before it, just behind it, and in other memory of the process."""
    ids = torch.arange(16)
    ids[7] = number
    with pytest.raises(Exception, match="1 of 16 addresses lie outside every tensor"):
        gather_kernel[(1,)](torch.randn(16), ids, torch.zeros(16), N=16)


def test_read_of_a_tensor_that_the_launch_was_not_given_raises():
    """Memory of another launch is not this one's, though it is there."""
    x, other, y = torch.randn(16), torch.randn(16), torch.zeros(16)
    ids = torch.arange(16)
    gather_kernel[(1,)](other, ids, y, N=16)
    ids[0] = (other.data_ptr() - x.data_ptr()) // 4
    with pytest.raises(Exception, match="outside every tensor"):
        gather_kernel[(1,)](x, ids, y, N=16)


def test_part_of_a_tensor_may_be_read_around():
    """What holds is the storage: kernels take views and reach their neighbours by strides."""
    whole, y = torch.randn(16), torch.zeros(16)
    gather_kernel[(1,)](whole[8:], torch.arange(16) - 8, y, N=16)
    assert torch.equal(y, whole)


@pytest.mark.parametrize("slot", [-1, 0])
def test_scalar_has_a_say_in_a_mask(slot):
    """Half of the block is looked at, and only where the slot is one."""
    y = torch.zeros(16)
    sequence_kernel[(1,)](torch.arange(8.0), torch.tensor([slot]), y, N=16)
    assert y[:8].tolist() == ([7.0] * 8 if slot < 0 else list(range(8)))
    assert not y[8:].any()


def test_atomic_outside_a_tensor_raises():
    """Atomics are held like stores."""
    count_kernel[(1,)](counts := torch.zeros(4, dtype=torch.int32), torch.zeros(16).long(), N=16)
    assert counts.tolist() == [16, 0, 0, 0]
    with pytest.raises(Exception, match="outside every tensor"):
        count_kernel[(1,)](torch.zeros(4, dtype=torch.int32), torch.arange(16), N=16)


def test_device_assert_is_heard():
    """Triton ignores it where nobody debugs."""
    assert_kernel[(1,)](torch.tensor([1, 2]), N=2)
    with pytest.raises(Exception, match="three and more"):
        assert_kernel[(1,)](torch.tensor([1, 3]), N=2)


@pytest.mark.parametrize(
    ("kind", "too_far", "fits", "y", "want"),
    [
        ("add", 2**31 - 1, 2**31 - 2, 1, 2**31 - 1),
        ("sub", -(2**31), -(2**31) + 1, 1, -(2**31)),
        ("mul", 2**16, 2**16 - 1, 2**15, (2**16 - 1) * 2**15),
    ],
)
def test_overflow_of_integers_raises_and_its_border_does_not(kind, too_far, fits, y, want):
    """An offset in 32 bits that is too large would read elsewhere; 64 bits hold it."""
    out = torch.tensor([1, y])
    integers_kernel[(1,)](torch.tensor([1, too_far]), out, KIND=kind, N=2)
    assert abs(int(out[1])) >= 2**31
    out = torch.tensor([1, y], dtype=torch.int32)
    integers_kernel[(1,)](torch.tensor([1, fits], dtype=torch.int32), out, KIND=kind, N=2)
    assert int(out[1]) == want
    out = torch.tensor([1, y], dtype=torch.int32)
    with pytest.raises(Exception, match=f"int32 overflows in {kind}"):
        integers_kernel[(1,)](torch.tensor([1, too_far], dtype=torch.int32), out, KIND=kind, N=2)


STOCK = """
import torch, triton, triton.language as tl
@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    tl.store(c_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))
a, c = torch.eye(16).bfloat16(), torch.zeros(16, 16)
try:
    dot_kernel[(1,)](a, a, c, N=16)
except Exception:
    c += 1e9
print("wrong" if (c - torch.eye(16)).abs().max() > 0.5 else "right")
"""


def test_interpreter_without_repairs_is_still_wrong(tmp_path):
    """The day this fails, Triton has learnt bfloat16 and the repair can go."""
    file = tmp_path / "stock.py"
    file.write_text(STOCK)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "wrong", done.stderr[-2000:]
