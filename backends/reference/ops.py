"""The operators of the contract in plain torch, on any torch device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from quire.backends.reference import experts, quantization, recurrence, sampling
from quire.core.interface import (
    ExpertWeights,
    Ops,
    PackedExperts,
    PackedLinear,
    QuantizedExperts,
    QuantizedWeight,
    RoutingSpec,
    SampledLogprobs,
    SamplingTensors,
    Sequences,
)

_APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeights:
    """A linear layer as it was loaded: the payload of the reference."""

    weight: Tensor
    """[N, K]."""
    bias: Tensor | None
    """[N]."""


class ReferenceOps(Ops):
    """Each operator by its docstring in `Ops`, with no regard to any device's strengths.

    Arithmetic is in float32 and rounded once to the dtype of the result; float64 stays float64, so
    that tests can use it as their own oracle.
    """

    def provider(self, op: str) -> str:
        return "reference"

    # --- layers ---------------------------------------------------------------------------------

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(token_ids, weight)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(
            num_inputs=weight.shape[1],
            num_outputs=weight.shape[0],
            dtype=str(weight.dtype).removeprefix("torch."),
            format="dense",
            size_bytes=0,
            payload=DenseWeights(weight, bias),
        )

    def pack_quantized_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: str
    ) -> PackedLinear:
        return quantization.pack(weight, bias, dtype)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        if isinstance(packed.payload, quantization.WidenedWeights):
            return quantization.multiply(x, packed.payload)
        assert isinstance(packed.payload, DenseWeights), packed
        return F.linear(x, packed.payload.weight, packed.payload.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _widened(x)
        norm = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        return (wide * norm).mul_(_widened(weight)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps)

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        gate, up = _widened(x).chunk(2, dim=-1)
        if kind == "silu":
            return F.silu(gate).mul_(up).to(x.dtype)
        if kind in _APPROXIMATIONS:
            return F.gelu(gate, approximate=_APPROXIMATIONS[kind]).mul_(up).to(x.dtype)
        known = ", ".join(("silu", *_APPROXIMATIONS))
        raise ValueError(f"gated_activation was asked for {kind!r}; it knows {known}")

    def rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool
    ) -> None:
        num_rotated = 2 * cos.shape[-1]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, F]: the same for every head
        for heads in (q, k):
            rotated = heads[..., :num_rotated]
            if is_interleaved:
                first, second = rotated[..., 0::2], rotated[..., 1::2]
            else:
                first, second = rotated.chunk(2, dim=-1)
            _rotate(first, second, cos, sin)

    def soft_cap(self, x: Tensor, cap: float) -> None:
        x.copy_((_widened(x) / cap).tanh_().mul_(cap))

    # --- adapters -------------------------------------------------------------------------------

    def add_lora(
        self, out: Tensor, x: Tensor, down: Tensor, up: Tensor, adapter_ids: Tensor
    ) -> None:
        for adapter in adapter_ids.unique().tolist():
            if adapter < 0:
                continue
            rows = (adapter_ids == adapter).nonzero().squeeze(-1)
            inner = F.linear(x[rows], down[adapter])
            added = _widened(inner) @ _widened(up[adapter]).T
            out.index_copy_(0, rows, (_widened(out[rows]) + added).to(out.dtype))

    # --- latent attention -----------------------------------------------------------------------

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1).contiguous()

    # --- experts --------------------------------------------------------------------------------

    def route_experts(
        self, logits: Tensor, spec: RoutingSpec, correction_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return experts.route(logits, spec, correction_bias)

    def pack_experts(self, weights: ExpertWeights) -> PackedExperts:
        return experts.pack(weights)

    def pack_quantized_experts(self, weights: QuantizedExperts, dtype: str) -> PackedExperts:
        return experts.pack_quantized(weights, dtype)

    def experts(
        self,
        x: Tensor,
        packed: PackedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        *,
        weighs_input: bool = False,
    ) -> Tensor:
        return experts.experts(x, packed, weights, expert_ids, weighs_input=weighs_input)

    # --- recurrence -----------------------------------------------------------------------------

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
        def scan(own: Tensor, each: Sequences) -> Tensor:
            return recurrence.causal_conv1d(x, weight, bias, own, each, activation=activation)

        return recurrence.through_page(states, sequences, scan)

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
        scan = partial(recurrence.selective_scan, x, dt, a, b, c, d)
        return recurrence.through_page(states, sequences, scan)

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
        scan = partial(recurrence.ssd_scan, x, dt, a, b, c, d)
        return recurrence.through_page(states, sequences, scan)

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
        scan = partial(recurrence.gated_delta_rule, q, k, v, decay, beta)
        return recurrence.through_page(states, sequences, scan)

    # --- logits ---------------------------------------------------------------------------------

    def apply_penalties(
        self,
        logits: Tensor,
        rows: Tensor,
        token_ids: Tensor,
        output_counts: Tensor,
        settings: Tensor,
    ) -> None:
        repetition, frequency, presence = settings[rows].unbind(-1)
        seen = logits[rows, token_ids]
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        seen = seen - frequency * output_counts - presence * (output_counts > 0)
        logits.index_put_((rows, token_ids), seen)

    def add_bias(self, logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
        logits.index_put_((rows, token_ids), logits[rows, token_ids] + bias)

    def keep_only(
        self, logits: Tensor, rows: Tensor, row_of_entry: Tensor, token_ids: Tensor
    ) -> None:
        kept = logits[row_of_entry, token_ids]
        logits.index_fill_(0, rows, float("-inf"))
        logits.index_put_((row_of_entry, token_ids), kept)

    def apply_token_mask(self, logits: Tensor, rows: Tensor, mask: Tensor) -> None:
        bits = torch.arange(32, dtype=torch.int32, device=mask.device)
        is_set = (mask.unsqueeze(-1) >> bits) & 1
        is_forbidden = is_set.flatten(1)[:, : logits.shape[-1]] == 0
        logits.index_copy_(0, rows, logits[rows].masked_fill_(is_forbidden, float("-inf")))

    def sample(self, logits: Tensor, settings: SamplingTensors) -> Tensor:
        greedy = sampling.most_likely(logits)
        if settings.is_all_greedy:
            return greedy
        is_greedy = settings.temperature == 0
        scaled = logits / settings.temperature.masked_fill(is_greedy, 1.0).unsqueeze(-1)
        probabilities = torch.softmax(scaled, dim=-1)
        if settings.needs_filter:
            sampling.filter_probabilities(probabilities, logits, settings)
        drawn = sampling.draw(probabilities, settings.uniform)
        return torch.where(is_greedy, greedy, drawn)

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


def _widened(x: Tensor) -> Tensor:
    """`x` in the dtype that it is computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _rotate(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turns the pairs (first, second), each [T, heads, F], in place."""
    a, b = _widened(first), _widened(second)
    turned = a * cos - b * sin
    second.copy_(b * cos + a * sin)
    first.copy_(turned)
