"""What a decoder is made of, read from its config.json: a hashable record that XLA compiles by.

Of Hugging Face's names for a thing, the newer one (`rope_parameters`) counts before the older one
(`rope_theta`, `rope_scaling`); what a file leaves out has the default of its architecture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.interface import CheckpointError, Reason, UnsupportedError

Config = Mapping[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """One kind of rotary position embedding."""

    kind: str
    """Of `_ROPE_KINDS`."""
    theta: float
    rotary_size: int
    """How many features of a head are rotated, from the first."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Embedding, [norm, attention, norm, gated MLP] x L, norm, head."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    windows: tuple[int | None, ...]
    """For each layer, its sliding window; None: it sees everything."""
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]
    """For each layer, the index into `ropes`."""
    attention_scale: float
    norm_eps: float
    activation: str
    norm_offset: float = 0.0
    """1 where the checkpoint has w of x * (1 + w)."""
    embedding_scale: float = 1.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    has_qk_norm: bool = False
    has_sandwich_norms: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    is_tied: bool = False
    """The head is the embedding table."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.windows)

    @property
    def groups(self) -> dict[int | None, tuple[int, ...]]:
        """Layers by window, in the order of their first layers: they share block tables."""
        layers: dict[int | None, tuple[int, ...]] = {}
        for layer, window in enumerate(self.windows):
            layers[window] = (*layers.get(window, ()), layer)
        return layers


def read_decoder(directory: Path) -> Decoder:
    """Reads config.json.

    Raises: CheckpointError if it is missing or broken; UnsupportedError with every reason.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = _architecture(config, path)
        _refuse(config, architecture)
        return _FAMILIES[architecture](config)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give a model directory") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks what its architecture needs: {error!r}") from error


def _architecture(config: Config, path: Path) -> str:
    named = config.get("architectures") or []
    known = next((name for name in named if name in _FAMILIES), None)
    if known is None:
        raise UnsupportedError(
            [_reason("architecture", ", ".join(named) or "no architecture", ", ".join(_FAMILIES))],
            what=str(path.parent),
        )
    return known


def _refuse(config: Config, architecture: str) -> None:
    kinds = {rope["rope_type"] for rope in _rope_parameters(config).values()}
    reasons = [
        _reason("rope", f"RoPE scaling {kind!r}", ", ".join(_ROPE_KINDS))
        for kind in sorted(kinds - set(_ROPE_KINDS))
    ]
    activation = _activation(config)
    if activation not in _ACTIVATIONS:
        reasons.append(_reason("activation", f"activation {activation!r}", ", ".join(_ACTIVATIONS)))
    if config.get("quantization_config"):
        reasons.append(_reason("quantization", "quantized weights", "float32, float16, bfloat16"))
    if config.get("use_bidirectional_attention"):
        reasons.append(_reason("attention", "bidirectional attention", "causal, sliding_window"))
    if reasons:
        raise UnsupportedError(reasons, what=f"this {architecture}")


def _reason(code: str, need: str, have: str) -> Reason:
    remedy = "use a model without it, or another backend"
    return Reason(code=f"jax.{code}", need=need, have=have, remedy=remedy)


# --- what all families read in the same way -----------------------------------------------------


def _read(config: Config, **differences: Any) -> Decoder:
    num_layers = int(config["num_hidden_layers"])
    head_size = _head_size(config)
    ropes = tuple(_rope(head_size, p) for p in _rope_parameters(config).values())
    fields: dict[str, Any] = {
        "architecture": config["architectures"][0],
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_heads": int(config["num_attention_heads"]),
        "num_kv_heads": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "head_size": head_size,
        "max_positions": int(config.get("max_position_embeddings", 2048)),
        "windows": (None,) * num_layers,
        "ropes": ropes,
        "layer_ropes": (0,) * num_layers,
        "attention_scale": head_size**-0.5,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "activation": _ACTIVATIONS[_activation(config)],
        "is_tied": bool(config.get("tie_word_embeddings", False)),
    }
    return Decoder(**fields | differences)


