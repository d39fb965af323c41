"""From the library on this machine to tokens, once per run: split, tokenizer, encoding."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from train_demo.batches import Texts, TokenizedCorpus, encode_texts, select_texts
from train_demo.corpus import (
    fingerprint,
    is_held_out,
    read_source_files,
    read_topics,
    standard_library_root,
)
from train_demo.tokenizer import train_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What every command of the script starts from; the same on every call on one machine."""

    tokenizer: PreTrainedTokenizerFast
    train_texts: Texts
    held_out_texts: Texts
    train: TokenizedCorpus
    held_out: TokenizedCorpus
    facts: dict[str, Any]
    """What the record of the training says of its text."""


def prepare(*, vocab_size: int, root: Path | None = None) -> Preparation:
    """Read, split and encode the corpus; the tokenizer sees the training split alone."""
    files = read_source_files(root or standard_library_root())
    topics = read_topics()
    train_texts = select_texts(files, topics, held_out=False)
    held_out_texts = select_texts(files, topics, held_out=True)
    tokenizer = train_tokenizer(train_texts.documents, vocab_size=vocab_size)
    train = encode_texts(tokenizer, train_texts)
    held_out = encode_texts(tokenizer, held_out_texts)
    facts = {
        "python": sys.version.split()[0],
        "num_source_files": len(files),
        "num_help_topics": len(topics),
        "corpus_sha256": fingerprint(
            [file.text for file in files] + [topic.text for topic in topics]
        ),
        "held_out_files": [file.path for file in files if is_held_out(file.path)],
        "train_tokens": _count_tokens(train),
        "held_out_tokens": _count_tokens(held_out),
        "characters_per_token": sum(map(len, train_texts.documents)) / train.num_document_tokens,
    }
    return Preparation(
        tokenizer=tokenizer,
        train_texts=train_texts,
        held_out_texts=held_out_texts,
        train=train,
        held_out=held_out,
        facts=facts,
    )


def _count_tokens(corpus: TokenizedCorpus) -> dict[str, int]:
    return {
        "documents": corpus.num_document_tokens,
        "snippets": sum(map(len, corpus.snippets)),
        "conversations": sum(map(len, corpus.conversations)),
    }
