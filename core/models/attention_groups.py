"""Which layers share a block table, since they need the same of their attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from quire.core.interface.attention import AttentionSpec, CacheTensor
from quire.core.models.decoder_spec import DecoderSpec, LatentSpec

_HEADS_AT_ONCE = 16
"""More would make keys and values of a long context too large to hold beside the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTensor:
    """One tensor of pages that a model keeps itself."""

    name: str
    shape: tuple[int, ...]
    """Of one token, or of one block."""
    is_per_token: bool
    dtype: str | None = None
    """None: the cache's."""

    def in_blocks(self, spec: AttentionSpec) -> CacheTensor:
        """As a cache of this spec keeps it."""
        shape = (spec.block_size, *self.shape) if self.is_per_token else self.shape
        return CacheTensor(name=self.name, block_shape=shape, dtype=self.dtype or spec.cache_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Layers of one `AttentionSpec`."""

    name: str
    """`full`, `sliding_4096`, `chunked_8192`."""
    spec: AttentionSpec
    layers: tuple[int, ...]
    """Their indices, ascending."""
    pages: tuple[PageTensor, ...] = ()
    """What one layer keeps where the model keeps its pages itself; empty: the device's attention
    keeps them, in a layout of its own."""

    max_tokens: int | None = None
    """For `cross`: the most tokens that the encoder makes of what a request brings."""

    @property
    def is_own(self) -> bool:
        """Whether the model keeps the pages itself and asks nothing of the device's attention."""
        return bool(self.pages)

    def laid_out(self, *, dtype: str, cache_dtype: str, block_size: int) -> AttentionGroup:
        """The same group in these dtypes and blocks; pages of its own are laid out by the model."""
        spec = replace(self.spec, dtype=dtype, cache_dtype=cache_dtype, block_size=block_size)
        return replace(self, spec=spec)

    def bytes_per_token(self, size_of_dtype: Callable[[str], int]) -> int:
        """Of the cache, for all layers of the group together."""
        spec = self.spec
        if self.pages:
            kept = [page.in_blocks(spec) for page in self.pages]
            sizes = [prod(t.block_shape) * size_of_dtype(t.dtype) for t in kept]
            return sum(sizes) * len(self.layers) // spec.block_size
        value_size = 0 if spec.kind == "mla" else spec.v_head_size
        width = spec.num_kv_heads * (spec.head_size + value_size)
        return width * size_of_dtype(spec.cache_dtype) * len(self.layers)


def attention_groups_of(
    decoder: DecoderSpec, *, dtype: str, cache_dtype: str, block_size: int
) -> tuple[AttentionGroup, ...]:
    """The groups of a decoder, in the order in which their first layers come."""
    layers_of: dict[int | None, list[int]] = {}
    for layer, window in enumerate(decoder.layer_windows):
        layers_of.setdefault(window, []).append(layer)
    return tuple(
        AttentionGroup(
            name=_name_of(decoder, window),
            spec=_spec_of(decoder, window, dtype, cache_dtype, block_size),
            layers=tuple(layers),
        )
        for window, layers in layers_of.items()
    )


def _name_of(decoder: DecoderSpec, window: int | None) -> str:
    if window is None:
        return "full"
    return f"chunked_{window}" if decoder.are_windows_chunks else f"sliding_{window}"


def _spec_of(
    decoder: DecoderSpec, window: int | None, dtype: str, cache_dtype: str, block_size: int
) -> AttentionSpec:
    latent = decoder.latent
    windowed = "chunked" if decoder.are_windows_chunks else "sliding_window"
    kind = "causal" if window is None else windowed
    return AttentionSpec(
        num_heads=decoder.num_heads,
        num_kv_heads=1 if latent else decoder.num_kv_heads,
        head_size=latent.cached_size if latent else decoder.head_size,
        v_head_size=latent.kv_rank if latent else decoder.head_size,
        scale=decoder.attention_scale,
        dtype=dtype,
        cache_dtype=cache_dtype,
        block_size=block_size,
        kind="mla" if latent else kind,
        window=window,
        soft_cap=decoder.attention_soft_cap,
        has_sinks=decoder.has_sinks,
    )


def heads_at_once(num_heads: int) -> int:
    """Into groups of so many heads they are expanded: the most that divide them evenly."""
    most = min(num_heads, _HEADS_AT_ONCE)
    return next(size for size in range(most, 0, -1) if num_heads % size == 0)


def expanded_spec(spec: AttentionSpec, sizes: LatentSpec) -> AttentionSpec:
    """Causal attention of one group of heads with keys and values of their own."""
    count = heads_at_once(spec.num_heads)
    return replace(
        spec,
        kind="causal",
        num_heads=count,
        num_kv_heads=count,
        head_size=sizes.plain_size + sizes.rotary_size,
        v_head_size=sizes.value_size,
        cache_dtype=spec.dtype,
    )
