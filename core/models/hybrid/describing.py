"""Hybrid models before their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError, QuireError
from quire.core.interface.op_specs import OP_SPECS
from quire.core.models.attention_groups import AttentionGroup, attention_groups_of
from quire.core.models.description import ModelDescription, ops_of, row_elements_of
from quire.core.models.hybrid.families import FAMILIES
from quire.core.models.hybrid.spec import HybridSpec, HybridTensors
from quire.core.models.model_config import (
    dtype_of,
    eos_token_ids_of,
    load_config,
    read_json,
)
from quire.core.models.state_space.describing import spec_of_pages
from quire.core.models.weights.checkpoint_quantization import parse_checkpoint_quantization

_BLOCK_SIZE = 16


def is_hybrid(raw_config: dict[str, Any]) -> bool:
    """Whether a config.json names one of these architectures."""
    return any(name in FAMILIES for name in raw_config.get("architectures") or ())


def read_hybrid(directory: Path) -> HybridSpec:
    """The model in `directory` from its config.

    Raises: CheckpointError, UnsupportedError.
    """
    raw = read_json(directory / "config.json")
    architecture = next(name for name in raw["architectures"] if name in FAMILIES)
    try:
        return FAMILIES[architecture](load_config(directory))
    except QuireError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} lacks what {architecture} needs: {error!r}"
        ) from error


def describe_hybrid(directory: Path) -> ModelDescription:
    """The model in `directory` from its JSON files.

    Raises: CheckpointError, UnsupportedError.
    """
    spec, config = read_hybrid(directory), load_config(directory)
    stored = parse_checkpoint_quantization(read_json(directory / "config.json"), directory)
    decoder, dtype = spec.decoder, dtype_of(config)
    return ModelDescription(
        architecture=decoder.architecture,
        checkpoint_dtype=dtype,
        dtype=dtype,
        cache_dtype=dtype,
        vocab_size=decoder.vocab_size,
        max_model_len=decoder.max_model_len,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
        num_parameters=sum(tensor.num_elements for tensor in HybridTensors(spec)),
        attention_groups=_groups(spec, dtype),
        ops=_ops(spec),
        eos_token_ids=eos_token_ids_of(directory, config),
        row_elements=row_elements_of(decoder) + 8 * spec.mixer.projected_size,
        stored_format=None if stored is None else stored.format_name,
    )


def _groups(spec: HybridSpec, dtype: str) -> tuple[AttentionGroup, ...]:
    """Keys and values first, then states: a layer that has both has two caches."""
    attention = attention_groups_of(
        spec.decoder, dtype=dtype, cache_dtype=dtype, block_size=_BLOCK_SIZE
    )[0]
    num_attending = len(spec.attention_layers)
    states = range(num_attending, num_attending + len(spec.mixer_layers))
    return (
        replace(attention, layers=tuple(range(num_attending))),
        AttentionGroup(
            name="state",
            spec=spec_of_pages(dtype),
            layers=tuple(states),
            pages=spec.mixer.pages,
        ),
    )


def _ops(spec: HybridSpec) -> tuple[str, ...]:
    used = {*ops_of(spec.decoder), "causal_conv1d", spec.mixer.scan}
    return tuple(row.name for row in OP_SPECS if row.name in used)