def _head_size(config: Config) -> int:
    given = config.get("head_dim")
    return int(given or config["hidden_size"] // config["num_attention_heads"])


def _activation(config: Config) -> str:
    return str(config.get("hidden_activation") or config.get("hidden_act") or "silu")


def _rope_parameters(config: Config) -> dict[str, dict[str, Any]]:
    """Parameters by type of layer; a model with one kind has it under `full_attention`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    if "full_attention" in given:
        return {kind: plain | parameters for kind, parameters in given.items()}
    old_name = {"rope_type": given["type"]} if "type" in given else {}
    kinds = {"full_attention": plain | old_name | given}
    if "rope_local_base_freq" in config:
        local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
        kinds["sliding_attention"] = local
    return kinds


def _rope(head_size: int, parameters: Config) -> Rope:
    return Rope(
        kind=parameters["rope_type"],
        theta=float(parameters["rope_theta"]),
        rotary_size=int(head_size * parameters.get("partial_rotary_factor", 1.0)),
        factor=float(parameters.get("factor") or 1.0),
        low_freq_factor=float(parameters.get("low_freq_factor") or 1.0),
        high_freq_factor=float(parameters.get("high_freq_factor") or 4.0),
        original_length=int(parameters.get("original_max_position_embeddings") or 8192),
    )


def _layer_types(config: Config, slides: Callable[[int], bool]) -> tuple[str, ...]:
    """As the file says it, or by the rule of its family."""
    given = config.get("layer_types")
    if given is not None:
        return tuple(given)
    return tuple(
        "sliding_attention" if slides(layer) else "full_attention"
        for layer in range(config["num_hidden_layers"])
    )


def _windows(config: Config, types: tuple[str, ...]) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


# --- families -----------------------------------------------------------------------------------


def _llama(config: Config) -> Decoder:
    has_bias = bool(config.get("attention_bias", False))
    return _read(
        config,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _mistral(config: Config) -> Decoder:
    return _read(config, windows=(config.get("sliding_window"),) * config["num_hidden_layers"])


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    if not config.get("use_sliding_window"):
        return (None,) * int(config["num_hidden_layers"])
    first = int(config.get("max_window_layers", 28))
    return _windows(config, _layer_types(config, lambda layer: layer >= first))


def _qwen2(config: Config) -> Decoder:
    return _read(config, windows=_qwen_windows(config), has_qkv_bias=True)


def _qwen3(config: Config) -> Decoder:
    has_bias = bool(config.get("attention_bias", False))
    return _read(
        config,
        windows=_qwen_windows(config),
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        head_size=int(config.get("head_dim") or 128),
    )


def _gemma(config: Config, types: tuple[str, ...], **differences: Any) -> Decoder:
    has_bias = bool(config.get("attention_bias", False))
    fields: dict[str, Any] = {
        "windows": _windows(config, types),
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "activation": _ACTIVATIONS[config.get("hidden_activation") or "gelu_pytorch_tanh"],
        "norm_offset": 1.0,
        "embedding_scale": float(config["hidden_size"]) ** 0.5,
        "logit_soft_cap": config.get("final_logit_softcapping"),
        "has_sandwich_norms": True,
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "is_tied": bool(config.get("tie_word_embeddings", True)),
    }
    return _read(config, **fields | differences)


def _gemma2(config: Config) -> Decoder:
    types = _layer_types(config, lambda layer: layer % 2 == 0)
    return _gemma(config, types, attention_soft_cap=config.get("attn_logit_softcapping"))


def _gemma3(config: Config) -> Decoder:
    every = int(config.get("sliding_window_pattern", 6))
    types = _layer_types(config, lambda layer: (layer + 1) % every != 0)
    parameters = _rope_parameters(config)
    order = list(parameters)
    layer_ropes = tuple(order.index(kind) if kind in order else 0 for kind in types)
    return _gemma(config, types, has_qk_norm=True, layer_ropes=layer_ropes)


_FAMILIES: Mapping[str, Callable[[Config], Decoder]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
}
