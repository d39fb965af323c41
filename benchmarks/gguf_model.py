"""The random-weight model of a benchmark as GGUF, for the peers that read nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of a layer: Hugging Face's and GGUF's."""
FORMATS = {"bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
"""Class of precision to GGUF's name for the weights of matrices. Q4_0: groups of 32."""
_CONTEXT = 4096
_NORMAL, _CONTROL = 1, 3
"""Types of tokens."""


def write_gguf(directory: Path, kind: str) -> Path:
    """Writes a Qwen2 checkpoint beside itself as GGUF, unless it is there; `kind`: of `FORMATS`.

    Its tokens are made up: the benchmarks speak in ids.
    """
    target = directory / f"model-{kind}.gguf"
    if target.exists():
        return target
    import gguf
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "qwen2")
    config = AutoConfig.from_pretrained(directory)
    _add_settings(writer, config)
    _add_tokens(writer, config)
    quantization = gguf.GGMLQuantizationType[FORMATS[kind]]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{FORMATS[kind]}"])
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            values = file.get_tensor(name).to(torch.float32).numpy()
            _add_tensor(writer, _gguf_name(name), values, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def _add_settings(writer: Any, config: Any) -> None:
    writer.add_name("random weights")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokens(writer: Any, config: Any) -> None:
    """Bytes as every byte-level vocabulary has them, then names that no text contains."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = table + [f"<t{i}>" for i in range(config.vocab_size - len(table))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    # OpenVINO compiles no tokenizer that has no control token at all.
    ends = {config.bos_token_id, config.eos_token_id}
    writer.add_token_types([_CONTROL if i in ends else _NORMAL for i in range(len(tokens))])
    writer.add_token_merges([f"{table[0]} {table[0]}"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def _add_tensor(writer: Any, name: str, values: np.ndarray[Any, Any], kind: Any) -> None:
    import gguf

    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _gguf_name(name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    part, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{_TENSORS[part]}.{suffix}"
