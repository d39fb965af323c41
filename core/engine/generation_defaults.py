"""What a model's files say about generation: where its output ends, and how its authors sample."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Read from `generation_config.json` and, for the end of sequence, `config.json`."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `SamplingParams`."""


def read_generation_defaults(directory: str) -> GenerationDefaults:
    """The defaults of the model in `directory`; missing files say nothing.

    Raises: CheckpointError for a file that is not JSON.
    """
    generation = read_json(Path(directory) / "generation_config.json")
    config = read_json(Path(directory) / "config.json")
    text_config = config.get("text_config")
    sources = [generation, config, text_config if isinstance(text_config, dict) else {}]
    eos = next((found for source in sources if (found := _ids(source.get("eos_token_id")))), ())
    return GenerationDefaults(eos_token_ids=eos, sampling=_sampling(generation))


def _sampling(generation: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: generation[name] for name in _SAMPLING_FIELDS if generation.get(name) is not None
    }
    if isinstance(generation.get("max_new_tokens"), int):
        found["max_tokens"] = generation["max_new_tokens"]
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(item for item in values if type(item) is int))


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where it is missing. Raises: CheckpointError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; repair or remove it") from error
    return content if isinstance(content, dict) else {}
