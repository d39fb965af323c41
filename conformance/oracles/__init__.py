"""The truth that devices are held to: each formula written down in numpy, plainly.

An oracle computes in the dtype of the arrays that it is given: in float64 it is the reference, in
float32 (rounded once at the end) it is the baseline that says how much rounding is honest. No
blocking, no tricks, no torch. The table maps `OpSpec.oracle` to the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quire.conformance.oracles import attention, experts, layers, logits, recurrence

ORACLES: Mapping[str, Callable[..., Any]] = {
    "layers.embedding": layers.embedding,
    "layers.linear": layers.linear,
    "layers.quantized_linear": layers.quantized_linear,
    "layers.add_lora": layers.add_lora,
    "layers.head_linear": layers.head_linear,
    "layers.rms_norm": layers.rms_norm,
    "layers.add_rms_norm": layers.add_rms_norm,
    "layers.gated_activation": layers.gated_activation,
    "layers.rotary": layers.rotary,
    "layers.soft_cap": layers.soft_cap,
    "logits.apply_penalties": logits.apply_penalties,
    "logits.add_bias": logits.add_bias,
    "logits.keep_only": logits.keep_only,
    "logits.apply_token_mask": logits.apply_token_mask,
    "logits.sample": logits.sample,
    "logits.logprobs": logits.logprobs,
    "experts.route": experts.route,
    "experts.experts": experts.experts,
    "recurrence.causal_conv1d": recurrence.causal_conv1d,
    "recurrence.selective_scan": recurrence.selective_scan,
    "recurrence.ssd_scan": recurrence.ssd_scan,
    "recurrence.gated_delta_rule": recurrence.gated_delta_rule,
    "attention.paged": attention.paged,
}
"""By `OpSpec.oracle`."""
