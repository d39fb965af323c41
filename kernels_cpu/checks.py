"""What the kernels ask of tensors before their addresses are taken.

Nothing here imports torch: a tensor brings its own dtype, shape and strides.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CODES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}


@cache
def dtype_code(dtype: torch.dtype) -> int:
    """The number by which the compiled module knows a dtype. Raises: TypeError."""
    code = _CODES.get(str(dtype))
    if code is None:
        raise TypeError(f"the CPU kernels compute in {', '.join(_CODES)}, not in {dtype}")
    return code


@cache
def _is_named(dtype: torch.dtype, name: str) -> bool:
    return str(dtype) == f"torch.{name}"


def check_dense(name: str, tensor: Tensor, dtype: torch.dtype, ndim: int) -> tuple[int, ...]:
    """A tensor on the CPU, of a dtype, with a dense last dimension; returns its strides."""
    strides = tensor.stride()
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if len(strides) != ndim or not tensor.is_cpu:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} on {tensor.device}: "
            f"expected {ndim} dimensions on the CPU"
        )
    if strides[-1] != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name}: the last dimension is not dense (strides {strides})")
    return strides


def check_list(name: str, tensor: Tensor, dtype: str, size: int | None = None) -> None:
    """A contiguous vector on the CPU, of a dtype and perhaps of a size."""
    if not _is_named(tensor.dtype, dtype):
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.dim() != 1 or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous vector on the CPU")
    if size is not None and tensor.shape[0] != size:
        raise ValueError(f"{name} has {tensor.shape[0]} entries, expected {size}")


def check_table(name: str, tensor: Tensor) -> None:
    """An int32 matrix on the CPU with dense rows."""
    if not _is_named(tensor.dtype, "int32"):
        raise TypeError(f"{name} is {tensor.dtype}, expected int32")
    if tensor.dim() != 2 or not tensor.is_cpu or (tensor.stride(1) != 1 and tensor.shape[1] != 1):
        raise ValueError(f"{name}: expected a matrix with dense rows on the CPU")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises: ValueError if a tensor has another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {shape}")


def check_contiguous(name: str, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> None:
    """A contiguous tensor on the CPU, of a dtype and a shape."""
    if not _is_named(tensor.dtype, dtype):
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"{name} {tuple(tensor.shape)}: expected contiguous {shape} on the CPU")


def check_rotation(cos: Tensor, sin: Tensor, num_tokens: int, head_size: int) -> tuple[int, int]:
    """Cosines and sines float32 [T, F] with 2F <= head_size; returns the strides of their rows."""
    for name, table in (("cos", cos), ("sin", sin)):
        if not _is_named(table.dtype, "float32"):
            raise TypeError(f"{name} is {table.dtype}, expected float32")
        check_dense(name, table, table.dtype, 2)
        check_shape(name, table, (num_tokens, cos.shape[1]))
    if 2 * cos.shape[1] > head_size:
        raise ValueError(f"{cos.shape[1]} pairs do not fit into heads of {head_size} features")
    return cos.stride(0), sin.stride(0)


def address_of(tensor: Tensor | None) -> int:
    """0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
