"""Linear layers: weights packed once for the vector units, products with any number of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    import torch
    from torch import Tensor

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu

_U8, _U4 = 3, 4
_ROUNDINGS = {"none": 0, "token": 1, "group": 2}
_WORDS_OF_READ = 64
GROUP_STEP = 16
"""Groups of inputs are multiples of this."""


class PackedWeights:
    """The weights of one linear layer, [N, K], in the order in which the kernels read them.

    The order is the same at every ISA level. Immutable; safe to use from several threads.
    """

    __slots__ = ("_kept", "handle", "num_inputs", "num_outputs", "size_bytes")

    def __init__(
        self,
        format_code: int,
        values: Tensor,
        num_inputs: int,
        bias: Tensor | None,
        *,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        rounding: str = "none",
        group_size: int = 0,
        zero: int = 0,
    ) -> None:
        self.num_outputs = values.shape[0]
        self.num_inputs = num_inputs
        values = values.contiguous()
        lanes = values.new_empty(
            (_cpu.num_lanes(format_code, self.num_outputs, num_inputs) * 4,), dtype=_uint8(values)
        )
        row_bytes = values.shape[1] * values.element_size()
        _cpu.pack_lanes(
            format_code,
            values.data_ptr(),
            row_bytes,
            self.num_outputs,
            num_inputs,
            lanes.data_ptr(),
        )
        # The handle holds addresses: these keep what lies there alive.
        kept = (lanes, _panels(scales), _panels(zeros), _padded(bias))
        self._kept = kept
        self.size_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)
        self.handle = _cpu.Linear(
            format_code,
            _ROUNDINGS[rounding],
            lanes.data_ptr(),
            0 if scales is None else checks.dtype_code(scales.dtype),
            checks.address_of(kept[1]),
            checks.address_of(kept[2]),
            checks.address_of(kept[3]),
            self.num_outputs,
            num_inputs,
            group_size,
            zero,
        )

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """out = x @ weight.T + bias, summed in float32 (or exactly, in integers) and rounded once.

        x [T, K], out [T, N]: float32, bfloat16 or float16, one dtype, on the CPU, rows dense. A
        row's result is bitwise the same whoever is in the batch and with any number of threads.
        Raises: ValueError, TypeError for arguments that do not fit.
        """
        dtype = x.dtype
        x_stride = checks.check_dense("x", x, dtype, 2)[0]
        out_stride = checks.check_dense("out", out, dtype, 2)[0]
        num_rows, num_inputs = x.shape
        if num_inputs != self.num_inputs:
            raise ValueError(f"x has {num_inputs} inputs for weights with {self.num_inputs}")
        checks.check_shape("out", out, (num_rows, self.num_outputs))
        self.handle.multiply(
            checks.dtype_code(dtype), x.data_ptr(), out.data_ptr(), num_rows, x_stride, out_stride
        )


def pack_dense(weight: Tensor, bias: Tensor | None) -> PackedWeights:
    """Weights [N, K] in float32, bfloat16 or float16, kept in that dtype; bias [N] or None.

    Products widen them in registers, or use the unit's own products of bfloat16.
    Raises: ValueError, TypeError.
    """
    native.require_native()
    checks.check_dense("weight", weight, weight.dtype, 2)
    _check_bias(bias, weight.shape[0])
    return PackedWeights(checks.dtype_code(weight.dtype), weight, weight.shape[1], bias)


def pack_codes(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    num_inputs: int,
    group_size: int,
    activations: str,
) -> PackedWeights:
    """Weights that are (code - zero) * scale, one scale and zero for each output and group.

    codes uint8: [N, K] for 8 bits; [N, ceil(K / 2)] for 4, input 2j in the low half of byte j.
    scales [N, G] in float32, bfloat16 or float16, zeros uint8 [N, G]; None: all 2^(bits - 1).
    group_size 0: one group, G = 1. `activations` none: they stay as they are; token, group: rounded
    to int8 with one scale a row, or a row and group: q = round(x / s), s = max |x| / 127.
    Raises: ValueError, TypeError.
    """
    native.require_native()
    for name, tensor in (("codes", codes), ("zeros", zeros)):
        if tensor is not None:
            checks.check_dense(name, tensor, _uint8(codes), 2)
    checks.check_dense("scales", scales, scales.dtype, 2)
    num_outputs = codes.shape[0]
    num_groups = _num_groups(num_inputs, group_size)
    checks.check_shape("codes", codes, (num_outputs, _row_bytes(num_inputs, bits)))
    checks.check_shape("scales", scales, (num_outputs, num_groups))
    if zeros is not None:
        checks.check_shape("zeros", zeros, (num_outputs, num_groups))
    if activations not in _ROUNDINGS:
        raise ValueError(f"activations {activations!r}; there are {', '.join(_ROUNDINGS)}")
    _check_bias(bias, num_outputs)
    return PackedWeights(
        _U8 if bits == 8 else _U4,
        codes,
        num_inputs,
        bias,
        scales=scales,
        zeros=zeros,
        rounding=activations,
        group_size=group_size,
        zero=1 << (bits - 1),
    )


def read_memory(memory: Tensor) -> int:
    """The sum of a contiguous int64 vector, wrapped at 64 bits; its length a multiple of 64.

    All threads read, each a part of its own from front to back: what reading weights cannot beat.
    Raises: ValueError, TypeError.
    """
    native.require_native()
    checks.check_list("memory", memory, "int64")
    if memory.shape[0] % _WORDS_OF_READ:
        raise ValueError(f"memory has {memory.shape[0]} words, not a multiple of {_WORDS_OF_READ}")
    return _cpu.read_memory(memory.data_ptr(), memory.shape[0])


def _row_bytes(num_inputs: int, bits: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits; there are 4 and 8")
    return num_inputs if bits == 8 else (num_inputs + 1) // 2


def _num_groups(num_inputs: int, group_size: int) -> int:
    if group_size == 0:
        return 1
    if group_size < 0 or group_size % GROUP_STEP or num_inputs % group_size:
        raise ValueError(
            f"groups of {group_size} for {num_inputs} inputs: a group is a multiple of "
            f"{GROUP_STEP} that divides them, or 0 for the whole row"
        )
    return num_inputs // group_size


def _check_bias(bias: Tensor | None, num_outputs: int) -> None:
    if bias is not None:
        checks.check_dense("bias", bias, bias.dtype, 1)
        checks.check_shape("bias", bias, (num_outputs,))


def _panels(table: Tensor | None) -> Tensor | None:
    """[N, G] as [panels, G, 64], zeros at the end."""
    if table is None:
        return None
    num_outputs, num_groups = table.shape
    padded = table.new_zeros((-(-num_outputs // 64) * 64, num_groups))
    padded[:num_outputs] = table
    return padded.view(-1, 64, num_groups).transpose(1, 2).contiguous()


def _padded(bias: Tensor | None) -> Tensor | None:
    """[N] as float32 with zeros up to whole panels."""
    if bias is None:
        return None
    padded = bias.new_zeros((-(-bias.shape[0] // 64) * 64,)).float()
    padded[: bias.shape[0]] = bias
    return padded


def _uint8(like: Tensor) -> torch.dtype:
    """torch.uint8, without importing torch here."""
    return like.new_empty(0).byte().dtype
