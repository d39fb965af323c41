"""Cosines and sines of every position, computed once at load with transformers' own formulas.

Dynamic NTK and longrope choose their frequencies by length. transformers chooses by the longest
sequence of the moment, so that keys already cached keep the frequencies of a shorter text. Here the
choice is made once for all requests, by the `max_model_len` that the model is loaded with: keys in
the cache then depend on token and position alone, which is what lets requests share a prefix, and
the output does not depend on how a prompt was cut. Loaded with a `max_model_len` up to the original
length, a model runs unscaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.models.decoder_spec import DecoderSpec, RopeSpec, TemperatureSpec


class RotaryTable:
    """The angles of one kind of RoPE: float32 [max_model_len, F], F half the rotated features."""

    def __init__(self, rope: RopeSpec, *, max_model_len: int, device: str) -> None:
        inverse_frequencies, scaling = compute_frequencies(rope, max_model_len)
        positions = torch.arange(max_model_len, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies
        self._cos = (angles.cos() * scaling).to(device)
        self._sin = (angles.sin() * scaling).to(device)

    def gather(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [T, F] each, for positions int64 [T] below max_model_len."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    @property
    def size_bytes(self) -> int:
        """Memory that the table holds."""
        return self._cos.nbytes + self._sin.nbytes


class TemperatureTable:
    """The factors of queries by their positions: float32 [max_model_len, 1]."""

    def __init__(self, spec: TemperatureSpec, *, max_model_len: int, device: str) -> None:
        positions = torch.arange(max_model_len, dtype=torch.float32)
        grown = torch.log1p(torch.floor((positions + 1.0) / spec.floor))
        self._factors = (grown * spec.scale + 1.0).to(device)[:, None]

    def gather(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of positions int64 [T], float32 [T, 1]; twice, in the shape of angles."""
        factors = self._factors.index_select(0, positions)
        return factors, factors

    @property
    def size_bytes(self) -> int:
        """Memory that the table holds."""
        return self._factors.nbytes


def make_position_tables(
    decoder: DecoderSpec, *, max_model_len: int, device: str
) -> list[RotaryTable | TemperatureTable]:
    """What layers look up by position, as `DecoderSpec.position_table` numbers it."""
    tables: list[RotaryTable | TemperatureTable] = [
        RotaryTable(rope, max_model_len=max_model_len, device=device) for rope in decoder.ropes
    ]
    if decoder.temperature is not None:
        temperature = decoder.temperature
        tables.append(TemperatureTable(temperature, max_model_len=max_model_len, device=device))
    return tables


def compute_frequencies(rope: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [F] on the host, and what cosines and sines are multiplied by.

    Source: Su et al. 2021, eq. 15; scalings: transformers' `ROPE_INIT_FUNCTIONS`, which cites each.
    """
    if rope.rope_type == "default":
        size = rope.rotary_size
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / (rope.parameters["rope_theta"] ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = _RopeConfig(
        rope_parameters=rope.parameters,
        head_dim=rope.head_size,
        hidden_size=rope.head_size,
        num_attention_heads=1,
        max_position_embeddings=rope.max_position_embeddings,
    )
    compute: Any = ROPE_INIT_FUNCTIONS[rope.rope_type]
    frequencies, scaling = compute(config, None, seq_len=max_model_len)
    return frequencies, float(scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RopeConfig:
    """What transformers' functions read of a config."""

    rope_parameters: Mapping[str, Any]
    head_dim: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int

    def standardize_rope_params(self) -> None:
        """The parameters are in the new format already."""
