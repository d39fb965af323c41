"""Linear layers by the compiled kernels: which layers they take, and how they are packed.

`benchmarks/cpu_linear.py` measures what decides here:

- int8, int4: the kernels. No operator of torch rounds activations by the token.
- bfloat16: the kernels, which are as fast as oneDNN with many rows and faster with few, and without
  instructions for bfloat16 several times as fast; but oneDNN where the CPU has AMX.
- float16: the kernels. oneDNN widens it to twice the memory, but where the CPU multiplies it.
- float32: oneDNN, which is faster with many rows.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu.host import CpuFacts
from quire.core.interface import PackedLinear, QuantizedWeight
from quire.kernels_cpu import PackedWeights

_GROUP_STEP = 16
_LEAST_MAPPED_BYTES = 2**20
"""Codes of fewer bytes are left to the allocator."""
_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def takes_dense(dtype: torch.dtype, cpu: CpuFacts) -> bool:
    """Whether the kernels, not oneDNN, multiply by unquantized weights of a dtype here."""
    if not kernels_cpu.HAVE_NATIVE:
        return False
    if dtype == torch.bfloat16:
        return "amx_bf16" not in cpu.flags
    return dtype == torch.float16 and "avx512_fp16" not in cpu.flags


def takes_quantized(weight: QuantizedWeight) -> bool:
    """Whether the kernels take the codes and the groups of a quantized layer."""
    is_whole = weight.encoding == "integer"
    return kernels_cpu.HAVE_NATIVE and is_whole and weight.group_size % _GROUP_STEP == 0


def pack_dense(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Weights [N, K], kept in their dtype."""
    dtype = str(weight.dtype).removeprefix("torch.")
    packed = kernels_cpu.pack_dense(weight, bias)
    return _described(packed, dtype, f"native-{dtype}")


def pack_quantized(weight: QuantizedWeight, bias: Tensor | None, dtype: str) -> PackedLinear:
    """A linear layer of codes."""
    return _described(pack_codes(weight, bias), dtype, name_of_codes(weight))


def pack_codes(weight: QuantizedWeight, bias: Tensor | None) -> PackedWeights:
    """Codes, scales and zeros in the order of the kernels."""
    return kernels_cpu.pack_codes(
        weight.codes,
        weight.scales,
        weight.zeros,
        bias,
        bits=weight.bits,
        num_inputs=weight.num_inputs,
        group_size=weight.group_size,
        activations=weight.activations,
    )


def name_of_codes(weight: QuantizedWeight) -> str:
    """How they are kept, for `quire plan`."""
    groups = f"-g{weight.group_size}" if weight.group_size else ""
    rounded = "" if weight.activations == "none" else f"-int8-by-{weight.activations}"
    return f"native-int{weight.bits}{groups}{rounded}"


def quantize(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight | None:
    """`Ops.quantize_linear`; None: no kernel takes it."""
    num_outputs, num_inputs = weight.shape
    is_grouped = bits == 4 and group_size in kernels_cpu.GROUP_SIZES
    is_whole = bits == 8 and group_size == 0
    if not (kernels_cpu.HAVE_NATIVE and weight.dtype in _FLOATS and (is_grouped or is_whole)):
        return None
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    codes = _passing_codes((num_outputs, num_inputs * bits // 8))
    if is_whole:
        scales, zeros = torch.empty((num_outputs, 1), dtype=torch.float32), None
        kernels_cpu.quantize_int8(weight, codes, scales)
    else:
        table = (num_outputs, num_inputs // group_size)
        scales = torch.empty(table, dtype=torch.bfloat16)
        zeros = torch.empty(table, dtype=torch.uint8)
        kernels_cpu.quantize_int4(weight, group_size, codes, scales, zeros)
    return QuantizedWeight(
        bits=bits,
        group_size=group_size,
        num_inputs=num_inputs,
        codes=codes,
        scales=scales,
        zeros=zeros,
        activations="token" if is_whole else "group",
        scheme=f"int{bits}",
    )


def _passing_codes(shape: tuple[int, int]) -> Tensor:
    """Memory uint8 that goes back to the system when the codes are packed.

    The heap would keep it: packed weights fill what codes leave there in part, and the next codes,
    of another size, find no room. Of 8 bits that was a tenth of a model.
    """
    num_bytes = math.prod(shape)
    if num_bytes < _LEAST_MAPPED_BYTES:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8).view(shape)


def multiply(x: Tensor, packed: PackedWeights) -> Tensor:
    """x @ weight.T + bias, for x [T, K]."""
    out = x.new_empty((x.shape[0], packed.num_outputs))
    packed.multiply(x, out)
    return out


def _described(packed: PackedWeights, dtype: str, name: str) -> PackedLinear:
    return PackedLinear(
        num_inputs=packed.num_inputs,
        num_outputs=packed.num_outputs,
        dtype=dtype,
        format=name,
        size_bytes=packed.size_bytes,
        payload=packed,
    )
