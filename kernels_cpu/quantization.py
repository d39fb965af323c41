"""The quantizing of weights at load, to the bits that the contract defines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    from torch import Tensor

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu

GROUP_SIZES = (16, 32, 64, 128)
"""Groups of inputs that `quantize_int4` takes."""


def quantize_int8(weight: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Weights of one scale a row: scale = max |w| / 127, code = round(w / scale) + 128.

    weight [N, K] in float32, bfloat16 or float16 with dense rows; codes uint8 [N, K] and scales
    float32 [N, 1], contiguous, are written. Raises: ValueError, TypeError.
    Source: Dettmers et al. 2022, section 2.
    """
    native.require_native()
    num_outputs, num_inputs = weight.shape
    stride = checks.check_dense("weight", weight, weight.dtype, 2)[0]
    checks.check_contiguous("codes", codes, "uint8", (num_outputs, num_inputs))
    checks.check_contiguous("scales", scales, "float32", (num_outputs, 1))
    _cpu.quantize(
        8,
        checks.dtype_code(weight.dtype),
        weight.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        0,
        num_outputs,
        num_inputs,
        stride,
        0,
    )


def quantize_int4(
    weight: Tensor, group_size: int, codes: Tensor, scales: Tensor, zeros: Tensor
) -> None:
    """Weights of one scale and zero for each row and group of inputs, as `Ops.quantize_linear`.

    weight [N, K] in float32, bfloat16 or float16 with dense rows. Written, contiguous: codes uint8
    [N, K / 2], input 2j in the low half of byte j; scales bfloat16 and zeros uint8 [N, G]. The same
    bits at every ISA level and with any number of threads. Raises: ValueError, TypeError.
    """
    native.require_native()
    num_outputs, num_inputs = weight.shape
    if group_size not in GROUP_SIZES or num_inputs % group_size:
        raise ValueError(
            f"groups of {group_size} for {num_inputs} inputs: give one of "
            f"{', '.join(map(str, GROUP_SIZES))} that divides them"
        )
    stride = checks.check_dense("weight", weight, weight.dtype, 2)[0]
    table = (num_outputs, num_inputs // group_size)
    checks.check_contiguous("codes", codes, "uint8", (num_outputs, num_inputs // 2))
    checks.check_contiguous("scales", scales, "bfloat16", table)
    checks.check_contiguous("zeros", zeros, "uint8", table)
    _cpu.quantize(
        4,
        checks.dtype_code(weight.dtype),
        weight.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        num_outputs,
        num_inputs,
        stride,
        group_size,
    )
