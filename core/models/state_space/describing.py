"""State-space models before their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.core.interface.attention import AttentionSpec
from quire.core.interface.op_specs import OP_SPECS
from quire.core.models.attention_groups import AttentionGroup
from quire.core.models.description import ModelDescription
from quire.core.models.model_config import (
    dtype_of,
    eos_token_ids_of,
    load_config,
    read_json,
)
from quire.core.models.state_space.spec import ARCHITECTURES, StateSpaceTensors, read_spec
from quire.core.models.weights.checkpoint_quantization import parse_checkpoint_quantization

_MAX_LEN = 32768
"""For models whose states know no length."""
_LAYER_OPS = ("embedding", "linear", "rms_norm", "causal_conv1d")
_SAMPLED_OPS = (
    "apply_penalties", "add_bias", "keep_only", "apply_token_mask", "sample", "logprobs",
)  # fmt: skip


def is_state_space(raw_config: dict[str, Any]) -> bool:
    """Whether a config.json names one of these architectures."""
    return any(name in ARCHITECTURES for name in raw_config.get("architectures") or ())


def describe_state_space(directory: Path) -> ModelDescription:
    """The model in `directory` from its JSON files.

    Raises: CheckpointError, UnsupportedError.
    """
    stored = parse_checkpoint_quantization(read_json(directory / "config.json"), directory)
    config = load_config(directory)
    spec, dtype = read_spec(config), dtype_of(config)
    group = AttentionGroup(
        name="state",
        spec=spec_of_pages(dtype),
        layers=tuple(range(spec.num_layers)),
        pages=spec.pages,
    )
    used = {*_LAYER_OPS, *_SAMPLED_OPS, spec.scan}
    return ModelDescription(
        architecture=spec.architecture,
        checkpoint_dtype=dtype,
        dtype=dtype,
        cache_dtype=dtype,
        vocab_size=spec.vocab_size,
        max_model_len=_MAX_LEN,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_parameters=sum(tensor.num_elements for tensor in StateSpaceTensors(spec)),
        attention_groups=(group,),
        ops=tuple(row.name for row in OP_SPECS if row.name in used),
        eos_token_ids=eos_token_ids_of(directory, config),
        row_elements=4 * spec.hidden_size + 8 * spec.projected_size,
        stored_format=None if stored is None else stored.format_name,
    )


def spec_of_pages(dtype: str) -> AttentionSpec:
    """The spec of pages that the model keeps itself, of which only the blocks matter."""
    return AttentionSpec(
        num_heads=1,
        num_kv_heads=1,
        head_size=1,
        v_head_size=1,
        scale=1.0,
        dtype=dtype,
        cache_dtype=dtype,
        block_size=16,
        kind="recurrent",
    )
