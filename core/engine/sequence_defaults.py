"""How a model with an encoder starts its output, as its files say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.engine.generation_defaults import read_json
from quire.core.errors import CheckpointError

_ALWAYS_FREE = ("whisper",)
"""Whose prompts may begin with another token than the decoder's start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceDefaults:
    """From `generation_config.json` and, where that is silent, `config.json`."""

    start_ids: tuple[int, ...]
    """The first token of every output, and those that are forced after it."""
    suppressed_ids: tuple[int, ...] = ()
    begin_suppressed_ids: tuple[int, ...] = ()
    source_vocab_size: int | None = None
    """Ids that the encoder knows; None: those of the decoder."""
    prepends_start: bool = True
    """Whether a decoder's prompt without the first token gets it."""

    def start_of(self, target: Sequence[int] | None) -> list[int]:
        """The decoder's prompt: `target` as `generate` has it; where none was given, its start."""
        if not target:
            return list(self.start_ids)
        if self.prepends_start and target[0] != self.start_ids[0]:
            return [self.start_ids[0], *target]
        return list(target)


def read_sequence_defaults(directory: str) -> SequenceDefaults:
    """The defaults of the model in `directory`.

    Raises: CheckpointError if nothing tells with which token the decoder starts.
    """
    generation = read_json(Path(directory) / "generation_config.json")
    config = read_json(Path(directory) / "config.json")
    decoder = config.get("decoder")
    sources = [generation, config, decoder if isinstance(decoder, dict) else {}]
    start = _first(sources, "decoder_start_token_id")
    start = _first(sources, "bos_token_id") if start is None else start
    if start is None:
        raise CheckpointError(
            f"{directory} names no decoder_start_token_id; add it to generation_config.json"
        )
    encoder = config.get("encoder")
    encoders = [config, encoder if isinstance(encoder, dict) else {}]
    source_vocab_size = _first(encoders, "src_vocab_size") or _first(encoders, "vocab_size")
    return SequenceDefaults(
        source_vocab_size=source_vocab_size,
        start_ids=(start, *_forced(generation, config)),
        suppressed_ids=tuple(_numbers(generation.get("suppress_tokens"))) + _bad_ids(generation),
        begin_suppressed_ids=tuple(_numbers(generation.get("begin_suppress_tokens"))),
        prepends_start=config.get("model_type") not in _ALWAYS_FREE,
    )


def _forced(generation: dict[str, Any], config: dict[str, Any]) -> Iterator[int]:
    """Ids after the first: `forced_bos_token_id`, or Whisper's `forced_decoder_ids` in a row."""
    found = _first([generation, config], "forced_bos_token_id")
    if found is not None:
        yield found
        return
    pairs = generation.get("forced_decoder_ids") or ()
    for place, (index, token) in enumerate(pairs, start=1):
        if index != place or not isinstance(token, int):
            return
        yield token


def _bad_ids(generation: dict[str, Any]) -> tuple[int, ...]:
    """Single tokens of `bad_words_ids`, as Marian forbids its padding."""
    words = generation.get("bad_words_ids") or ()
    return tuple(word[0] for word in words if isinstance(word, list) and len(word) == 1)


def _first(sources: Sequence[dict[str, Any]], name: str) -> int | None:
    values = (source.get(name) for source in sources)
    return next((value for value in values if type(value) is int), None)


def _numbers(value: object) -> list[int]:
    return [item for item in value if type(item) is int] if isinstance(value, list) else []
