"""The tokens with which Whisper is told what to do, and in which it tells times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.engine.audio import TranscriptionParams
from quire.core.engine.generation_defaults import read_json
from quire.core.errors import RequestError

_NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechTokens:
    """As a checkpoint's `generation_config.json` has them."""

    start: int
    languages: Mapping[str, int]
    """By code, `de`; empty: the model knows one language."""
    tasks: Mapping[str, int]
    no_timestamps: int | None
    previous: int | None
    """Begins a prompt of text that came before."""
    no_speech: int | None

    @property
    def first_timestamp(self) -> int | None:
        """Time zero; later ones follow it."""
        return None if self.no_timestamps is None else self.no_timestamps + 1

    def language_id(self, language: str) -> int | None:
        """The token of a language; None where the model knows one alone.

        Raises: RequestError for a language that the model does not know.
        """
        if not self.languages:
            return None
        found = self.languages.get(language.lower())
        if found is None:
            raise RequestError(
                f"language {language!r} is none of the model's, which are "
                f"{', '.join(sorted(self.languages))}",
                param="language",
            )
        return found

    def prompt(
        self,
        params: TranscriptionParams,
        language_id: int | None,
        before: Sequence[int],
    ) -> list[int]:
        """The decoder's prompt. `before`: tokens of text that came before.

        Raises: RequestError for a task that the model does not know.
        """
        ids = [self.previous, *before] if before and self.previous is not None else []
        ids.append(self.start)
        if language_id is not None:
            ids.append(language_id)
        if self.tasks:
            ids.append(self.tasks[params.task])
        elif params.task != "transcribe":
            raise RequestError("the model knows one language and does not translate", param="model")
        if not params.timestamps and self.no_timestamps is not None:
            ids.append(self.no_timestamps)
        return ids


def read_speech_tokens(directory: str, start: int, vocabulary: Mapping[str, int]) -> SpeechTokens:
    """The tokens of the model in `directory`; `vocabulary`: of its tokenizer."""
    generation = read_json(Path(directory) / "generation_config.json")
    languages = _ids(generation.get("lang_to_id"))
    tasks = _ids(generation.get("task_to_id"))
    is_multilingual = generation.get("is_multilingual", bool(languages))
    no_timestamps = generation.get("no_timestamps_token_id", vocabulary.get("<|notimestamps|>"))
    return SpeechTokens(
        start=start,
        languages={name.strip("<|>"): i for name, i in languages.items()}
        if is_multilingual
        else {},
        tasks=tasks if is_multilingual else {},
        no_timestamps=no_timestamps,
        previous=generation.get("prev_sot_token_id", vocabulary.get("<|startofprev|>")),
        no_speech=next((vocabulary[name] for name in _NO_SPEECH if name in vocabulary), None),
    )


def _ids(value: Any) -> dict[str, int]:
    return dict(value) if isinstance(value, dict) else {}
