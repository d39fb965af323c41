"""Documents as tokens, and the order in which a run reads them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from train_demo import conversations
from train_demo.conversations import Conversation
from train_demo.corpus import (
    Definition,
    SourceFile,
    Topic,
    definitions_of,
    is_held_out,
    is_snippet,
)
from train_demo.tokenizer import render

Tokens = NDArray[np.uint16]

NUM_GREETING_REPEATS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The corpus by kind, one split of it."""

    documents: tuple[str, ...]
    """Whole files and `help()` pages."""
    snippets: tuple[str, ...]
    """Single functions and classes, so that a prompt may start with `def`."""
    conversations: tuple[Conversation, ...]
    greetings: tuple[Conversation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedCorpus:
    """The same as `Texts` after encoding: every document is BOS ... EOS, uint16."""

    documents: tuple[Tokens, ...]
    snippets: tuple[Tokens, ...]
    conversations: tuple[Tokens, ...]
    greetings: tuple[Tokens, ...]

    @property
    def num_document_tokens(self) -> int:
        """Tokens of the files and pages, each counted once."""
        return sum(map(len, self.documents))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How an epoch is put together: shares of its tokens; the rest are whole documents."""

    snippet_share: float = 0.15
    conversation_share: float = 0.13

    @property
    def document_share(self) -> float:
        """The share of whole files and pages."""
        return 1.0 - self.snippet_share - self.conversation_share


def select_texts(files: Sequence[SourceFile], topics: Sequence[Topic], *, held_out: bool) -> Texts:
    """One split of the corpus: what is held out, or all the rest."""
    files = [file for file in files if is_held_out(file.path) == held_out]
    topics = [topic for topic in topics if is_held_out(f"topic:{topic.name}") == held_out]
    definitions = [definition for file in files for definition in definitions_of(file)]
    dialogues = [
        *conversations.about_definitions(definitions),
        *conversations.about_modules(files, [_module_docstring(file) for file in files]),
        *conversations.about_topics(topics),
        *(talk for talk in conversations.about_builtins() if is_held_out(talk.key) == held_out),
    ]
    return Texts(
        documents=(*(file.text for file in files), *(topic.text for topic in topics)),
        snippets=_unique_snippets(definitions),
        conversations=tuple(dialogues),
        greetings=() if held_out else tuple(conversations.greetings()),
    )


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Texts) -> TokenizedCorpus:
    """Encode everything once; conversations go through the chat template that is shipped."""
    return TokenizedCorpus(
        documents=_encode_plain(tokenizer, texts.documents),
        snippets=_encode_plain(tokenizer, texts.snippets),
        conversations=_encode_dialogues(tokenizer, texts.conversations),
        greetings=_encode_dialogues(tokenizer, texts.greetings),
    )


def epoch_windows(
    corpus: TokenizedCorpus, mix: Mix, *, context: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The windows of one epoch [W, context + 1] in reading order, a function of seed and epoch.

    All documents once and a sample of the rest, shuffled, laid end to end and cut; the last token
    of a window is the first of the next, so that every token is predicted once.
    """
    rng = np.random.default_rng([seed, epoch])
    windows = cut_windows(_epoch_documents(corpus, mix, rng), context=context)
    return windows[rng.permutation(len(windows))]


def cut_windows(documents: Sequence[Tokens], *, context: int) -> NDArray[np.int64]:
    """Documents end to end in windows [W, context + 1]; the remainder is dropped."""
    stream = np.concatenate(documents).astype(np.int64)
    num_windows = (len(stream) - 1) // context
    starts = np.arange(num_windows) * context
    return np.take(stream, starts[:, None] + np.arange(context + 1)[None, :])


def iterate_batches(
    corpus: TokenizedCorpus,
    mix: Mix,
    *,
    context: int,
    batch_size: int,
    seed: int,
    first_step: int,
) -> Iterator[NDArray[np.int64]]:
    """Endless batches [batch_size, context + 1], from step `first_step` on, as if never stopped."""
    step, epoch = 0, 0
    while True:
        windows = epoch_windows(corpus, mix, context=context, seed=seed, epoch=epoch)
        num_batches = len(windows) // batch_size
        for index in range(max(first_step - step, 0), num_batches):
            yield windows[index * batch_size : (index + 1) * batch_size]
        step, epoch = step + num_batches, epoch + 1


def _epoch_documents(corpus: TokenizedCorpus, mix: Mix, rng: np.random.Generator) -> list[Tokens]:
    num_epoch_tokens = corpus.num_document_tokens / mix.document_share
    chosen = [
        *corpus.documents,
        *_sample(corpus.snippets, mix.snippet_share * num_epoch_tokens, rng),
        *_sample(corpus.conversations, mix.conversation_share * num_epoch_tokens, rng),
        *corpus.greetings * NUM_GREETING_REPEATS,
    ]
    return [chosen[index] for index in rng.permutation(len(chosen))]


def _sample(pool: Sequence[Tokens], num_tokens: float, rng: np.random.Generator) -> list[Tokens]:
    """Distinct documents of the pool in random order until `num_tokens` are reached."""
    chosen: list[Tokens] = []
    for index in rng.permutation(len(pool)):
        if num_tokens <= 0:
            break
        chosen.append(pool[index])
        num_tokens -= len(pool[index])
    return chosen


def _encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[Tokens, ...]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return tuple(np.array([bos, *item.ids, eos], dtype=np.uint16) for item in encoded)


def _encode_dialogues(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Conversation]
) -> tuple[Tokens, ...]:
    rendered = [render(tokenizer, dialogue.messages) for dialogue in dialogues]
    encoded = tokenizer.backend_tokenizer.encode_batch(rendered, add_special_tokens=False)
    eos = tokenizer.eos_token_id
    return tuple(np.array([*item.ids, eos], dtype=np.uint16) for item in encoded)


def _unique_snippets(definitions: Sequence[Definition]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.source for item in definitions if is_snippet(item)))


def _module_docstring(file: SourceFile) -> str | None:
    try:
        return ast.get_docstring(ast.parse(file.text))
    except SyntaxError:
        return None
