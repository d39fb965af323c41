"""Tiny random models that take sound among their tokens, with processors made without a hub.

from tiny_hearing import PROCESSED, make_hearing_model, make_sound
directory = make_hearing_model("qwen2_audio", tmp_path)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

RATE = 16_000
MARK, MARK_ID = "<sound>", 4
_WORDS = [
    "what",
    "is",
    "said",
    "here",
    "the",
    "cat",
    "and",
    "a",
    "dog",
    "tell",
    "me",
    "user",
    "assistant",
    ":",
    "why",
    "when",
    "who",
    "how",
]
_AROUND = {"audio_bos_token": "<sound_begins>", "audio_eos_token": "<sound_ends>"}
"""Tokens that some processors put around a sound."""
_VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", MARK, *_AROUND.values(), *_WORDS]
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}"
    "{% if p.type == 'audio' %}" + MARK + " {% else %}{{ p.text }} {% endif %}"
    "{% endfor %}{% endif %} {% endfor %}assistant :"
)
PROCESSED = {
    "audioflamingo3": ("AudioFlamingo3Processor", "WhisperFeatureExtractor"),
    "glmasr": ("GlmAsrProcessor", "WhisperFeatureExtractor"),
    "moss_transcribe_diarize": (
        "MossTranscribeDiarizeProcessor",
        "MossTranscribeDiarizeFeatureExtractor",
    ),
    "musicflamingo": ("MusicFlamingoProcessor", "WhisperFeatureExtractor"),
    "qwen2_audio": ("Qwen2AudioProcessor", "WhisperFeatureExtractor"),
    "qwen3_asr": ("Qwen3ASRProcessor", "Qwen3ASRFeatureExtractor"),
}
"""The processor and the feature extractor of a family, as transformers names them."""


_CHANGES: dict[str, dict[str, Any]] = {
    "glmasr": {"audio_config.intermediate_size": 256},
    "nemo_speechlm": {
        f"audio_config.{part}.{size}": value
        for part in ("asr_config", "diarization_config.audio_config")
        for size, value in (
            ("hidden_size", 64),
            ("intermediate_size", 112),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 4),
        )
    }
    | {
        "audio_config.diarization_config.head_config.audio_hidden_size": 64,
        "word_timestamp_config.num_key_value_heads": 4,
    },
    "qwen3_asr": {"audio_config.output_dim": 64},
    "vibevoice": {
        "audio_config.num_filters": 2,
        "semantic_model_config.num_filters": 2,
        "diffusion_head_config.hidden_size": 64,
        "diffusion_head_config.intermediate_size": 64,
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config.num_filters": 2,
        "semantic_tokenizer_encoder_config.num_filters": 2,
    },
}
"""By family: what its config must say beside the sizes of all."""


def make_sound(seed: int, num_samples: int = 6_000) -> Any:
    """float32 [num_samples] of noise at `RATE`."""
    import numpy as np

    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.3).astype(np.float32)


def make_tokenizer() -> Any:
    """A word-level tokenizer with one token for sound."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(_VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens={"audio_token": MARK, **_AROUND},
    )  # fmt: skip
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def make_processor(family: str, model: Any) -> Any:
    """The family's own processor around a tokenizer of few words."""
    import inspect

    import transformers

    processor_name, extractor_name = PROCESSED[family]
    extractor_class = getattr(transformers, extractor_name)
    config = getattr(model.config, "audio_config", None) or model.config.encoder_config
    sizes = {"feature_size": getattr(config, "num_mel_bins", 80)}
    if extractor_name == "WhisperFeatureExtractor":
        sizes["chunk_length"] = 30
    made = getattr(transformers, processor_name)
    named: dict[str, Any] = {"tokenizer": make_tokenizer()}
    parameters = inspect.signature(made.__init__).parameters
    named["audio_processor" if "audio_processor" in parameters else "feature_extractor"] = (
        extractor_class(**sizes)
    )
    marks = {"audio_token": MARK, **_AROUND}
    if "chat_template" in parameters:
        named["chat_template"] = _TEMPLATE
    named |= {key: mark for key, mark in marks.items() if key in parameters}
    return made(**named)


def make_hearing_model(family: str, directory: Path) -> Path:
    """Saves a tiny random model with its processor. Returns the directory."""
    model = make_hearer(family)
    model.config.audio_token_id = MARK_ID
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    make_processor(family, model).save_pretrained(directory)
    return directory


def make_hearer(family: str) -> Any:
    """A tiny random model, in float32, whose tower fits its projector."""
    import torch
    from tiny_architectures import random_weight
    from tiny_seq2seq import tiny_seq2seq_config
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    config = tiny_seq2seq_config(family)
    for path, value in _CHANGES.get(family, {}).items():
        *parts, name = path.split(".")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    if getattr(config, "audio_token_id", None) is not None:
        config.audio_token_id = MARK_ID
    mapping = AutoModelForSeq2SeqLM._model_mapping
    auto = AutoModelForSeq2SeqLM if type(config) in mapping else AutoModelForSpeechSeq2Seq
    model = auto.from_config(config, dtype=torch.float32).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.copy_(random_weight(name, parameter, 0))
        model.tie_weights()
    return model
