"""What is asked in a measurement: made here of words, or read from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError

DATASETS = ("random", "shared-prefix", "demo-text", "multi-turn")
_WORDS = [
    "list",
    "of",
    "the",
    "values",
    "in",
    "a",
    "file",
    "that",
    "returns",
    "each",
    "line",
    "as",
    "text",
    "with",
    "an",
    "index",
    "and",
    "some",
    "names",
    "for",
    "every",
    "call",
    "when",
    "it",
    "is",
    "done",
    "or",
    "else",
    "raises",
    "an",
    "error",
    "about",
    "what",
    "was",
    "asked",
    "and",
    "what",
    "there",
    "is",
]
_TURNS = 4
_PREFIXES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request: a prompt, or a conversation."""

    prompt: str | list[int] = ""
    messages: tuple[dict[str, str], ...] = ()
    output_len: int | None = None
    """Of the data set's own answer; None: what the command says."""

    def body(self, *, is_chat: bool) -> dict[str, Any]:
        """Its part of a request's body."""
        if is_chat:
            own = {"role": "user", "content": str(self.prompt)}
            return {"messages": list(self.messages or (own,))}
        return {"prompt": self.prompt or _as_text(self.messages)}


def make_questions(kind: str, number: int, length: int, seed: int) -> list[Question]:
    """`number` questions of about `length` tokens, by words, since no tokenizer is asked.

    Raises: ConfigError for a data set that is unknown.
    """
    rng = random.Random(seed)
    if kind == "shared-prefix":
        return _shared_prefix(number, length, rng)
    if kind == "demo-text":
        return [Question(prompt=_demo_text(length, rng)) for _ in range(number)]
    if kind == "multi-turn":
        return _multi_turn(number, length, rng)
    if kind == "random":
        return [Question(prompt=_words(length, rng)) for _ in range(number)]
    known = ", ".join(DATASETS)
    raise ConfigError(f"data set {kind!r} is unknown; choose one of {known}, or give a file")


def read_questions(path: Path, number: int) -> list[Question]:
    """`number` questions of a file, repeated if there are fewer.

    `.json`: ShareGPT's conversations; `.jsonl`: objects with `prompt` or `messages`; else a prompt
    a line. Raises: ConfigError naming the file.
    """
    try:
        found = list(_questions_of(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the questions in {path} cannot be read: {error!r}") from error
    if not found:
        raise ConfigError(f"{path} holds no questions")
    return [found[index % len(found)] for index in range(number)]


def _questions_of(path: Path) -> Iterator[Question]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        for entry in json.loads(text):
            yield from _of_sharegpt(entry)
        return
    for line in filter(str.strip, text.splitlines()):
        if path.suffix == ".jsonl":
            yield _of_object(json.loads(line))
        else:
            yield Question(prompt=line)


def _of_sharegpt(entry: dict[str, Any]) -> Iterator[Question]:
    """The first question of a conversation, with the length of its answer, in words."""
    turns = entry.get("conversations", entry.get("conversation", []))
    if len(turns) < 2:
        return
    asked, answered = (turn.get("value", turn.get("content", "")) for turn in turns[:2])
    if asked:
        yield Question(prompt=asked, output_len=max(1, len(answered.split())))


def _of_object(entry: dict[str, Any]) -> Question:
    body = entry.get("body", entry)
    length = body.get("max_tokens", body.get("output_len"))
    if "messages" in body:
        return Question(messages=tuple(body["messages"]), output_len=length)
    return Question(prompt=body["prompt"], output_len=length)


def _shared_prefix(number: int, length: int, rng: random.Random) -> list[Question]:
    """Few beginnings, each with many ends: three quarters of a prompt are another's too."""
    shared = [_words(length * 3 // 4, rng) for _ in range(_PREFIXES)]
    rest = max(1, length - length * 3 // 4)
    return [
        Question(prompt=f"{shared[index % _PREFIXES]} {_words(rest, rng)}")
        for index in range(number)
    ]


def _multi_turn(number: int, length: int, rng: random.Random) -> list[Question]:
    """Conversations of four turns: each request brings all that was said before it."""
    questions: list[Question] = []
    while len(questions) < number:
        said: list[dict[str, str]] = []
        for _ in range(_TURNS):
            said.append({"role": "user", "content": _words(max(1, length // _TURNS), rng)})
            questions.append(Question(messages=tuple(said)))
            said.append({"role": "assistant", "content": _words(max(1, length // _TURNS), rng)})
    return questions[:number]


def _demo_text(length: int, rng: random.Random) -> str:
    """The beginning of a function, as the demo model has learned to continue."""
    name = "_".join(rng.sample(_WORDS, 2))
    return f'def {name}(value):\n    """{_words(max(1, length - 12), rng)}."""\n    '


def _words(number: int, rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=max(1, number)))


def _as_text(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)
