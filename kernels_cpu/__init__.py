"""C++ kernels for CPUs: one source, compiled for several ISA levels and chosen at run time.

Where Quire was installed without a C++ compiler, HAVE_NATIVE is False, WHY_NOT_NATIVE says so in
words, and every function raises that as a RuntimeError.
"""

from __future__ import annotations

from quire.kernels_cpu.attention import paged_attention, write_cache
from quire.kernels_cpu.elementwise import (
    add_rms_norm,
    gated_activation,
    gelu_and_mul,
    gelu_tanh_and_mul,
    rms_norm,
    rotary,
    silu_and_mul,
)
from quire.kernels_cpu.linear import PackedWeights, pack_codes, pack_dense
from quire.kernels_cpu.native import (
    HAVE_NATIVE,
    WHY_NOT_NATIVE,
    available_isas,
    isa,
    use_isa,
)

__all__ = [
    "HAVE_NATIVE",
    "WHY_NOT_NATIVE",
    "PackedWeights",
    "add_rms_norm",
    "available_isas",
    "gated_activation",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "isa",
    "pack_codes",
    "pack_dense",
    "paged_attention",
    "rms_norm",
    "rotary",
    "silu_and_mul",
    "use_isa",
    "write_cache",
]
