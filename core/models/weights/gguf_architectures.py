"""The architectures of GGUF files: what each is called here, and what its metadata amount to.

Source: the metadata keys and tensor names of the ggml project's GGUF description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.core.errors import Reason, UnsupportedError

_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERT_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_PHI3_NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_LAYERS_OF_GEMMA2_27B, _LAYERS_OF_GEMMA3_27B = 46, 62
"""Their queries are scaled by the size of the model, which the file does not say."""


class Metadata:
    """The metadata of one file by the names that follow its architecture's."""

    def __init__(self, reader: Any, path: Path) -> None:
        self.path = path
        self.tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.architecture = str(self.any("general.architecture"))

    def any(self, name: str, *default: Any) -> Any:
        """A field by its whole name.

        Raises: KeyError if it is missing and there is no default.
        """
        found = self._fields.get(name)
        if found is not None:
            return found.contents()
        if default:
            return default[0]
        raise KeyError(name)

    def own(self, name: str, *default: Any) -> Any:
        """A field of the architecture."""
        return self.any(f"{self.architecture}.{name}", *default)

    def has_experts(self) -> bool:
        """Whether its MLPs are mixtures."""
        return "blk.0.ffn_gate_inp.weight" in self.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """How the files of one architecture are read."""

    architecture: str
    """As config.json names it."""
    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    """Of tensors in a layer, where they differ from a Llama's; `{expert}`: stacked ones."""
    is_in_turn: bool = False
    """Whether rows of queries and keys are stored with the halves of a head in turn."""
    norm_offset: float = 0.0
    """What the file has added to the weights of norms."""
    settings: Callable[[Metadata, dict[str, Any]], dict[str, Any]] = lambda _metadata, _known: {}
    """What config.json says beyond what all have, which it is given."""
    rotates_part: bool = False
    """Whether some numbers of a head may be left unrotated."""


def architecture_of(metadata: Metadata) -> GgufArchitecture:
    """The architecture of a file.

    Raises: UnsupportedError that lists those that are known.
    """
    key = metadata.architecture
    if key == "llama" and metadata.has_experts():
        return _MIXTRAL
    known = _ARCHITECTURES.get(key)
    if known is None or (metadata.has_experts() and "ffn_gate_exps" not in known.names):
        have = ", ".join(_ARCHITECTURES)
        raise refusal(metadata.path, f"architecture {key} as GGUF", have)
    return known


def refusal(path: Path, need: str, have: str) -> UnsupportedError:
    """What is raised for a file that holds what is not served."""
    reason = Reason(code="model.gguf", need=need, have=have, remedy="use the model's *.safetensors")
    return UnsupportedError([reason], what=f"the checkpoint in {path}")


def _gemma2(metadata: Metadata, known: dict[str, Any]) -> dict[str, Any]:
    num_layers = known["num_hidden_layers"]
    kinds = ("sliding_attention", "full_attention")
    return {
        **_gemma(metadata, known, num_layers == _LAYERS_OF_GEMMA2_27B),
        "attn_logit_softcapping": metadata.own("attn_logit_softcapping", None),
        "layer_types": [kinds[layer % 2] for layer in range(num_layers)],
    }


def _gemma3(metadata: Metadata, known: dict[str, Any]) -> dict[str, Any]:
    """Five layers of six slide, with a rotary base of their own."""
    num_layers = known["num_hidden_layers"]
    local = float(metadata.own("rope.freq_base_swa", 10000.0))
    return {
        **_gemma(metadata, known, num_layers == _LAYERS_OF_GEMMA3_27B),
        "attn_logit_softcapping": None,
        "layer_types": [
            "sliding_attention" if (layer + 1) % 6 else "full_attention"
            for layer in range(num_layers)
        ],
        "rope_parameters": {
            "full_attention": known["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _gemma(metadata: Metadata, known: dict[str, Any], is_largest: bool) -> dict[str, Any]:
    by_model = known["hidden_size"] // known["num_attention_heads"]
    return {
        "query_pre_attn_scalar": by_model if is_largest else known["head_dim"],
        "final_logit_softcapping": metadata.own("final_logit_softcapping", None),
        "sliding_window": int(metadata.own("attention.sliding_window")),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _phi3(metadata: Metadata, known: dict[str, Any]) -> dict[str, Any]:
    """Frequencies for short and long texts are tensors of the file."""
    rope = dict(known["rope_parameters"])
    rotated = int(metadata.own("rope.dimension_count", known["head_dim"]))
    rope["partial_rotary_factor"] = rotated / known["head_dim"]
    if "rope_factors_long.weight" in metadata.tensors:
        rope |= {
            "rope_type": "longrope",
            "long_factor": metadata.tensors["rope_factors_long.weight"].data.tolist(),
            "short_factor": metadata.tensors["rope_factors_short.weight"].data.tolist(),
            "original_max_position_embeddings": int(
                metadata.own("rope.scaling.original_context_length")
            ),
        }
        factor = metadata.own("rope.scaling.attn_factor", None)
        rope |= {} if factor is None else {"attention_factor": float(factor)}
    window = int(metadata.own("attention.sliding_window", 0))
    return {
        "rope_parameters": rope,
        "sliding_window": window or None,
        "original_max_position_embeddings": rope.get(
            "original_max_position_embeddings", known["max_position_embeddings"]
        ),
        "pad_token_id": None,
    }


def _mixtral(metadata: Metadata, _known: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": int(metadata.own("expert_count")),
        "num_experts_per_tok": int(metadata.own("expert_used_count")),
        "sliding_window": None,
    }


def _qwen_experts(metadata: Metadata, _known: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(metadata.own("expert_count")),
        "num_experts_per_tok": int(metadata.own("expert_used_count")),
        "moe_intermediate_size": int(metadata.own("expert_feed_forward_length")),
        "norm_topk_prob": metadata.architecture == "qwen3moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_experts(metadata: Metadata, known: dict[str, Any]) -> dict[str, Any]:
    shared = int(metadata.own("expert_shared_feed_forward_length"))
    return {**_qwen_experts(metadata, known), "shared_expert_intermediate_size": shared}


_MIXTRAL = GgufArchitecture(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    names=_MIXTRAL_NAMES,
    is_in_turn=True,
    settings=_mixtral,
)
_ARCHITECTURES = {
    "llama": GgufArchitecture(architecture="LlamaForCausalLM", model_type="llama", is_in_turn=True),
    "qwen2": GgufArchitecture(architecture="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": GgufArchitecture(architecture="Qwen3ForCausalLM", model_type="qwen3"),
    "qwen2moe": GgufArchitecture(
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        names=_EXPERT_NAMES,
        settings=_qwen2_experts,
    ),
    "qwen3moe": GgufArchitecture(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        names=_EXPERT_NAMES,
        settings=_qwen_experts,
    ),
    "gemma2": GgufArchitecture(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        names=_GEMMA_NAMES,
        norm_offset=1.0,
        settings=_gemma2,
    ),
    "gemma3": GgufArchitecture(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        names=_GEMMA_NAMES,
        norm_offset=1.0,
        settings=_gemma3,
    ),
    "phi3": GgufArchitecture(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        names=_PHI3_NAMES,
        settings=_phi3,
        rotates_part=True,
    ),
}
"""By `general.architecture`."""
