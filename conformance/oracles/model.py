"""A small Llama written down in numpy, and its checkpoint: the truth of level 2.

The whole context is computed anew each time; nothing is cached, batched or paged.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.conformance.oracles import layers

Array = npt.NDArray[Any]
Rounded = Callable[[Array], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyLlama:
    """The shape of the model: small, with grouped heads and a head size of its own."""

    head_size: int = 32
    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 112
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def config(self) -> dict[str, Any]:
        """The `config.json` of a checkpoint."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        }

    def weights(self) -> dict[str, Array]:
        """Random weights by name, float32, the same on every machine.

        Attention is peaked and the last norm has random signs, so that a wrong mask, position or
        norm changes tokens.
        """
        h, q = self.hidden_size, self.num_heads * self.head_size
        kv, i = self.num_kv_heads * self.head_size, self.intermediate_size
        shapes = {"model.embed_tokens": (self.vocab_size, h), "lm_head": (self.vocab_size, h)}
        norms = ["model.norm"]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            norms += [f"{prefix}input_layernorm", f"{prefix}post_attention_layernorm"]
            attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
            shapes |= {f"{attention}q_proj": (q, h), f"{attention}k_proj": (kv, h)}
            shapes |= {f"{attention}v_proj": (kv, h), f"{attention}o_proj": (h, q)}
            shapes |= {f"{mlp}gate_proj": (i, h), f"{mlp}up_proj": (i, h)}
            shapes |= {f"{mlp}down_proj": (h, i)}
        matrices = {f"{name}.weight": _matrix(name, shape) for name, shape in shapes.items()}
        return matrices | {f"{name}.weight": _norm_weight(name, h) for name in norms}

    def save(self, directory: Path) -> Path:
        """Writes the checkpoint, once; returns its directory."""
        from safetensors.numpy import save_file

        target = directory / f"tiny-llama-d{self.head_size}"
        if not (target / "config.json").exists():
            target.mkdir(parents=True, exist_ok=True)
            save_file(self.weights(), target / "model.safetensors", metadata={"format": "pt"})
            (target / "config.json").write_text(json.dumps(self.config(), indent=1))
        return target


def logits(
    model: TinyLlama,
    weights: Mapping[str, Array],
    token_ids: Sequence[int],
    rounded: Rounded = lambda x: x,
) -> Array:
    """The logits after each token: [n, V], in the dtype of the weights.

    `rounded` is applied to the result of every operator: the identity for the truth, rounding to a
    working dtype for the baseline. Source: Touvron et al. 2023, section 2.2.
    """
    x = weights["model.embed_tokens.weight"][np.asarray(token_ids)]
    cos, sin = _angles(model, len(token_ids), x.dtype)
    for layer in range(model.num_layers):
        part = {
            name.removeprefix(f"model.layers.{layer}."): array
            for name, array in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed = rounded(layers.rms_norm(x, part["input_layernorm.weight"], model.eps))
        x = rounded(x + _attention(model, part, normed, cos, sin, rounded))
        normed = rounded(layers.rms_norm(x, part["post_attention_layernorm.weight"], model.eps))
        x = rounded(x + _mlp(part, normed, rounded))
    x = rounded(layers.rms_norm(x, weights["model.norm.weight"], model.eps))
    return rounded(x @ weights["lm_head.weight"].T)


def log_softmax(x: Array) -> Array:
    """Log-probabilities over the last dimension."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _attention(
    model: TinyLlama,
    part: Mapping[str, Array],
    x: Array,
    cos: Array,
    sin: Array,
    rounded: Rounded,
) -> Array:
    n, size = len(x), model.head_size
    q, k, v = (
        rounded(x @ part[f"self_attn.{name}_proj.weight"].T).reshape(n, -1, size) for name in "qkv"
    )
    q = rounded(layers.rotary(q, cos, sin, is_interleaved=False))
    k = rounded(layers.rotary(k, cos, sin, is_interleaved=False))
    future = np.triu(np.ones((n, n), dtype=bool), 1)
    out = np.empty_like(q)
    for head in range(model.num_heads):
        group = head // (model.num_heads // model.num_kv_heads)
        scores = q[:, head] @ k[:, group].T * q.dtype.type(size**-0.5)
        scores[future] = -np.inf
        out[:, head] = np.exp(log_softmax(scores)) @ v[:, group]
    return rounded(rounded(out.reshape(n, -1)) @ part["self_attn.o_proj.weight"].T)


def _mlp(part: Mapping[str, Array], x: Array, rounded: Rounded) -> Array:
    halves = [rounded(x @ part[f"mlp.{name}_proj.weight"].T) for name in ("gate", "up")]
    gated = rounded(layers.gated_activation(np.concatenate(halves, axis=-1), "silu"))
    return rounded(gated @ part["mlp.down_proj.weight"].T)


def _angles(model: TinyLlama, n: int, dtype: Any) -> tuple[Array, Array]:
    """Source: Su et al. 2021, section 3.2.2."""
    exponents = np.arange(0, model.head_size, 2) / model.head_size
    angles = np.outer(np.arange(n), model.rope_theta**-exponents)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def _noise(name: str, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def _matrix(name: str, shape: tuple[int, int]) -> Array:
    is_peaked = name.endswith(("q_proj", "k_proj"))
    gain = 0.7 * shape[1] ** 0.5 if "embed" in name else 2.0 if is_peaked else 1.4
    return np.asarray(_noise(name, shape) * gain / shape[1] ** 0.5, dtype=np.float32)


def _norm_weight(name: str, size: int) -> Array:
    weight = 1 + 0.2 * _noise(name, (size,))
    signs = np.sign(_noise(f"{name}.signs", (size,))) if name == "model.norm" else 1.0
    return np.asarray(weight * signs, dtype=np.float32)
