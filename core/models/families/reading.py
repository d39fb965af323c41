"""What all families read from a Hugging Face config in the same way."""

from __future__ import annotations

from typing import Any

from quire.core.errors import Reason, UnsupportedError
from quire.core.models.decoder_spec import DecoderSpec, RopeSpec

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def read_decoder(config: Any, **differences: Any) -> DecoderSpec:
    """A plain decoder as Llama's config describes it; `differences` are fields of `DecoderSpec`."""
    head_size = head_size_of(config)
    num_layers = config.num_hidden_layers
    fields: dict[str, Any] = {
        "architecture": (config.architectures or [type(config).__name__])[0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_size": head_size,
        "layer_windows": (None,) * num_layers,
        "attention_scale": head_size**-0.5,
        "norm_eps": config.rms_norm_eps,
        "has_tied_embeddings": config.tie_word_embeddings,
        "layer_ropes": (0,) * num_layers,
    }
    if "intermediate_size" not in differences:
        fields["intermediate_size"] = config.intermediate_size
    if "ropes" not in differences:
        fields["ropes"] = (read_rope(config, config.rope_parameters),)
    if "activation" not in differences:
        fields["activation"] = read_activation(config.hidden_act)
    fields |= differences
    if "max_model_len" not in fields:
        fields["max_model_len"] = scaled_length(fields["ropes"])
    return DecoderSpec(**fields)


def head_size_of(config: Any) -> int:
    """The size of a head, which need not be hidden / heads."""
    head_size: int | None = getattr(config, "head_dim", None)
    return head_size or config.hidden_size // config.num_attention_heads


def read_rope(config: Any, parameters: dict[str, Any]) -> RopeSpec:
    """One kind of RoPE.

    Raises: UnsupportedError for a scaling that Quire does not know.
    """
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise unsupported("rope", f"RoPE scaling {rope_type!r}", ", ".join(_ROPE_TYPES))
    return RopeSpec(
        rope_type=rope_type,
        parameters=dict(parameters),
        head_size=head_size_of(config),
        max_position_embeddings=config.max_position_embeddings,
    )


def read_activation(name: str) -> str:
    """What `Ops.gated_activation` calls the config's activation.

    Raises: UnsupportedError for one that it lacks.
    """
    if name not in _ACTIVATIONS:
        raise unsupported("activation", f"activation {name!r}", ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def read_windows(config: Any) -> tuple[int | None, ...]:
    """The window of each layer from `layer_types` and `sliding_window`."""
    window = config.sliding_window
    return tuple(
        window if layer_type == "sliding_attention" else None for layer_type in config.layer_types
    )


def scaled_length(ropes: tuple[RopeSpec, ...]) -> int:
    """The most tokens that the ropes were made for.

    Dynamic and YaRN configs often state the length before scaling, so the factor is applied to it;
    with the other kinds `max_position_embeddings` is the length after scaling.
    """
    return min(_scaled_length(rope) for rope in ropes)


def _scaled_length(rope: RopeSpec) -> int:
    length, factor = rope.max_position_embeddings, rope.parameters.get("factor") or 1.0
    if rope.rope_type == "dynamic":
        return int(length * factor)
    if rope.rope_type == "yarn":
        original = rope.parameters.get("original_max_position_embeddings") or length
        return max(length, int(original * factor))
    return length


def refuse_bidirectional(config: Any) -> None:
    """Raises UnsupportedError if the config wants tokens to see what comes after them."""
    if getattr(config, "use_bidirectional_attention", None):
        raise unsupported("attention", "bidirectional attention", "causal and sliding_window")


def unsupported(code: str, need: str, have: str) -> UnsupportedError:
    """The refusal of a config's feature that a family lacks."""
    remedy = "use a model without it"
    reason = Reason(code=f"model.{code}", need=need, have=have, remedy=remedy)
    return UnsupportedError([reason], what="this model")
