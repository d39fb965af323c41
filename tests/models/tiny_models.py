"""Tiny random models that tell errors apart, saved as checkpoints that transformers and Quire both load.

    from tiny_models import TINY_VARIANTS, make_tiny_model
    directory = make_tiny_model("gemma2", tmp_path)

Attention is peaked, norms and biases are jittered, windows are shorter than a prompt of fifty tokens,
and the final norm has random signs (a tied random model would otherwise only repeat its last token).
So a wrong mask, a forgotten bias or a norm without its weight changes the greedy tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 512
BOS_ID, EOS_ID, PAD_ID, TURN_ID = 0, 1, 2, 3
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|turn|>")

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "tie_word_embeddings": False,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)
_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0 + 0.05 * i for i in range(6)],
    long_factor=[1.5 + 0.7 * i for i in range(6)],
    partial_rotary_factor=0.75,
)
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
_GEMMA: dict[str, Any] = {
    "head_dim": 24,  # not hidden / heads
    "query_pre_attn_scalar": 40,  # not the head size
    "sliding_window": 32,
    "layer_types": _SLIDING_THEN_FULL,
    "tie_word_embeddings": True,
}

_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GROUPED: dict[str, Any] = {
    **_EXPERTS,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "routed_scaling_factor": 1.5,
}

_LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 3,
    "head_dim": 24,
    "intermediate_size_mlp": 80,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 24,  # no multiple of a block
    "no_rope_layer_interval": 3,
    # So that every prompt has queries of several temperatures.
    "floor_scale": 8,
    "attn_scale": 0.5,
}

TINY_VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-headdim32": ("llama", {"head_dim": 32}),
    "llama-headdim20": ("llama", {"head_dim": 20}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-rope-linear": ("llama", {"rope_parameters": _rope("linear", factor=4.0)}),
    "llama-rope-dynamic": ("llama", {"rope_parameters": _rope("dynamic", factor=4.0)}),
    "llama-rope-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-rope-yarn-mscale": (
        "llama",
        {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16}},
    ),
    "llama-rope-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-swa": ("mistral", {"sliding_window": 32}),
    "mistral-headdim32": ("mistral", {"sliding_window": 32, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-swa": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-swa": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": _SLIDING_THEN_FULL,
        },
    ),
    "gemma2": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
    "gemma2-untied": ("gemma2", {**_GEMMA, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma2-nocap": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", {**_GEMMA}),
    "gemma3-5to1": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 6, "layer_types": None}),
    "gemma3-rope-linear": (
        "gemma3_text",
        {
            **_GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 2.0,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-swa": ("phi3", {"sliding_window": 32}),
    "phi3-partial": ("phi3", {"rope_parameters": _rope("default", partial_rotary_factor=0.5)}),
    # Its short factors, which transformers takes for a short text, need a max_model_len of at most 128.
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 128},
    ),
    "phi3-tied": ("phi3", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral-swa": ("mixtral", {"num_local_experts": 4, "sliding_window": 32}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **_EXPERTS,
            "num_experts": 6,
            "shared_expert_intermediate_size": 80,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {**_EXPERTS, "num_experts": 8, "head_dim": 24, "norm_topk_prob": True},
    ),
    "qwen3-moe-sparse2": (
        "qwen3_moe",
        {**_EXPERTS, "num_experts": 8, "head_dim": 16, "decoder_sparse_step": 2},
    ),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 32,
            "rope_parameters": _YARN,
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {**_LATENT, "topk_method": "group_limited_greedy", "attention_bias": True},
    ),
    "deepseek-v2-lite": ("deepseek_v2", {**_LATENT, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek-v3": ("deepseek_v3", {**_LATENT}),
    "deepseek-v3-yarn": (
        "deepseek_v3",
        {**_LATENT, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v3-half": ("deepseek_v3", {**_LATENT, "rope_interleave": False}),
    "glm4-moe": (
        "glm4_moe",
        {**_GROUPED, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    ),
    "llama4": ("llama4_text", {**_LLAMA4}),
    "llama4-interleaved": (
        "llama4_text",
        {
            **_LLAMA4,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "attention_bias": True,
            "attn_temperature_tuning": False,
            "rope_parameters": _LLAMA3,
        },
    ),
    # Types and rotation that do not go together: chunks without rotation, rotation over everything.
    "llama4-crossed": (
        "llama4_text",
        {
            **_LLAMA4,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["full_attention", "chunked_attention", "full_attention"],
            "moe_layers": [],
        },
    ),
}
"""Name of a variant to its `model_type` and what differs from the base configuration."""

FAMILIES = (
    "llama", "mistral-swa", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen3-moe", "gpt-oss",
    "deepseek-v3", "llama4",
)  # fmt: skip
"""One variant a family, where all of them would be too many."""

# Enough different words that a vocabulary of 512 fills up.
_TOKENIZER_TEXT = """\
The quick brown fox jumps over the lazy dog while five dozen liquor jugs are packed in my box.
A quire is a gathering of twenty-four sheets; pages are folded, stitched and bound into a volume.
def read_pages(path, limit=24):
    for number, line in enumerate(open(path)):
        if number >= limit: return
        yield line.strip()
What is the capital of France? The capital of France is Paris. Once upon a time there was a king.
Tell me a short story about a dragon and a scientist who counted every token twice, please.
"Where are you?" asked the librarian; nobody answered, because everybody had already left.
"""


def make_tiny_model(
    variant: str,
    path: Path,
    *,
    with_tokenizer: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Saves a tiny model of `variant` (a key of `TINY_VARIANTS`) and returns its directory, `path / variant`.

    `changes` override fields of its configuration. The same arguments make the same weights.
    """
    directory = Path(path) / variant
    make_torch_model(variant, dtype=dtype, seed=seed, **changes).save_pretrained(directory)
    if with_tokenizer:
        make_tiny_tokenizer().save_pretrained(directory)
    return directory


def make_torch_model(
    variant: str, *, dtype: str = "float32", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """The same model in memory, as transformers runs it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differences = TINY_VARIANTS[variant]
    settings = {**_BASE, **differences, **changes}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.do_sample = False
    has_offset_norms = model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_weight(name, parameter, seed, has_offset_norms))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(_random_weight(name, buffer, seed, has_offset_norms))
    return model.to(getattr(torch, dtype))


def _random_weight(
    name: str, parameter: torch.Tensor, seed: int, has_offset_norms: bool
) -> torch.Tensor:
    """Weights by the role that a parameter's name tells."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name:
        weight = 1.0 + 0.2 * noise
        if name.endswith("model.norm.weight"):
            weight *= torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1.0
        if "q_norm" in name or "k_norm" in name:
            weight *= 1.4
        return weight - 1.0 if has_offset_norms else weight
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed_tokens" in name:
        # Gemma multiplies by sqrt(hidden) after the look-up.
        return noise * (0.7 / parameter.shape[-1] ** 0.5 if has_offset_norms else 0.7)
    gain = 1.4 * 1.4 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.4
    return noise * (gain / parameter.shape[-1] ** 0.5)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `VOCAB_SIZE` tokens with a chat template: any text goes in and comes out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT.splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[BOS_ID],
        eos_token=SPECIAL_TOKENS[EOS_ID],
        pad_token=SPECIAL_TOKENS[PAD_ID],
        additional_special_tokens=[SPECIAL_TOKENS[TURN_ID]],
        chat_template=CHAT_TEMPLATE,
        model_max_length=_BASE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
