"""Small tokenizers of the kinds that differ in how tokens become text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WORDS = ("the", "quire", "is", "a", "book", "of", "sheets", "ing", "s")


@lru_cache(maxsize=1)
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as letters (GPT-2, Llama 3, Qwen): any sequence of tokens is a sequence of bytes."""
    from tiny_models import make_tiny_tokenizer

    return make_tiny_tokenizer()


@lru_cache(maxsize=1)
def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before, single bytes for the rest (Llama 2, Gemma, Mistral)."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"]
    pieces = special + [f"<0x{value:02X}>" for value in range(256)]
    pieces += ["▁"] + [f"▁{word}" for word in _WORDS] + list(_WORDS) + [",", "é", "€"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@lru_cache(maxsize=1)
def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and ends of words that begin with ## (BERT)."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[SEP]", *_WORDS, *(f"##{word}" for word in _WORDS), ",", "."]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
