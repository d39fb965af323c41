"""The operators of a CPU: oneDNN, the compiled kernels, and the reference for what is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu import (
    fused_layer,
    fused_mixer,
    linear,
    native_layers,
    native_linear,
    sampling,
)
from quire.backends.cpu.host import read_cpu
from quire.backends.reference import ReferenceOps
from quire.backends.reference.sampling import draw
from quire.core.interface import (
    AttentionBackend,
    DeltaMixerParts,
    DeviceError,
    ExpertWeights,
    FusedLayer,
    FusedLayers,
    FusedMixer,
    LayerParts,
    MixerParts,
    MixingPlace,
    PackedExperts,
    PackedLinear,
    QuantizedExperts,
    QuantizedWeight,
    RoutingSpec,
    SampledLogprobs,
    SamplingTensors,
    Sequences,
)

_NATIVE_OPS = frozenset(
    {
        "rms_norm",
        "add_rms_norm",
        "gated_activation",
        "rotary",
        "route_experts",
        "experts",
        "head_linear",
        "causal_conv1d",
        "selective_scan",
        "ssd_scan",
        "gated_delta_rule",
        "apply_token_mask",
        "sample",
        "logprobs",
    }
)
_NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_SHORTCUTS = frozenset({"sample", "logprobs"})


class CpuOps(ReferenceOps):
    """What a CPU does better than the reference; whatever a kernel does not take goes there."""

    def __init__(self, *, is_deterministic: bool = False) -> None:
        self._is_deterministic = is_deterministic
        self._has_native = kernels_cpu.HAVE_NATIVE
        self._cpu = read_cpu()

    def provider(self, op: str) -> str:
        if op == "linear":
            return self._linear_provider()
        if op == "pack_quantized_linear" and self._has_native:
            return f"native:{kernels_cpu.isa()}"
        if op in _NATIVE_OPS and self._has_native:
            return f"native:{kernels_cpu.isa()}"
        return "cpu" if op in _SHORTCUTS else super().provider(op)

    # --- layers ---------------------------------------------------------------------------------

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        if native_linear.takes_dense(weight.dtype, self._cpu):
            return native_linear.pack_dense(weight, bias)
        packed = linear.pack(weight, bias)
        if self._is_deterministic and (packed is None or linear.is_variant(packed)):
            # Slower than oneDNN with many rows, and the same whatever their number.
            return native_linear.pack_dense(weight, bias)
        return packed or super().pack_linear(weight, bias)

    def pack_router(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        # A few microseconds where oneDNN takes tens, and as fast with many rows.
        if not self._has_native or weight.dtype != torch.float32:
            return self.pack_linear(weight, bias)
        return native_linear.pack_dense(weight, bias)

    def pack_quantized_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: str
    ) -> PackedLinear:
        if native_linear.takes_quantized(weight):
            return native_linear.pack_quantized(weight, bias, dtype)
        if self._is_deterministic:
            raise DeviceError(
                f"deterministic was asked for, but groups of {weight.group_size} inputs are "
                "multiplied by plain torch; use groups of a multiple of 16, or leave it out"
            )
        return super().pack_quantized_linear(weight, bias, dtype)

    def quantize_linear(self, weight: Tensor, bits: int, group_size: int) -> QuantizedWeight | None:
        return native_linear.quantize(weight, bits, group_size)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        payload = packed.payload
        if isinstance(payload, kernels_cpu.PackedWeights):
            return native_linear.multiply(x, payload)
        if isinstance(payload, linear.OneDnnWeights):
            return linear.multiply(x, payload)
        return super().linear(x, packed)

    def _linear_provider(self) -> str:
        """Who multiplies, dtype by dtype where they differ."""
        wide = "onednn" if linear.can_prepack(torch.float32) else "reference"
        native = [
            name
            for name in ("bfloat16", "float16")
            if native_linear.takes_dense(getattr(torch, name), self._cpu)
        ]
        if not native:
            return wide
        return f"native:{kernels_cpu.isa()} ({', '.join(native)}), {wide} (others)"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not self._is_served(x, weight):
            return super().rms_norm(x, weight, eps)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        width = x.shape[-1]
        kernels_cpu.rms_norm(x.reshape(-1, width), weight, eps, out.view(-1, width))
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not self._is_served(x, weight) or residual.dtype != x.dtype:
            return super().add_rms_norm(x, residual, weight, eps)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels_cpu.add_rms_norm(x, residual, weight, eps, out)
        return out

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        if not self._has_native or x.dtype not in _NATIVE_DTYPES:
            return super().gated_activation(x, kind)
        out = x.new_empty((x.shape[0], x.shape[1] // 2))
        kernels_cpu.gated_activation(x, kind, out)
        return out

    def rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool
    ) -> None:
        if self._has_native and q.dtype in _NATIVE_DTYPES:
            kernels_cpu.rotary(q, k, cos, sin, is_interleaved=is_interleaved)
        else:
            super().rotary(q, k, cos, sin, is_interleaved=is_interleaved)

    def fuse_layer(
        self, parts: LayerParts, attention: AttentionBackend | None
    ) -> FusedLayer | None:
        # A subclass may compute an operator in its own way.
        if type(self) is not CpuOps or not self._has_native:
            return None
        return fused_layer.fuse(parts, attention)

    def chain_layers(
        self, layers: Sequence[FusedLayer], places: Sequence[Sequence[MixingPlace]]
    ) -> FusedLayers | None:
        return fused_layer.chain(layers, places)

    def fuse_mixer(self, parts: MixerParts) -> FusedMixer | None:
        if type(self) is not CpuOps or not self._has_native:
            return None
        return fused_mixer.fuse(parts)

    def fuse_delta_mixer(self, parts: DeltaMixerParts) -> FusedMixer | None:
        if type(self) is not CpuOps or not self._has_native:
            return None
        return fused_mixer.fuse_delta(parts)

    def _is_served(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the compiled norms take these dtypes."""
        return self._has_native and x.dtype in _NATIVE_DTYPES and weight.dtype == x.dtype

    # --- experts and recurrence -----------------------------------------------------------------

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if not native_layers.takes(x) or weight.dtype != x.dtype:
            return super().head_linear(x, weight)
        return native_layers.head_linear(x, weight)

    def route_experts(
        self, logits: Tensor, spec: RoutingSpec, correction_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not native_layers.takes(logits) or spec.score not in ("softmax", "sigmoid"):
            return super().route_experts(logits, spec, correction_bias)
        return native_layers.route(logits, spec, correction_bias)

    def pack_experts(self, weights: ExpertWeights) -> PackedExperts:
        if not native_layers.takes(weights.gate_up, weights.down):
            return super().pack_experts(weights)
        return native_layers.pack_experts(weights)

    def pack_quantized_experts(self, weights: QuantizedExperts, dtype: str) -> PackedExperts:
        if not all(map(native_linear.takes_quantized, (*weights.gate_up, *weights.down))):
            return super().pack_quantized_experts(weights, dtype)
        return native_layers.pack_quantized_experts(weights, dtype)

    def experts(
        self,
        x: Tensor,
        packed: PackedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        *,
        weighs_input: bool = False,
    ) -> Tensor:
        payload = packed.payload
        if not isinstance(payload, kernels_cpu.PackedExpertWeights | kernels_cpu.PackedExpertCodes):
            return super().experts(x, packed, weights, expert_ids, weighs_input=weighs_input)
        return native_layers.experts(x, payload, weights, expert_ids, weighs_input=weighs_input)

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        sequences: Sequences,
        *,
        activation: str = "",
    ) -> Tensor:
        operands = [t for t in (x, weight, bias, states) if t is not None]
        is_uniform = len({t.dtype for t in operands}) == 1
        if not (native_layers.takes(x) and is_uniform and activation in ("", "silu")):
            return super().causal_conv1d(x, weight, bias, states, sequences, activation=activation)
        return native_layers.causal_conv1d(
            x, weight, bias, states, sequences, activation=activation
        )

    def selective_scan(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        states: Tensor,
        sequences: Sequences,
    ) -> Tensor:
        is_native = native_layers.takes(x, b, c) and _are_wide(dt, a, d, states)
        serve = native_layers.selective_scan if is_native else super().selective_scan
        return serve(x, dt, a, b, c, d, states, sequences)

    def ssd_scan(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        states: Tensor,
        sequences: Sequences,
    ) -> Tensor:
        is_native = native_layers.takes(x, b, c) and _are_wide(dt, a, d, states)
        serve = native_layers.ssd_scan if is_native else super().ssd_scan
        return serve(x, dt, a, b, c, d, states, sequences)

    def gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor,
        states: Tensor,
        sequences: Sequences,
    ) -> Tensor:
        is_native = native_layers.takes(q, k, v) and _are_wide(decay, beta, states)
        serve = native_layers.gated_delta_rule if is_native else super().gated_delta_rule
        return serve(q, k, v, decay, beta, states, sequences)

    # --- logits ---------------------------------------------------------------------------------

    def apply_token_mask(self, logits: Tensor, rows: Tensor, mask: Tensor) -> None:
        if self._has_native and logits.dtype == torch.float32 and logits.stride(-1) == 1:
            kernels_cpu.mask_tokens(logits, rows.contiguous(), mask)
        else:
            super().apply_token_mask(logits, rows, mask)

    def most_likely(self, logits: Tensor, out: Tensor, is_broken: Tensor) -> bool:
        if not self._has_native or logits.stride(-1) != 1 or not logits.numel():
            return False
        kernels_cpu.most_likely_of_any(logits, out, is_broken)
        return True

    def sample(self, logits: Tensor, settings: SamplingTensors) -> Tensor:
        if not self._takes_logits(logits):
            return self._sample_in_torch(logits, settings)
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        if settings.is_all_greedy:
            kernels_cpu.most_likely(logits, out)
            return out
        kernels_cpu.sample(
            logits,
            settings.temperature.contiguous(),
            settings.top_k.contiguous(),
            settings.top_p.contiguous(),
            settings.min_p.contiguous(),
            settings.uniform.contiguous(),
            out,
            needs_filter=settings.needs_filter,
        )
        return out

    def _takes_logits(self, logits: Tensor) -> bool:
        """Whether the compiled kernels take these logits [R, V]."""
        is_float = logits.dtype == torch.float32 and logits.stride(-1) == 1
        return self._has_native and is_float and logits.shape[-1] > 0

    def _sample_in_torch(self, logits: Tensor, settings: SamplingTensors) -> Tensor:
        if settings.is_all_greedy:
            return sampling.most_likely(logits)
        is_greedy = settings.temperature == 0
        greedy = sampling.most_likely(logits) if is_greedy.any() else None
        temperature = settings.temperature.masked_fill(is_greedy, 1.0).unsqueeze(-1)
        probabilities = torch.softmax(logits / temperature, dim=-1)
        if settings.needs_filter:
            sampling.filter_probabilities(probabilities, logits, settings)
        drawn = draw(probabilities, settings.uniform)
        return drawn if greedy is None else torch.where(is_greedy, greedy, drawn)

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> SampledLogprobs:
        if self._takes_logits(logits):
            return _native_logprobs(logits, token_ids, num_top)
        # Not logsumexp: its sum over one row alone may be split in another way than among others.
        all_logprobs = torch.log_softmax(logits, dim=-1)
        chosen = token_ids.unsqueeze(-1)
        top_ids = sampling.top_ids(logits, num_top)
        return SampledLogprobs(
            selected=all_logprobs.gather(-1, chosen).squeeze(-1),
            ranks=(logits > logits.gather(-1, chosen)).sum(-1) + 1,
            top_ids=top_ids,
            top_logprobs=all_logprobs.gather(-1, top_ids),
        )


def _are_wide(*tensors: Tensor | None) -> bool:
    """Whether all that are given are float32."""
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def _native_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> SampledLogprobs:
    num_rows = logits.shape[0]
    num_top = min(num_top, logits.shape[-1])
    result = SampledLogprobs(
        selected=torch.empty(num_rows, dtype=torch.float32),
        ranks=torch.empty(num_rows, dtype=torch.int64),
        top_ids=torch.empty((num_rows, num_top), dtype=torch.int64),
        top_logprobs=torch.empty((num_rows, num_top), dtype=torch.float32),
    )
    kernels_cpu.logprobs(
        logits,
        token_ids.contiguous(),
        result.selected,
        result.ranks,
        result.top_ids,
        result.top_logprobs,
    )
    return result
