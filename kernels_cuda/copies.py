"""Copying the small arrays of a step on the device, all by one launch.

A recording reads fixed addresses, and its arrays are a dozen of a few bytes to some kilobytes. As
copies of torch's each is a launch of its own; Triton takes pointers of one kind for each argument
and compiles anew for another number of them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quire.kernels_cuda.driver import SOURCES, CudaError, Kernel, compile_source

SOURCE = SOURCES / "copy_arrays.cu"
NAME = "copy_arrays"
MAX_ARRAYS = 48
"""Of one launch; `MAX_ARRAYS` of the source."""
_ARRAY = struct.Struct("PPQQII")
"""`Array` of the source."""
_NUM_THREADS = 128
_MAX_SHARES = 64
_SHARE_BYTES = 16 * _NUM_THREADS
"""A share of this size is one word for each thread, at the widest."""
_MOST_BYTES = 1 << 31


class ArrayCopies:
    """Copies pairs of arrays by one launch for each `MAX_ARRAYS` of them."""

    def __init__(self, kernel: Kernel, stream: Callable[[], int]) -> None:
        """`stream` gives the stream that is current, as the driver knows it."""
        self._kernel = kernel
        self._stream = stream
        self._buffer = ctypes.create_string_buffer(_ARRAY.size * MAX_ARRAYS)
        address = ctypes.addressof(self._buffer)
        self._arguments = (ctypes.c_void_p * 1)(address)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copies each (source, target): device tensors of one shape and dtype, overlapping nowhere.

        Mutates the targets. Pairs of other dtypes, and rows that are not dense, are torch's to
        copy. Raises: CudaError.
        """
        num_arrays, most_bytes = 0, 0
        for source, target in pairs:
            num_rows, row_bytes, source_stride, target_stride = _rows(source, target)
            size = num_rows * row_bytes
            if not 0 <= size < _MOST_BYTES:
                target.copy_(source)
                continue
            if size == 0:
                continue
            _ARRAY.pack_into(
                self._buffer,
                num_arrays * _ARRAY.size,
                *(source.data_ptr(), target.data_ptr(), source_stride, target_stride),
                *(num_rows, row_bytes),
            )
            num_arrays, most_bytes = num_arrays + 1, max(most_bytes, size)
            if num_arrays == MAX_ARRAYS:
                self._launch(num_arrays, most_bytes)
                num_arrays, most_bytes = 0, 0
        if num_arrays:
            self._launch(num_arrays, most_bytes)

    def _launch(self, num_arrays: int, most_bytes: int) -> None:
        shares = min(_MAX_SHARES, -(-most_bytes // _SHARE_BYTES))
        self._kernel.launch((shares, num_arrays), _NUM_THREADS, self._arguments, self._stream())


def _rows(source: Tensor, target: Tensor) -> tuple[int, int, int, int]:
    """(rows, bytes of a row, bytes between rows of the source, and of the target).

    Rows are -1 where this is no copy of rows of bytes.
    """
    if source.dtype != target.dtype or source.shape != target.shape:
        return -1, 1, 0, 0
    item = source.element_size()
    if source.is_contiguous() and target.is_contiguous():
        return 1, source.numel() * item, 0, 0
    if source.dim() != 2 or source.stride(1) != 1 or target.stride(1) != 1:
        return -1, 1, 0, 0
    num_rows, width = source.shape
    return num_rows, width * item, source.stride(0) * item, target.stride(0) * item


def open_copies(
    architecture: str,
    device: torch.device,
    stream: Callable[[], int],
    *,
    compiler: ctypes.CDLL,
    driver: ctypes.CDLL,
) -> ArrayCopies:
    """Builds the kernel for `device`, whose context is current, and tries it once.

    Raises: CudaError with the cause, where it cannot be built or copies wrong bytes.
    """
    image = compile_source(compiler, SOURCE, architecture)
    copies = ArrayCopies(Kernel(driver, image, NAME), stream)
    _hold(copies, device)
    return copies


def _hold(copies: ArrayCopies, device: torch.device) -> None:
    """Tables and rows of each width of word, beside what is to stay as it was."""
    sources, targets, wanted = [], [], []
    for dtype, width in ((torch.int64, 6), (torch.int32, 5), (torch.uint8, 7)):
        source = torch.arange(1, 3 * width + 1, dtype=dtype, device=device).view(3, width)
        target = torch.zeros((3, 2 * width), dtype=dtype, device=device)
        sources.append(source)
        targets.append(target)
        wanted.append(torch.cat([source, torch.zeros_like(source)], dim=1))
    parts = [target[:, : source.shape[1]] for source, target in zip(sources, targets, strict=True)]
    copies.copy(list(zip(sources, parts, strict=True)))
    if not all(map(torch.equal, targets, wanted)):
        raise CudaError(f"{SOURCE.name} copied wrong bytes on {device}")
