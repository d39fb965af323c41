"""Tiny random encoder-decoders of every architecture that transformers knows.

from tiny_seq2seq import make_tiny_seq2seq, seq2seq_architectures
model = make_tiny_seq2seq("t5")
"""

from __future__ import annotations

from typing import Any

from tiny_architectures import VOCAB_SIZE, random_weight, tiny_config

MAX_SOURCE_POSITIONS = 50
"""Of a tiny Whisper: one second of sound."""

_SETTINGS: dict[str, dict[str, Any]] = {
    "whisper": {
        "max_source_positions": MAX_SOURCE_POSITIONS, "max_target_positions": 64,
        "num_mel_bins": 16, "suppress_tokens": None, "begin_suppress_tokens": None,
    },
    "fsmt": {
        "langs": ["en", "de"], "src_vocab_size": VOCAB_SIZE, "tgt_vocab_size": VOCAB_SIZE,
        "is_decoder": False,
    },
    "led": {"attention_window": [16, 16], "max_encoder_position_embeddings": 256,
            "max_decoder_position_embeddings": 256},
    "bigbird_pegasus": {"attention_type": "original_full", "block_size": 16},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "pad_token_id": 0},
    "pegasus_x": {"block_size": 16},
    "moonshine_streaming": {"num_key_value_heads": 4, "head_dim": 16},
    "marian": {"pad_token_id": 2}, "nllb-moe": {"expert_capacity": 64},
}  # fmt: skip


def seq2seq_architectures() -> list[str]:
    """The model types of transformers' text-to-text and speech-to-text mappings, sorted."""
    from transformers.models.auto import modeling_auto as auto

    return sorted(
        {
            *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            # Its encoder sees.
            "vision-encoder-decoder",
            # Of the mapping with head, by another name.
            "umt5",
            "switch_transformers",
        }
    )


def make_tiny_seq2seq(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of an architecture, in float32."""
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    config = tiny_seq2seq_config(model_type, **changes)
    autos = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForImageTextToText)
    auto = next(one for one in autos if type(config) in one._model_mapping)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinusoid" not in type(parameter).__name__.lower() and parameter.requires_grad:
                parameter.copy_(random_weight(name, parameter, seed))
        sign_last_norms(model, seed)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    return model


def sign_last_norms(model: Any, seed: int = 0) -> None:
    """Writes signs to norms that logits follow: without them a tied model repeats its last token."""
    for name, parameter in model.named_parameters():
        if _is_last_norm(name) and parameter.requires_grad:
            parameter.data.mul_(random_signs(parameter, seed))


def tiny_extractor(model: Any) -> Any:
    """The feature extractor of a tiny model that hears."""
    import transformers

    config = model.config
    encoder = getattr(config, "encoder_config", getattr(config, "encoder", config))
    if config.model_type == "whisper":
        return transformers.WhisperFeatureExtractor(
            feature_size=config.num_mel_bins, chunk_length=1
        )
    if model.get_encoder().main_input_name == "input_values":
        return transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    if config.model_type == "speech_to_text":
        size = config.input_feat_per_channel
        return transformers.Speech2TextFeatureExtractor(feature_size=size, num_mel_bins=size)
    if config.model_type == "cohere_asr":
        return transformers.CohereAsrFeatureExtractor(feature_size=encoder.num_mel_bins)
    return transformers.ParakeetFeatureExtractor(feature_size=encoder.num_mel_bins)


def _is_last_norm(name: str) -> bool:
    """Whether logits follow it."""
    return "decoder" in name and "norm" in name and "layers." not in name and "block." not in name


def random_signs(parameter: Any, seed: int) -> Any:
    """1 or -1 for each element."""
    import torch

    generator = torch.Generator().manual_seed(seed + 17)
    return torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0


def tiny_seq2seq_config(model_type: str, **changes: Any) -> Any:
    """The shrunk default config of an architecture."""
    from transformers import AutoConfig

    if model_type == "encoder-decoder":
        return _joined_config("EncoderDecoderConfig", tiny_config("bert"))
    if model_type == "speech-encoder-decoder":
        encoder = tiny_config("wav2vec2")
        encoder.conv_dim, encoder.conv_kernel, encoder.conv_stride = [16, 16], [10, 3], [320, 2]
        encoder.num_feat_extract_layers = 2
        return _joined_config("SpeechEncoderDecoderConfig", encoder)
    if model_type == "vision-encoder-decoder":
        encoder = tiny_config("vit")
        encoder.image_size, encoder.patch_size = 32, 8
        return _joined_config("VisionEncoderDecoderConfig", encoder)
    settings = {
        name: value
        for name, value in tiny_config(model_type).to_dict().items()
        if name not in ("model_type", "transformers_version", "architectures")
    }
    settings.pop("is_decoder", None)
    if getattr(AutoConfig.for_model(model_type), "is_encoder_decoder", False):
        settings["is_encoder_decoder"] = True
    settings |= {**_SETTINGS.get(model_type, {}), **changes}
    return AutoConfig.for_model(model_type, **settings)


def _joined_config(name: str, encoder: Any) -> Any:
    """Of two models, the decoder BERT's."""
    import transformers

    config = getattr(transformers, name).from_encoder_decoder_configs(encoder, tiny_config("bert"))
    config.encoder.is_decoder = False
    config.decoder.add_cross_attention = True
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 2, 1
    return config
