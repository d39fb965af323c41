"""Which layers share a block table, since they need the same of their attention."""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.interface.attention import AttentionSpec
from quire.core.models.decoder_spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Layers of one `AttentionSpec`."""

    name: str
    """`full`, `sliding_4096`."""
    spec: AttentionSpec
    layers: tuple[int, ...]
    """Their indices, ascending."""


def attention_groups_of(
    decoder: DecoderSpec, *, dtype: str, cache_dtype: str, block_size: int
) -> tuple[AttentionGroup, ...]:
    """The groups of a decoder, in the order in which their first layers come."""
    layers_of: dict[int | None, list[int]] = {}
    for layer, window in enumerate(decoder.layer_windows):
        layers_of.setdefault(window, []).append(layer)
    return tuple(
        AttentionGroup(
            name="full" if window is None else f"sliding_{window}",
            spec=AttentionSpec(
                num_heads=decoder.num_heads,
                num_kv_heads=decoder.num_kv_heads,
                head_size=decoder.head_size,
                v_head_size=decoder.head_size,
                scale=decoder.attention_scale,
                dtype=dtype,
                cache_dtype=cache_dtype,
                block_size=block_size,
                kind="causal" if window is None else "sliding_window",
                window=window,
                soft_cap=decoder.attention_soft_cap,
            ),
            layers=tuple(layers),
        )
        for window, layers in layers_of.items()
    )
