"""Operators of extensions: experts, recurrences and quantized layers, by Triton's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quire.backends.reference import ReferenceOps
from quire.core.interface import (
    ExpertWeights,
    PackedExperts,
    PackedLinear,
    QuantizedExperts,
    QuantizedWeight,
    RoutingSpec,
    Sequences,
)
from quire.kernels_triton import expert_codes, experts, float8, quantized, recurrence
from quire.kernels_triton.launch import Launcher

EXTENSION_OPS = frozenset(
    {
        *("route_experts", "experts", "pack_quantized_experts", "pack_quantized_linear"),
        *("causal_conv1d", "selective_scan", "ssd_scan", "gated_delta_rule"),
    }
)
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MAX_STATE = 256
"""The longest state of a channel, or key of a head, that one program holds."""


class TritonExtensionOps(ReferenceOps):
    """What has a kernel runs in it; other shapes and dtypes are the reference's."""

    def __init__(self, launcher: Launcher, fp8_units: str = "") -> None:
        """`fp8_units`: the 8-bit float that the device's matrix units multiply; empty: none."""
        self._launcher = launcher
        self._fp8_units = fp8_units

    # --- quantized layers -----------------------------------------------------------------------

    def pack_quantized_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: str
    ) -> PackedLinear:
        if getattr(torch, dtype) not in DTYPES:
            return super().pack_quantized_linear(weight, bias, dtype)
        if weight.encoding == "float8_e4m3fn":
            return self._pack_float8(weight, bias, dtype)
        layer = quantized.QuantizedLayer(
            bits=weight.bits,
            group_size=weight.group_size or weight.num_inputs,
            num_groups=weight.num_groups,
            num_inputs=weight.num_inputs,
            codes=weight.codes.contiguous(),
            scales=weight.scales.contiguous(),
            zeros=None if weight.zeros is None else weight.zeros.contiguous(),
            bias=bias,
            activations=weight.activations,
        )
        return PackedLinear(
            num_inputs=weight.num_inputs,
            num_outputs=weight.num_outputs,
            dtype=dtype,
            format=f"{weight.scheme or f'int{weight.bits}'} in registers",
            size_bytes=0,
            payload=layer,
        )

    def _pack_float8(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: str
    ) -> PackedLinear:
        layer = float8.pack_float8(
            weight.codes,
            weight.scales,
            bias,
            group_size=weight.group_size,
            activations=weight.activations,
            units=self._fp8_units,
        )
        return PackedLinear(
            num_inputs=weight.num_inputs,
            num_outputs=weight.num_outputs,
            dtype=dtype,
            format=f"{weight.scheme or 'fp8'} {layer.units or 'in registers'}",
            size_bytes=layer.codes.nbytes + layer.scales.nbytes,
            payload=layer,
        )

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        payload = packed.payload
        if isinstance(payload, quantized.QuantizedLayer | float8.Float8Layer):
            rows = x if x.stride(-1) == 1 else x.contiguous()
            if isinstance(payload, float8.Float8Layer):
                return float8.float8_linear(self._launcher, rows, payload)
            return quantized.quantized_linear(self._launcher, rows, payload)
        return super().linear(x, packed)

    # --- experts --------------------------------------------------------------------------------

    def route_experts(
        self, logits: Tensor, spec: RoutingSpec, correction_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        is_known = spec.score in ("softmax", "sigmoid") and spec.group_score in ("max", "top2")
        if not is_known or spec.num_experts > experts.MAX_EXPERTS:
            return super().route_experts(logits, spec, correction_bias)
        routing = experts.Routing(
            num_experts=spec.num_experts,
            num_chosen=spec.num_chosen,
            is_sigmoid=spec.score == "sigmoid",
            is_renormalised=spec.is_renormalised,
            scale=float(spec.scale),
            num_groups=spec.num_groups,
            num_kept_groups=spec.num_kept_groups,
            sums_two=spec.group_score == "top2",
        )
        bias = None if correction_bias is None else correction_bias.float().contiguous()
        rows = logits.float()
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        return experts.route(self._launcher, rows, routing, bias)

    def pack_experts(self, weights: ExpertWeights) -> PackedExperts:
        dense = replace(
            weights,
            gate_up=weights.gate_up.contiguous(),
            down=weights.down.contiguous(),
            gate_up_bias=_dense(weights.gate_up_bias),
            down_bias=_dense(weights.down_bias),
        )
        return super().pack_experts(dense)

    def pack_quantized_experts(self, weights: QuantizedExperts, dtype: str) -> PackedExperts:
        is_known = getattr(torch, dtype) in DTYPES and weights.activation in experts.ACTIVATIONS
        if not is_known or not (_are_alike(weights.gate_up) and _are_alike(weights.down)):
            return super().pack_quantized_experts(weights, dtype)
        layer = expert_codes.ExpertCodes(
            gate_up=self._pack_side(weights.gate_up, weights.gate_up_bias),
            down=self._pack_side(weights.down, weights.down_bias),
            activation=weights.activation,
            alpha=float(weights.alpha),
            limit=float(weights.limit),
        )
        first = weights.gate_up[0]
        return PackedExperts(
            num_experts=len(weights.gate_up),
            hidden_size=first.num_inputs,
            dtype=dtype,
            format=f"{first.scheme or first.format_name} {layer.gate_up.units or 'in registers'}",
            size_bytes=layer.gate_up.num_bytes + layer.down.num_bytes,
            payload=layer,
        )

    def _pack_side(
        self, weights: Sequence[QuantizedWeight], bias: Tensor | None
    ) -> expert_codes.ExpertSide:
        first = weights[0]
        zeros = [weight.zeros for weight in weights if weight.zeros is not None]
        return expert_codes.pack_side(
            [weight.codes for weight in weights],
            [weight.scales for weight in weights],
            zeros or None,
            bias,
            bits=first.bits,
            group_size=first.group_size,
            num_inputs=first.num_inputs,
            activations=first.activations,
            is_float8=first.encoding == "float8_e4m3fn",
            units=self._fp8_units,
        )

    def experts(
        self,
        x: Tensor,
        packed: PackedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        *,
        weighs_input: bool = False,
    ) -> Tensor:
        loaded = packed.payload
        if isinstance(loaded, expert_codes.ExpertCodes):
            return expert_codes.run_expert_codes(
                self._launcher,
                x if x.stride(-1) == 1 else x.contiguous(),
                loaded,
                weights.float().contiguous(),
                expert_ids.contiguous(),
                weighs_input=weighs_input,
            )
        if not isinstance(loaded, ExpertWeights):
            return super().experts(x, packed, weights, expert_ids, weighs_input=weighs_input)
        if x.dtype not in DTYPES or loaded.activation not in experts.ACTIVATIONS:
            return super().experts(x, packed, weights, expert_ids, weighs_input=weighs_input)
        layer = experts.Experts(
            gate_up=loaded.gate_up,
            down=loaded.down,
            gate_up_bias=loaded.gate_up_bias,
            down_bias=loaded.down_bias,
            activation=loaded.activation,
            alpha=float(loaded.alpha),
            limit=float(loaded.limit),
        )
        return experts.run_experts(
            self._launcher,
            x if x.stride(-1) == 1 else x.contiguous(),
            layer,
            weights.contiguous(),
            expert_ids.contiguous(),
            weighs_input=weighs_input,
        )

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
        if not _are_served(x, states) or activation not in ("", "silu"):
            return super().causal_conv1d(x, weight, bias, states, sequences, activation=activation)
        return recurrence.causal_conv1d(
            self._launcher,
            x,
            weight.contiguous(),
            bias,
            states,
            sequences.starts,
            has_silu=activation == "silu",
            slots=_slots(sequences),
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
        if not _are_served(x, states, dt, b, c) or a.shape[1] > _MAX_STATE:
            return super().selective_scan(x, dt, a, b, c, d, states, sequences)
        starts, slots = sequences.starts, _slots(sequences)
        return recurrence.selective_scan(
            self._launcher, x, dt, a.contiguous(), b, c, _dense(d), states, starts, slots
        )

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
        if not _are_served(x, states, dt, b, c) or b.shape[-1] > _MAX_STATE:
            return super().ssd_scan(x, dt, a, b, c, d, states, sequences)
        starts, slots = sequences.starts, _slots(sequences)
        return recurrence.ssd_scan(
            self._launcher, x, dt, a.contiguous(), b, c, _dense(d), states, starts, slots
        )

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
        if not _are_served(v, states, q, k, decay, beta) or q.shape[-1] > _MAX_STATE:
            return super().gated_delta_rule(q, k, v, decay, beta, states, sequences)
        return recurrence.gated_delta_rule(
            self._launcher, q, k, v, decay, beta, states, sequences.starts, _slots(sequences)
        )


def _slots(sequences: Sequences) -> tuple[Tensor, Tensor] | None:
    return None if sequences.slots is None else (sequences.slots.sources, sequences.slots.targets)


def _are_alike(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether all have one form, so that one kernel multiplies them."""
    forms = {
        (w.bits, w.group_size, w.num_inputs, w.activations, w.encoding, w.zeros is None)
        for w in weights
    }
    return len(forms) == 1


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _are_served(x: Tensor, states: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take such tensors: dtypes of theirs, dense last dimensions."""
    is_dense = all(tensor.stride(-1) == 1 for tensor in (x, *others))
    return x.dtype in DTYPES and is_dense and (states.is_contiguous() or states[0].is_contiguous())
