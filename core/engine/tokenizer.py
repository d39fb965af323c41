"""The model's tokenizer: found, loaded, and narrowed to what the engine asks of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError, RequestError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


class TextCodec:
    """Text to token ids and back, on a tokenizer of transformers. May be used from several threads.

    Satisfies `quire.core.engine.detokenizer.TokenDecoder`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()
        if self._backend is not None:
            # What the file says of truncation and padding is for training; nothing is cut unasked.
            self._backend.no_truncation()
            self._backend.no_padding()
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.num_known_ids = max(vocabulary.values(), default=-1) + 1
        self.special_ids = frozenset(self._special_ids())
        self.byte_values = self._byte_values(vocabulary)
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._token_texts: dict[int, str] = {}
        self._context = self._context_token()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognized."""
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text; faster than one by one."""
        if self._backend is not None:
            found = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in found]
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def encode_pair(
        self,
        text: str,
        pair: str | None,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
    ) -> tuple[list[int], list[int]]:
        """Token ids of one text or of two as the model reads them together, and their types.

        `max_tokens`: more are cut from the text, of two from the longer, on the side from which the
        model's tokenizer cuts; special tokens stay. Raises: ValueError if none would be left.
        """
        if self._backend is None:
            return self._encode_slowly(text, pair, add_special_tokens, max_tokens)
        texts = [text] if pair is None else [text, pair]
        parts = [self._backend.encode(one, add_special_tokens=False) for one in texts]
        if max_tokens is not None:
            num_special = self._backend.num_special_tokens_to_add(pair is not None)
            room = max_tokens - (num_special if add_special_tokens else 0)
            self._cut(parts, room)
        whole = self._backend.post_process(*parts, add_special_tokens=add_special_tokens)
        return whole.ids, whole.type_ids

    def _cut(self, parts: list[Any], room: int) -> None:
        if room < len(parts):
            raise ValueError(f"special tokens leave room for {max(room, 0)} tokens of text")
        lengths = [len(part) for part in parts]
        while sum(lengths) > room:
            longest = lengths.index(max(lengths))
            others = [n for i, n in enumerate(lengths) if i != longest]
            floor = max([room - sum(others), *(n for n in others if n < lengths[longest])])
            lengths[longest] = max(min(floor, lengths[longest] - 1), 1)
        for part, length in zip(parts, lengths, strict=True):
            part.truncate(length, direction=self.tokenizer.truncation_side)

    def _encode_slowly(
        self, text: str, pair: str | None, add_special_tokens: bool, max_tokens: int | None
    ) -> tuple[list[int], list[int]]:
        with self._lock:
            found = self.tokenizer(
                text, pair, add_special_tokens=add_special_tokens,
                truncation="longest_first" if max_tokens is not None else False,
                max_length=max_tokens,
            )  # fmt: skip
        ids = list(found["input_ids"])
        return ids, list(found.get("token_type_ids") or [0] * len(ids))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of all ids together; spaces are left as the tokens have them."""
        if self._backend is not None:
            text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
            return text
        return str(
            self.tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def token_text(self, token_id: int) -> str:
        """The text of one token as it stands in the middle of a text.

        Half characters show as U+FFFD.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._text_after_context(token_id)
        return text

    def bad_word_ids(self, word: str) -> list[tuple[int, ...]]:
        """The ways in which a text produces `word`: at its start and after a space."""
        bare = word.lstrip()
        ways = (self.encode(text, add_special_tokens=False) for text in (bare, " " + bare))
        return list(dict.fromkeys(tuple(ids) for ids in ways if ids))

    def _special_ids(self) -> set[int]:
        special = set(self.tokenizer.all_special_ids)
        if self._backend is None:
            return special
        added = self._backend.get_added_tokens_decoder()
        return {token_id for token_id, token in added.items() if token.special}

    def _byte_values(self, vocabulary: dict[str, int]) -> dict[int, int]:
        """Byte-fallback tokens, if this vocabulary has them and its decoder reads them so."""
        probe = vocabulary.get("<0x41>")
        if probe is None or self.decode([probe]) != "A":
            return {}
        names = {f"<0x{value:02X}>": value for value in range(256)}
        return {vocabulary[name]: value for name, value in names.items() if name in vocabulary}

    def _context_token(self) -> int | None:
        for token_id in reversed(self.encode("a", add_special_tokens=False)):
            if token_id not in self.special_ids and self.decode([token_id]):
                return token_id
        return None

    def _text_after_context(self, token_id: int) -> str:
        if token_id >= self.num_known_ids:
            return ""
        if self._context is None or token_id in self.byte_values:
            return self.decode([token_id])
        before = self.decode([self._context])
        both = self.decode([self._context, token_id])
        return both[len(before) :] if both.startswith(before) else self.decode([token_id])


def load_codec(directory: str, *, tokenizer: str | None = None) -> TextCodec | None:
    """The codec of the model in `directory`, or of `tokenizer` (a directory or hub id) instead.

    None if the model has no tokenizer and none was named: token ids alone can be served then.
    Raises: CheckpointError with the remedy for a tokenizer that cannot be loaded.
    """
    path = Path(tokenizer or directory)
    if tokenizer is None and not _has_tokenizer(path):
        return None
    if tokenizer is not None and path.is_dir() and not _has_tokenizer(path):
        raise no_tokenizer(tokenizer)
    return TextCodec(_load_from_transformers(tokenizer or directory))


def start_import(model: str, tokenizer: str | None) -> threading.Thread:
    """Begins to import what loads tokenizers, which takes seconds; join before `load_codec`.

    Does nothing for a directory that has none.
    """
    has_none = tokenizer is None and Path(model).is_dir() and not _has_tokenizer(Path(model))

    def import_it() -> None:
        if has_none:
            return
        # `load_codec` says why, if it cannot be imported.
        with contextlib.suppress(Exception):
            from transformers import AutoTokenizer  # noqa: F401

    thread = threading.Thread(target=import_it, name="quire-import-tokenizers", daemon=True)
    thread.start()
    return thread


def no_tokenizer(where: str) -> CheckpointError:
    """What to tell who needs text where there is no tokenizer."""
    return CheckpointError(
        f"no tokenizer was found: {where} holds none of {', '.join(_TOKENIZER_FILES)}; "
        "name one with tokenizer=..., or send token ids with detokenize=False"
    )


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / file).is_file() for file in _TOKENIZER_FILES)


def _load_from_transformers(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"the tokenizer {name} needs transformers, which is not installed; "
            'pip install "quire[torch]", or send token ids with detokenize=False'
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError and more for bad files
        raise CheckpointError(
            f"the tokenizer {name} cannot be loaded: {type(error).__name__}: {error}; "
            "repair its files, or name another with tokenizer=..."
        ) from error


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function with type hints and a docstring.

    Raises: RequestError if it cannot be told.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # transformers has its own kinds of error for bad docstrings
        raise RequestError(
            f"no schema can be made of tool {function!r}: {error}", param="tools"
        ) from error
    return schema
