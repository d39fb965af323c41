"""Repairs Triton's interpreter, for tests: on its own it is wrong about 8 and 16 bits, silently.

Of Triton 3.6 to 3.9 (upstream does not support bfloat16 there): `tl.dot` multiplies bit patterns of
bfloat16, a cast to bfloat16 truncates, casts to 8-bit floats round some values wrongly, and
arithmetic in bfloat16 is arithmetic on integers. `install` repairs the dot and the casts, bit for
bit as torch has them, makes the arithmetic raise, switches `tl.device_assert` on, takes masks in
which a scalar has a say, and holds every access to the memory of the tensors that the launch was
given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.kernels_triton import interpreter_speed

Array = npt.NDArray[Any]

_MARK = "_quire_repairs"
_NOT_A_NUMBER = np.uint16(0x7FC0)


def is_interpreting() -> bool:
    """Whether kernels that are defined now are interpreted."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def install() -> None:
    """Repairs the interpreter of this process. Calling it again changes nothing."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, _MARK):
        return
    setattr(builder, _MARK, True)
    shared = interpreter.interpreter_builder
    shared.options = dataclasses.replace(shared.options, debug=True)
    interpreter_speed.install(interpreter)
    _repair_dot(interpreter, builder)
    _repair_casts(interpreter, builder)
    _forbid_arithmetic(interpreter, builder)
    _watch_memory(interpreter, builder)


def widen(bits: Array) -> Array:
    """float32 numbers of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: Array) -> Array:
    """uint16 bit patterns of float32 numbers, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), _NOT_A_NUMBER, rounded)


def _is_bfloat16(handle: Any) -> bool:
    import triton.language as tl

    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(interpreter: Any, handle: Any) -> Any:
    import triton.language as tl

    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(widen(handle.data), tl.float32)


def _repair_dot(interpreter: Any, builder: Any) -> None:
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
        wide = (_widened(interpreter, a), _widened(interpreter, b))
        return multiply(self, *wide, *rest, **named)

    builder.create_dot = create_dot


def _eight_bit_dtypes() -> dict[Any, Any]:
    import torch
    import triton.language as tl

    return {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.float8e4b8: torch.float8_e4m3fnuz,
        tl.float8e5b16: torch.float8_e5m2fnuz,
    }


def _repair_casts(interpreter: Any, builder: Any) -> None:
    import torch
    import triton.language as tl

    handle, eight_bit = interpreter.TensorHandle, _eight_bit_dtypes()
    cast, cast_floats = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        begin, end = source.dtype.scalar, target.scalar
        if begin == tl.bfloat16 and end != tl.bfloat16:
            source = _widened(interpreter, source)
            return source if end == tl.float32 else cast(self, source, target)
        if end == tl.bfloat16 and begin != tl.bfloat16:
            return handle(round_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        begin, end = source.dtype.scalar, target.scalar
        if end in eight_bit and begin not in eight_bit:
            wide = np.ascontiguousarray(_widened(interpreter, source).data.astype(np.float32))
            narrow = torch.from_numpy(wide).to(eight_bit[end])
            return handle(narrow.view(torch.uint8).numpy(), end)
        if begin in eight_bit and end not in eight_bit:
            bits = torch.from_numpy(np.ascontiguousarray(source.data.view(np.uint8)))
            wide = handle(bits.view(eight_bit[begin]).float().numpy(), tl.float32)
            return wide if end == tl.float32 else self.cast_impl(wide, target)
        if tl.bfloat16 in {begin, end}:
            return self.cast_impl(source, target)
        return cast_floats(self, source, target, rounding)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp


def _forbid_arithmetic(interpreter: Any, builder: Any) -> None:
    compute = builder.binary_op

    def binary_op(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if _is_bfloat16(a) or _is_bfloat16(b):
            raise TypeError("the interpreter has no bfloat16 arithmetic: cast to tl.float32 first")
        return compute(self, a, b, operation)

    builder.binary_op = binary_op
    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply = _without_bfloat16(kind.apply)


def _without_bfloat16(reduce: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, values: Any) -> Any:
        for value in values if isinstance(values, tuple) else (values,):
            if _is_bfloat16(value):
                raise TypeError("the interpreter cannot reduce bfloat16: cast to tl.float32 first")
        return reduce(self, values)

    return apply


class _Memory:
    """Where the tensors of the running launch lie."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        self._ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    @contextmanager
    def launch(self) -> Iterator[None]:
        before = list(self._ranges)
        try:
            yield
        finally:
            self._ranges = before

    def check(self, pointer: Any, mask: Any, what: str) -> None:
        addresses = pointer.data
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        if addresses.size == 0:
            return
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        low, high = int(addresses.min()), int(addresses.max()) + size
        if any(begin <= low and high <= end for begin, end in self._ranges):
            return
        addresses, size = np.unique(addresses.astype(np.uint64)), np.uint64(size)
        inside = np.zeros(addresses.shape, bool)
        for begin, end in self._ranges:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            raise IndexError(
                f"{what}: {int((~inside).sum())} of {inside.size} addresses lie outside every "
                "tensor of this launch; is a mask missing?"
            )


def _watch_memory(interpreter: Any, builder: Any) -> None:
    memory = _Memory()
    convert, run = interpreter._implicit_cvt, interpreter.GridExecutor.__call__  # noqa: SLF001

    def watch(argument: Any) -> Any:
        if hasattr(argument, "untyped_storage"):
            memory.add(argument)
        return convert(argument)

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        # A device overflows to infinity and says nothing.
        with memory.launch(), np.errstate(all="ignore"):
            return run(self, *arguments, **named)

    interpreter._implicit_cvt = watch  # noqa: SLF001
    interpreter.GridExecutor.__call__ = launch
    for name, pointer, mask in (
        ("create_masked_load", 0, 1),
        ("create_masked_store", 0, 2),
        ("create_atomic_rmw", 1, 3),
    ):
        setattr(builder, name, _checked(memory, getattr(builder, name), name, pointer, mask))


def _checked(
    memory: _Memory, access: Callable[..., Any], what: str, pointer: int, mask: int
) -> Callable[..., Any]:
    def checked(self: Any, *arguments: Any, **named: Any) -> Any:
        allowed = arguments[mask]
        if allowed is not None and allowed.data.dtype != np.bool_:
            # A comparison of scalars among the conditions leaves the mask in whole numbers.
            allowed = dataclasses.replace(allowed, data=allowed.data.astype(bool))
            arguments = (*arguments[:mask], allowed, *arguments[mask + 1 :])
        memory.check(arguments[pointer], allowed, what)
        return access(self, *arguments, **named)

    return checked
