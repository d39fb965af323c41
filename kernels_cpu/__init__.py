"""C++ kernels for CPUs: one source, compiled for several ISA levels and chosen at run time.

Where Quire was installed without a C++ compiler, HAVE_NATIVE is False, WHY_NOT_NATIVE says so in
words, and every function raises that as a RuntimeError.
"""

from __future__ import annotations

from quire.kernels_cpu.attention import paged_attention, write_cache
from quire.kernels_cpu.delta_mixer import FusedDelta
from quire.kernels_cpu.elementwise import (
    add_rms_norm,
    gated_activation,
    gelu_and_mul,
    gelu_tanh_and_mul,
    rms_norm,
    rotary,
    silu_and_mul,
)
from quire.kernels_cpu.experts import (
    PackedExpertCodes,
    PackedExpertWeights,
    head_linear,
    pack_experts,
    route_experts,
)
from quire.kernels_cpu.heads import FusedHeads
from quire.kernels_cpu.latent import FusedLatent
from quire.kernels_cpu.layer import FusedMixing, FusedMlp, FusedWholeLayer, LayerChain
from quire.kernels_cpu.linear import PackedWeights, pack_codes, pack_dense, read_memory
from quire.kernels_cpu.mixer import FusedMixer
from quire.kernels_cpu.mixture import FusedMixture
from quire.kernels_cpu.native import (
    HAVE_NATIVE,
    WHY_NOT_NATIVE,
    available_isas,
    isa,
    pin_threads,
    use_isa,
)
from quire.kernels_cpu.quantization import GROUP_SIZES, quantize_int4, quantize_int8
from quire.kernels_cpu.recurrence import (
    causal_conv1d,
    gated_delta_rule,
    selective_scan,
    ssd_scan,
)
from quire.kernels_cpu.step import Pieces, Rounds, Step
from quire.kernels_cpu.vocabulary import (
    logprobs,
    mask_tokens,
    most_likely,
    most_likely_of_any,
    sample,
)

__all__ = [
    "GROUP_SIZES",
    "HAVE_NATIVE",
    "WHY_NOT_NATIVE",
    "FusedDelta",
    "FusedHeads",
    "FusedLatent",
    "FusedMixer",
    "FusedMixing",
    "FusedMixture",
    "FusedMlp",
    "FusedWholeLayer",
    "LayerChain",
    "PackedExpertCodes",
    "PackedExpertWeights",
    "PackedWeights",
    "Pieces",
    "Rounds",
    "Step",
    "add_rms_norm",
    "available_isas",
    "causal_conv1d",
    "gated_activation",
    "gated_delta_rule",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "head_linear",
    "isa",
    "logprobs",
    "mask_tokens",
    "most_likely",
    "most_likely_of_any",
    "pack_codes",
    "pack_dense",
    "pack_experts",
    "paged_attention",
    "pin_threads",
    "quantize_int4",
    "quantize_int8",
    "read_memory",
    "rms_norm",
    "rotary",
    "route_experts",
    "sample",
    "selective_scan",
    "silu_and_mul",
    "ssd_scan",
    "use_isa",
    "write_cache",
]
