"""Tiny random encoders and classifiers, saved as checkpoints, and what transformers makes of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 96
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "mpnet": {},
    "modernbert": {"local_attention": 12, "global_attn_every_n_layers": 2},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "nomic_bert": {},
    "ernie": {},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "llama": {"num_key_value_heads": 2},
}
"""Model type to what differs from the small config."""
FLAT = {
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert", "electra", "albert",
    "nomic_bert", "ernie", "qwen3", "mistral", "llama",
}  # fmt: skip
"""Those that must run with all texts in one row; the others run by length."""


def make_checkpoint(kind: str, directory: Path, *, auto: str = "AutoModel", **changes: Any) -> Path:
    """Saves a random model of this type whose numbers tell errors apart."""
    import transformers

    settings = {**_SMALL, **ENCODERS[kind], **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(7)
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Peaked attention, and biases that are not zero.
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
            del name
    model.save_pretrained(directory)
    return directory


def texts(count: int = 9, *, longest: int = 40) -> list[list[int]]:
    """Random texts of many lengths; two of them as long as each other."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, longest, 5, 5, *range(7, 7 + 4 * count, 4)][:count]
    return [
        torch.randint(5, VOCAB_SIZE, (min(n, longest),), generator=generator).tolist()
        for n in lengths
    ]


def own_output(directory: Path, auto: str, token_ids: list[int], **arguments: Any) -> Any:
    """transformers' output for one text alone."""
    import transformers

    model = getattr(transformers, auto).from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([token_ids]), **arguments)


def write_layout(
    directory: Path, *, mode: str = "pooling_mode_mean_tokens", **changes: Any
) -> None:
    """A sentence-transformers layout around a checkpoint. `normalizes`, `dense`, `max_length`."""
    stages = ["Transformer", "Pooling"]
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({mode: True}))
    dense = changes.get("dense")
    if dense is not None:
        from safetensors.torch import save_file

        stages.append("Dense")
        (directory / "2_Dense").mkdir()
        sizes = {"in_features": dense.shape[1], "out_features": dense.shape[0], "bias": False}
        sizes["activation_function"] = "torch.nn.modules.activation.Tanh"
        (directory / "2_Dense" / "config.json").write_text(json.dumps(sizes))
        save_file({"linear.weight": dense}, directory / "2_Dense" / "model.safetensors")
    if changes.get("normalizes", True):
        stages.append("Normalize")
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(stages)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    if "max_length" in changes:
        length = {"max_seq_length": changes["max_length"], "do_lower_case": False}
        (directory / "sentence_bert_config.json").write_text(json.dumps(length))
