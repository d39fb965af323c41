"""The operators of a CPU: oneDNN, the compiled kernels, and the reference for what is left."""

from __future__ import annotations

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu import linear, native_linear, sampling
from quire.backends.cpu.host import read_cpu
from quire.backends.reference import ReferenceOps
from quire.backends.reference.sampling import draw
from quire.core.interface import PackedLinear, QuantizedWeight, SampledLogprobs, SamplingTensors

_NATIVE_OPS = frozenset({"rms_norm", "add_rms_norm", "gated_activation", "rotary"})
_NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_SHORTCUTS = frozenset({"sample", "logprobs"})


class CpuOps(ReferenceOps):
    """What a CPU does better than the reference; whatever a kernel does not take goes there."""

    def __init__(self) -> None:
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
        return linear.pack(weight, bias) or super().pack_linear(weight, bias)

    def pack_quantized_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: str
    ) -> PackedLinear:
        if native_linear.takes_quantized(weight):
            return native_linear.pack_quantized(weight, bias, dtype)
        return super().pack_quantized_linear(weight, bias, dtype)

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

    def _is_served(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the compiled norms take these dtypes."""
        return self._has_native and x.dtype in _NATIVE_DTYPES and weight.dtype == x.dtype

    # --- logits ---------------------------------------------------------------------------------

    def sample(self, logits: Tensor, settings: SamplingTensors) -> Tensor:
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
