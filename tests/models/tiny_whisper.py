"""A tiny random Whisper with its tokenizer, its feature extractor and its tokens of times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_architectures import VOCAB_SIZE
from tiny_models import make_tiny_tokenizer
from tiny_seq2seq import MAX_SOURCE_POSITIONS, make_tiny_seq2seq

SAMPLE_RATE = 16_000
LANGUAGES = ("en", "de", "fr")
_SPECIAL = (
    "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
    "<|transcribe|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
_TIMES = tuple(f"<|{index * 0.02:.2f}|>" for index in range(MAX_SOURCE_POSITIONS + 1))
FIRST_SPECIAL = VOCAB_SIZE
FIRST_TIME = FIRST_SPECIAL + len(_SPECIAL)
EOS_ID = FIRST_SPECIAL - 1


def special_ids() -> dict[str, int]:
    """Whisper's own tokens, by their text."""
    return {name: FIRST_SPECIAL + index for index, name in enumerate(_SPECIAL)}


def make_tiny_whisper(directory: Path, seed: int = 0) -> Any:
    """Saves the checkpoint, whose window is one second, and returns the model."""
    from transformers import GenerationConfig, WhisperFeatureExtractor

    ids = special_ids()
    model = make_tiny_seq2seq("whisper", seed, vocab_size=FIRST_TIME + len(_TIMES))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"],
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES},
        task_to_id={name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=10,
        suppress_tokens=[7, 8, ids["<|startoftranscript|>"], ids["<|nospeech|>"]],
        begin_suppress_tokens=[9, EOS_ID],
        max_length=64,
    )
    model.save_pretrained(directory)
    tokenizer = make_tiny_tokenizer()
    fill = [f"<|unused{index}|>" for index in range(len(tokenizer), FIRST_SPECIAL)]
    tokenizer.add_tokens([*fill, *_SPECIAL, *_TIMES], special_tokens=True)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(EOS_ID)
    tokenizer.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(directory)
    return model
