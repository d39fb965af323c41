"""A GGUF file as the directory that it stands for: config.json, tokenizer, a link to the file."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError
from quire.core.models.weights.gguf_architectures import (
    GgufArchitecture,
    Metadata,
    architecture_of,
    refusal,
)
from quire.core.models.weights.gguf_files import GGUF_NAME, open_reader

_LLAMA3_FACTORS = (8.0, 16.0, 32.0)
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""As Llama 3.1 and later have it; GGUF keeps only what follows from it."""


def make_gguf_directory(path: Path, cache: Path) -> Path:
    """A directory under `cache` for the GGUF file, made once for each version of the file.

    Raises: CheckpointError, UnsupportedError.
    """
    path = path.resolve()
    stat = path.stat()
    key = hashlib.sha256(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache / "gguf" / f"{path.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    config = gguf_config(open_reader(path), path)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent))
    _save_tokenizer(path, made)
    (made / GGUF_NAME).symlink_to(path)
    (made / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    try:
        made.replace(target)
    except OSError:
        # Another process was first.
        if not (target / "config.json").is_file():
            raise
    return target


def gguf_config(reader: Any, path: Path) -> dict[str, Any]:
    """The config.json that the file's metadata amount to.

    Raises: CheckpointError, UnsupportedError.
    """
    metadata = Metadata(reader, path)
    known = architecture_of(metadata)
    try:
        config = _sizes(metadata, known)
        config["rope_parameters"] = _rope(metadata, known, config["head_dim"])
        config |= known.settings(metadata, config)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error} of its metadata; convert it again") from error
    tensors = metadata.tensors
    config["tie_word_embeddings"] = "output.weight" not in tensors
    has_bias = "blk.0.attn_q.bias" in tensors
    config["attention_bias"] = has_bias and not known.model_type.startswith("qwen2")
    for kind in ("bos", "eos"):
        config[f"{kind}_token_id"] = metadata.any(f"tokenizer.ggml.{kind}_token_id", None)
    config["dtype"] = _dtype({tensor.tensor_type.name for tensor in tensors.values()})
    return config


def _sizes(metadata: Metadata, known: GgufArchitecture) -> dict[str, Any]:
    """What every architecture has."""
    heads = int(metadata.own("attention.head_count"))
    hidden = int(metadata.own("embedding_length"))
    return {
        "architectures": [known.architecture],
        "model_type": known.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": int(metadata.own("block_count")),
        "intermediate_size": int(metadata.own("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.own("attention.head_count_kv", heads)),
        "head_dim": int(metadata.own("attention.key_length", hidden // heads)),
        "rms_norm_eps": float(metadata.own("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": int(metadata.own("context_length")),
        "vocab_size": int(metadata.tensors["token_embd.weight"].shape[1]),
    }


def _rope(metadata: Metadata, known: GgufArchitecture, head_size: int) -> dict[str, Any]:
    path, tensors = metadata.path, metadata.tensors
    theta = float(metadata.own("rope.freq_base", 10000.0))
    rotated = int(metadata.own("rope.dimension_count", head_size))
    kind = str(metadata.own("rope.scaling.type", "none"))
    plain = {"rope_type": "default", "rope_theta": theta}
    if rotated != head_size and not known.rotates_part:
        raise refusal(path, f"{rotated} rotated of {head_size} numbers", "all of them")
    if "rope_freqs.weight" in tensors:
        return {**plain, **_llama3_of(tensors["rope_freqs.weight"].data, theta, head_size, path)}
    if kind == "none" or "rope_factors_long.weight" in tensors:
        return plain
    if kind == "linear":
        return {
            **plain,
            "rope_type": "linear",
            "factor": float(metadata.own("rope.scaling.factor")),
        }
    raise refusal(path, f"rotary scaling {kind} as GGUF", "none, linear, Llama 3's")


def _llama3_of(stored: Any, theta: float, head_size: int, path: Path) -> dict[str, Any]:
    """The settings from which the stored divisors of frequencies follow."""
    import numpy as np

    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    original = float(str(_LLAMA3["original_max_position_embeddings"]))
    smooth = (original / wavelengths - 1.0) / 3.0
    for factor in _LLAMA3_FACTORS:
        between = 1.0 / ((1 - smooth) / factor + smooth)
        wanted = np.where(wavelengths < original / 4.0, 1.0, between)
        wanted = np.where(wavelengths > original, factor, wanted)
        if wanted.shape == stored.shape and np.allclose(wanted, stored, rtol=1e-3):
            return {**_LLAMA3, "factor": factor}
    raise refusal(path, "rotary frequencies of its own", "those of Llama 3.1 to 3.3")


def _dtype(types: set[str]) -> str:
    """What to run in: as stored, or bfloat16 for what is quantized."""
    matrices = types - {"F32"}
    if not matrices:
        return "float32"
    return "float16" if matrices == {"F16"} else "bfloat16"


def _save_tokenizer(path: Path, target: Path) -> None:
    """The file's tokenizer, as transformers reads it."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)
    # A vocabulary may be wrong in any way.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer of {path} cannot be read ({error!r}); give the directory of the "
            "model that it was made from"
        ) from error
