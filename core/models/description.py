"""What is known of a model before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quire.core.interface.op_specs import OP_SPECS
from quire.core.models.attention_groups import (
    AttentionGroup,
    attention_groups_of,
    heads_at_once,
)
from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families import Family
from quire.core.models.model_config import ModelConfig, read_model_config
from quire.core.models.weights.weight_layout import lay_out
from quire.core.source_features import SourceSteps

__all__ = ["AttentionGroup", "ModelDescription", "describe_model", "size_of_dtype"]

_DTYPE_SIZES = {
    "float64": 8, "int64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingDescription:
    """What a model makes of texts."""

    tasks: tuple[str, ...]
    """Those of `PoolingSpec.task` that it does."""
    labels: tuple[str, ...] = ()
    vector_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model as its config.json describes it."""

    architecture: str
    checkpoint_dtype: str
    dtype: str
    """What it runs in: as asked, or the checkpoint's."""
    cache_dtype: str
    vocab_size: int
    max_model_len: int
    """The most tokens that the model was made for."""
    hidden_size: int
    num_layers: int
    num_parameters: int
    attention_groups: tuple[AttentionGroup, ...]
    ops: tuple[str, ...]
    """Names of the `OP_SPECS` that its forward and the sampling after it may use."""
    eos_token_ids: tuple[int, ...]
    row_elements: int
    """Numbers that a step holds for each of its tokens at its peak; an upper bound."""
    decoder: DecoderSpec | None = None
    """Of a native family that runs through the one decoder."""
    implementation: str = "native"
    """Who runs it: `native`, `transformers`, or the package that brings it."""
    pooling: PoolingDescription | None = None
    """Of a model that makes numbers of texts; None: it generates."""
    tasks: tuple[str, ...] = ("generate",)
    """What it does."""
    encoder_input: str | None = None
    """What a request must bring for its encoder: `tokens`, `audio`; None: it has none."""
    source_steps: SourceSteps | None = None
    """Of an encoder that makes more tokens of more sound."""
    accepts: tuple[str, ...] = ()
    """What a prompt may bring besides text: `image`, `audio`."""
    needs_whole_prompts: bool = False
    """Whether a prompt may not be cut into chunks, since tokens see later ones."""
    sees_whole_prompts: bool = False
    """Whether every token of a prompt sees all of it, so that no other prompt can share one."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it runs."""
    stored_format: str | None = None
    """Of a checkpoint whose products are stored in codes, as `Capabilities.quantizations`."""

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Memory of the plain weights in `dtype` (None: the model's); packing may add to it."""
        return self.num_parameters * size_of_dtype(dtype or self.dtype)

    def laid_out(self, *, dtype: str, cache_dtype: str, block_size: int) -> ModelDescription:
        """The same model in these dtypes and blocks; nothing is read again."""
        groups = tuple(
            group.laid_out(dtype=dtype, cache_dtype=cache_dtype, block_size=block_size)
            for group in self.attention_groups
        )
        return replace(self, dtype=dtype, cache_dtype=cache_dtype, attention_groups=groups)


def describe_model(
    directory: Path,
    *,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    block_size: int = 16,
    family: Family | None = None,
) -> ModelDescription:
    """Describes the native model in `directory` from its JSON files alone.

    `family`: one from outside the table.

    Raises: CheckpointError, UnsupportedError, as `read_model_config` does.
    """
    config = read_model_config(Path(directory), family)
    dtype = config.dtype if dtype == "auto" else dtype
    cache_dtype = dtype if cache_dtype == "auto" else cache_dtype
    return describe_config(config, dtype=dtype, cache_dtype=cache_dtype, block_size=block_size)


def describe_config(
    config: ModelConfig, *, dtype: str, cache_dtype: str, block_size: int
) -> ModelDescription:
    """The description that follows from a config; dtypes are resolved."""
    decoder = config.decoder
    return ModelDescription(
        architecture=config.family.architecture,
        checkpoint_dtype=config.dtype,
        dtype=dtype,
        cache_dtype=cache_dtype,
        vocab_size=decoder.vocab_size,
        max_model_len=decoder.max_model_len,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
        num_parameters=lay_out(decoder, config.family.names).num_parameters,
        attention_groups=attention_groups_of(
            decoder, dtype=dtype, cache_dtype=cache_dtype, block_size=block_size
        ),
        ops=ops_of(decoder),
        eos_token_ids=config.eos_token_ids,
        row_elements=row_elements_of(decoder),
        decoder=decoder,
        stored_format=None if config.stored is None else config.stored.format_name,
    )


def size_of_dtype(dtype: str) -> int:
    """Bytes of one element."""
    return _DTYPE_SIZES[dtype]


def row_elements_of(decoder: DecoderSpec) -> int:
    """Numbers of a token in a step at its peak.

    A layer's input, residual and output, q, k and v twice (split and not), the MLP's halves.
    """
    inner = decoder.intermediate_size
    if decoder.mixture is not None:
        chosen = decoder.mixture.routing.num_chosen * decoder.mixture.intermediate_size
        inner = max(inner, chosen + decoder.mixture.shared_size)
    heads = 2 * sum(decoder.qkv_sizes)
    if decoder.latent is not None:
        latent, at_once = decoder.latent, heads_at_once(decoder.num_heads)
        heads += 2 * decoder.num_heads * latent.cached_size
        # Of a prompt: keys and values of some heads as they are made, parted, and in the cache.
        heads += at_once * (3 * (latent.plain_size + latent.value_size) + 2 * latent.rotary_size)
    return 4 * decoder.hidden_size + heads + 4 * inner


def ops_of(decoder: DecoderSpec) -> tuple[str, ...]:
    """The operators of every model, and those of the extensions that this one needs."""
    extensions = {
        "",
        "moe" if decoder.mixture is not None else "",
        "mla" if decoder.latent is not None else "",
    }
    unused = set() if decoder.logit_soft_cap is not None else {"soft_cap"}
    return tuple(
        spec.name for spec in OP_SPECS if spec.extension in extensions and spec.name not in unused
    )
