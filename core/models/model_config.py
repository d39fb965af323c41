"""Reads a model's config.json and the token ids that end a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError, QuireError, Reason, UnsupportedError
from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families import Family, family_of
from quire.core.models.weights.checkpoint_quantization import (
    CheckpointQuantization,
    parse_checkpoint_quantization,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the JSON files of a model say."""

    family: Family
    decoder: DecoderSpec
    dtype: str
    """In which the checkpoint stores its weights."""
    eos_token_ids: tuple[int, ...]
    stored: CheckpointQuantization | None = None
    """How quantized weights are stored; None: they are plain."""


def read_model_config(directory: Path, family: Family | None = None) -> ModelConfig:
    """Reads config.json and generation_config.json; no weights. `family`: read it as this one.

    Raises: CheckpointError for missing or broken files and unknown architectures, UnsupportedError
    for features of a known architecture that Quire lacks.
    """
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    family = family or family_of(raw, where=directory)
    stored = parse_checkpoint_quantization(raw, directory)
    config = load_config(directory)
    return ModelConfig(
        family=family,
        decoder=_describe(family, config, directory),
        dtype=dtype_of(config),
        eos_token_ids=eos_token_ids_of(directory, config),
        stored=stored,
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises: CheckpointError if it is missing or broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a model is a directory with config.json and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return content


def load_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The Hugging Face config of a local directory.

    Raises: CheckpointError for what is not valid.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # Any field may be wrong in any way, and each check of transformers raises its own.
    except Exception as error:
        raise CheckpointError(f"{directory / 'config.json'} is not valid: {error}") from error


def _describe(family: Family, config: Any, directory: Path) -> DecoderSpec:
    try:
        return family.describe(config)
    except QuireError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} lacks what {family.architecture} needs: {error!r}"
        ) from error


def refuse_quantized(raw: dict[str, Any], directory: Path) -> None:
    """Raises UnsupportedError if the config says that the weights are quantized."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "?"
    reason = Reason(
        code="model.quantization",
        need=f"weights quantized by {method}",
        have="plain float32, float16 and bfloat16 checkpoints",
        remedy="use the model's unquantized checkpoint",
    )
    raise UnsupportedError([reason], what=f"the checkpoint in {directory}")


def dtype_of(config: Any) -> str:
    """In which the checkpoint stores its weights."""
    text_config = config.get_text_config(decoder=True)
    dtype = getattr(text_config, "dtype", None) or getattr(config, "dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


def eos_token_ids_of(directory: Path, config: Any) -> tuple[int, ...]:
    """The ids that end a text.

    The generation config's where it has some, since it lists the ends of a turn as well.
    """
    path = directory / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        ids = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
