"""The specification of the operators, one row each.

The engine gates on this table, the docs print it and the conformance suite is generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """One row of the specification."""

    name: str
    """The method of `Ops`, or of `AttentionBackend` for those of kind `attention`."""
    summary: str
    """What it does, as a sentence."""
    level: int = 1
    """The conformance level from which it is mandatory."""
    tolerance: str = "elementwise"
    """`exact`, `elementwise`, `reduction`, `attention`, `recurrence` or `quantised`."""
    oracle: str
    """The float64 oracle in the conformance suite."""
    dtypes: tuple[str, ...] = FLOATS
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    """Arguments that are mutated; everything else must be left as it was."""
    extension: str = ""
    """The extension that it belongs to; empty: mandatory."""
    since: str = "1.0"


OP_SPECS: tuple[OpSpec, ...] = (
    OpSpec(
        name="embedding",
        summary="Looks up rows of a table.",
        tolerance="exact",
        oracle="layers.embedding",
        reads=("token_ids", "weight"),
    ),
    OpSpec(
        name="linear",
        summary="Multiplies by packed weights and adds a bias.",
        tolerance="reduction",
        oracle="layers.linear",
        reads=("x", "packed"),
    ),
    OpSpec(
        name="rms_norm",
        summary="Root-mean-square norm.",
        tolerance="reduction",
        oracle="layers.rms_norm",
        reads=("x", "weight"),
    ),
    OpSpec(
        name="add_rms_norm",
        summary="Adds to the residual and normalises the sum.",
        tolerance="reduction",
        oracle="layers.add_rms_norm",
        reads=("x", "residual", "weight"),
        writes=("residual",),
    ),
    OpSpec(
        name="gated_activation",
        summary="Activates one half and multiplies by the other.",
        oracle="layers.gated_activation",
        reads=("x",),
    ),
    OpSpec(
        name="rotary",
        summary="Rotates heads by position, in place.",
        oracle="layers.rotary",
        reads=("q", "k", "cos", "sin"),
        writes=("q", "k"),
    ),
    OpSpec(
        name="soft_cap",
        summary="Squashes into (-cap, cap), in place.",
        oracle="layers.soft_cap",
        reads=("x",),
        writes=("x",),
    ),
    OpSpec(
        name="apply_penalties",
        summary="Penalises tokens already seen.",
        dtypes=("float32",),
        oracle="logits.apply_penalties",
        reads=("logits", "rows", "token_ids", "output_counts", "settings"),
        writes=("logits",),
    ),
    OpSpec(
        name="add_bias",
        summary="Adds to chosen logits.",
        dtypes=("float32",),
        oracle="logits.add_bias",
        reads=("logits", "rows", "token_ids", "bias"),
        writes=("logits",),
    ),
    OpSpec(
        name="keep_only",
        summary="Forbids all but the listed tokens.",
        tolerance="exact",
        dtypes=("float32",),
        oracle="logits.keep_only",
        reads=("logits", "rows", "row_of_entry", "token_ids"),
        writes=("logits",),
    ),
    OpSpec(
        name="apply_token_mask",
        summary="Forbids the tokens that a bit mask leaves out.",
        tolerance="exact",
        dtypes=("float32",),
        oracle="logits.apply_token_mask",
        reads=("logits", "rows", "mask"),
        writes=("logits",),
        since="1.1",
    ),
    OpSpec(
        name="sample",
        summary="Chooses one token a row.",
        tolerance="exact",
        dtypes=("float32",),
        oracle="logits.sample",
        reads=("logits", "settings"),
        writes=("logits",),
    ),
    OpSpec(
        name="logprobs",
        summary="Log-probabilities, ranks and the most likely tokens.",
        tolerance="reduction",
        dtypes=("float32",),
        oracle="logits.logprobs",
        reads=("logits", "token_ids"),
    ),
    OpSpec(
        name="add_lora",
        summary="Adds what a token's adapter contributes.",
        tolerance="attention",
        oracle="layers.add_lora",
        reads=("out", "x", "down", "up", "adapter_ids"),
        writes=("out",),
        extension="lora",
        since="1.1",
    ),
    OpSpec(
        name="head_linear",
        summary="Multiplies each head by weights of its own.",
        tolerance="reduction",
        oracle="layers.head_linear",
        reads=("x", "weight"),
        extension="mla",
        since="1.1",
    ),
    OpSpec(
        name="route_experts",
        summary="Chooses the experts of each token, and their weights.",
        dtypes=("float32",),
        oracle="experts.route",
        reads=("logits", "correction_bias"),
        extension="moe",
        since="1.1",
    ),
    OpSpec(
        name="experts",
        summary="Runs each token through its experts and adds them up.",
        tolerance="attention",
        oracle="experts.experts",
        reads=("x", "packed", "weights", "expert_ids"),
        extension="moe",
        since="1.1",
    ),
    OpSpec(
        name="causal_conv1d",
        summary="Convolves each channel over its last inputs.",
        tolerance="reduction",
        oracle="recurrence.causal_conv1d",
        reads=("x", "weight", "bias", "states"),
        writes=("states",),
        extension="recurrent",
        since="1.1",
    ),
    OpSpec(
        name="selective_scan",
        summary="The scan of Mamba.",
        tolerance="recurrence",
        oracle="recurrence.selective_scan",
        reads=("x", "dt", "a", "b", "c", "d", "states"),
        writes=("states",),
        extension="recurrent",
        since="1.1",
    ),
    OpSpec(
        name="ssd_scan",
        summary="The scan of Mamba-2.",
        tolerance="recurrence",
        oracle="recurrence.ssd_scan",
        reads=("x", "dt", "a", "b", "c", "d", "states"),
        writes=("states",),
        extension="recurrent",
        since="1.1",
    ),
    OpSpec(
        name="gated_delta_rule",
        summary="Linear attention that overwrites what it recalls.",
        tolerance="recurrence",
        oracle="recurrence.gated_delta_rule",
        reads=("q", "k", "v", "decay", "beta", "states"),
        writes=("states",),
        extension="recurrent",
        since="1.1",
    ),
    OpSpec(
        name="pack_quantized_linear",
        summary="Multiplies by weights of 4 or 8 bits.",
        tolerance="quantised",
        oracle="layers.quantized_linear",
        reads=("x", "weight", "bias"),
        extension="quantization",
        since="1.1",
    ),
    OpSpec(
        name="paged_attention",
        summary="Attention of new tokens over their paged context.",
        tolerance="attention",
        oracle="attention.paged",
        reads=("q", "k", "v", "cache"),
        writes=("cache", "out"),
    ),
)
"""The specification, one row an operator. `paged_attention` is `AttentionBackend.forward`."""
