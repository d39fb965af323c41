"""An encoder-decoder before its weights: made on the meta device, and run there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.core.errors import Reason, UnsupportedError
from quire.core.models.attention_groups import AttentionGroup
from quire.core.models.description import ModelDescription
from quire.core.models.model_config import dtype_of, eos_token_ids_of
from quire.core.models.seq2seq.cross_pages import LayerKeys, LayerShape, page_group
from quire.core.models.seq2seq.example_sources import PictureSource, SoundSource, measure_steps
from quire.core.models.seq2seq.flat_run import is_flat
from quire.core.models.seq2seq.source_model import AUDIO, IMAGE, TOKENS, SourceModel
from quire.core.models.transformers_adapter.checkpoint import (
    make_dummy_model,
    make_empty_model,
    read_config,
)
from quire.core.models.transformers_adapter.text_model import use_attention
from quire.core.source_features import PICTURES, SourceSteps

_TARGET_LENGTHS = ("max_target_positions", "max_decoder_position_embeddings")
_SOURCE_LENGTHS = ("max_source_positions", "max_encoder_position_embeddings")
_LENGTHS = ("max_position_embeddings",)
_WITHOUT_LENGTH = 4096
"""For models of relative positions, which know no length."""
_NUM_SOURCE, _NUM_TOKENS = 7, 5
_FLAT_NOTE = "an encoder-decoder: all requests of a step run in one row"
_CACHED_NOTE = "an encoder-decoder: requests are decoded one after the other, with a cache each"
_SAMPLED_OPS = ("softmax", "sample", "log_softmax")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqForm:
    """What a dry run found."""

    own: tuple[LayerShape, ...]
    cross: tuple[LayerShape, ...]
    source_width: int
    vocab_size: int
    steps: SourceSteps | None = None
    """Of an encoder that makes more of more sound."""
    num_source: int | None = None
    """Tokens of every picture."""


def class_of(config: Any) -> Any:
    """The class of transformers that generates from a source with this config; None: none does."""
    import transformers
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    if not getattr(config, "is_encoder_decoder", False):
        return None
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if named is not None and hasattr(named, "generate"):
            return None if name.endswith("ForCausalLM") else named
    for auto in (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq):
        mapped = auto._model_mapping.get(type(config), None)  # noqa: SLF001 - no public way
        if mapped is not None:
            return mapped
    return None


def describe_seq2seq(directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
    """Describes the model in `directory` from a dry run without weights.

    Raises: CheckpointError, UnsupportedError.
    """
    config = read_config(directory, trust_remote_code=trust_remote_code)
    source_model = SourceModel(make_empty_model(class_of(config), config))
    perceive(source_model, config, directory)
    # The one kind of attention whose masks are made without a look at the numbers.
    use_attention(source_model.model, "eager")
    try:
        form = find_form(source_model, config)
    except UnsupportedError:
        # Some look at numbers all the same, of which random ones will do.
        dummy = make_dummy_model(class_of(config), config, dtype="float32", seed=0)
        source_model = SourceModel(dummy)
        perceive(source_model, config, directory)
        form = find_form(source_model, config)
    dtype = dtype_of(config)
    groups = groups_of(form, config, None, dtype=dtype, cache_dtype=dtype, block_size=16)
    return describe_form(source_model, form, groups, config, directory, dtype=dtype)


def find_form(source_model: SourceModel, config: Any) -> Seq2SeqForm:
    """Runs a few tokens over a short source, and reads what is kept. Works without weights.

    Raises: UnsupportedError if what the model keeps is no keys and values, or it cannot be run.
    """
    name = type(source_model.model).__name__
    _refuse_books(config, name)
    try:
        steps = _steps_of(source_model, config, name)
        given = example_source(source_model, config, _NUM_SOURCE)
        with torch.no_grad():
            source = source_model.encode([{source_model.input_name: given}])[0]
            ids = torch.arange(3, 3 + _NUM_TOKENS, device=source_model.device)
            version = source._version  # noqa: SLF001 - who writes is not told otherwise
            output = source_model.decode(ids, source)
            source_model.copies_source = source._version != version  # noqa: SLF001
    # A model's own code may fail in any way on what others take.
    except UnsupportedError:
        raise
    except Exception as error:
        raise _unsupported(name, f"{type(error).__name__}: {error}") from error
    length = len(source)
    if not _is_plain(output.own, _NUM_TOKENS) or not _is_plain(output.cross, length):
        raise _unsupported(name, "its decoder keeps something else than keys and values a token")
    if len(output.own) != len(output.cross):
        raise _unsupported(name, "its decoder has layers without cross-attention")
    expected = length if source_model.input_kind == IMAGE else source_limit(config)
    if source_model.input_kind == TOKENS:
        expected = _NUM_SOURCE
    elif steps is not None:
        expected = steps.tokens_of(len(given))
    if length != expected:
        raise _unsupported(name, f"its encoder makes {length} tokens where {expected} were due")
    return Seq2SeqForm(
        steps=steps,
        num_source=length if source_model.input_kind == IMAGE else None,
        own=_shapes(output.own),
        cross=_shapes(output.cross),
        source_width=source.shape[-1],
        vocab_size=output.logits.shape[-1],
    )


def perceive(source_model: SourceModel, config: Any, directory: Path) -> None:
    """Gives a model that hears or sees its examples, unless it hears windows as Whisper does.

    Raises: UnsupportedError for other inputs, or if the checkpoint's own classes do not run.
    """
    if source_model.input_kind == TOKENS:
        return
    if source_model.input_kind == AUDIO:
        sizes = ("num_mel_bins", "max_source_positions")
        if not all(hasattr(config, name) for name in sizes):
            source_model.examples = SoundSource(directory)
        return
    if source_model.input_name != PICTURES:
        need = f"{source_model.input_name} as {config.model_type} takes them"
        have = "token ids, sound, and pictures of one size"
        name = type(source_model.model).__name__
        raise UnsupportedError([_reason(need, have)], what=f"the encoder of {name}")
    source_model.examples = PictureSource(directory)


def _steps_of(source_model: SourceModel, config: Any, name: str) -> SourceSteps | None:
    """Measured; from now on examples are in whole groups of frames. None: there are none."""
    if source_model.input_kind != AUDIO or source_model.examples is None:
        return None
    given = example_source(source_model, config, _NUM_SOURCE)

    def tokens_of(num_frames: int) -> int:
        array = given.new_zeros((num_frames, *given.shape[1:]))
        with torch.no_grad():
            return len(source_model.encode([{source_model.input_name: array}])[0])

    steps = measure_steps(tokens_of, len(given))
    if steps is None:
        raise _unsupported(name, "its encoder makes tokens of sound in no even steps")
    assert source_model.examples is not None
    source_model.examples.steps = steps
    return steps


def _refuse_books(config: Any, name: str) -> None:
    """Raises: UnsupportedError for a decoder that writes several tokens at once."""
    count = getattr(getattr(config, "decoder_config", None), "num_channels", 1)
    if isinstance(count, int) and count > 1:
        need = f"a decoder that writes {count} tokens of as many code books at once"
        raise UnsupportedError(
            [_reason(need, "one token of one vocabulary")], what=f"running {name}"
        )


def example_source(source_model: SourceModel, config: Any, length: int, seed: int = 3) -> Any:
    """A random source: `length` tokens, or a window of sound."""
    generator = torch.Generator().manual_seed(seed)
    device = source_model.device
    if source_model.examples is not None:
        return torch.from_numpy(source_model.examples.example(seed)).to(device)
    if source_model.input_kind == AUDIO:
        shape = (int(config.num_mel_bins), 2 * int(config.max_source_positions))
        return torch.randn(shape, generator=generator).to(device)
    high = min(100, source_vocab_size(config))
    return torch.randint(3, high, (length,), generator=generator).to(device)


def source_vocab_size(config: Any) -> int:
    """Ids that the encoder knows."""
    for holder in (config, getattr(config, "encoder", None)):
        for name in ("src_vocab_size", "vocab_size"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return 512


def source_limit(config: Any) -> int | None:
    """The most tokens that the encoder takes; None: it has no limit of its own."""
    encoder = getattr(config, "encoder", config)
    return _first(config, _SOURCE_LENGTHS) or _first(encoder, _LENGTHS)


def groups_of(
    form: Seq2SeqForm,
    config: Any,
    max_model_len: int | None,
    *,
    dtype: str,
    cache_dtype: str,
    block_size: int,
) -> tuple[AttentionGroup, ...]:
    """The two groups; sources without a limit of their own may be as long as requests."""
    limit = form.num_source or source_limit(config) or max_model_len or _WITHOUT_LENGTH
    settings: dict[str, Any] = {
        "dtype": dtype, "cache_dtype": cache_dtype, "block_size": block_size,
    }  # fmt: skip
    return (
        page_group("full", form.own, 0, **settings),
        page_group("cross", form.cross, 1, max_tokens=limit, **settings),
    )


def describe_form(
    source_model: SourceModel,
    form: Seq2SeqForm,
    groups: tuple[AttentionGroup, ...],
    config: Any,
    directory: Path,
    *,
    dtype: str,
) -> ModelDescription:
    """The description of a model of that form."""
    decoder = getattr(config, "decoder", config)
    parameters = {id(p): p.numel() for p in source_model.model.parameters()}
    hears = source_model.input_kind == AUDIO
    return ModelDescription(
        architecture=type(source_model.model).__name__,
        checkpoint_dtype=dtype_of(config),
        dtype=dtype,
        cache_dtype=dtype,
        vocab_size=form.vocab_size,
        max_model_len=_first(config, _TARGET_LENGTHS)
        or _first(decoder, _LENGTHS)
        or _WITHOUT_LENGTH,
        hidden_size=form.source_width,
        num_layers=len(form.own),
        num_parameters=sum(parameters.values()),
        attention_groups=groups,
        ops=_SAMPLED_OPS,
        eos_token_ids=eos_token_ids_of(directory, config),
        row_elements=24 * form.source_width + form.vocab_size,
        implementation="transformers",
        tasks=("generate", "transcribe") if hears else ("generate",),
        encoder_input=source_model.input_kind,
        source_steps=form.steps,
        notes=(_FLAT_NOTE if is_flat(source_model.model) else _CACHED_NOTE,),
    )


def _is_plain(layers: Sequence[LayerKeys], length: int) -> bool:
    return bool(layers) and all(
        keys.ndim == 3 and keys.shape[1] == length and values.shape[1] == length
        for keys, values in layers
    )


def _shapes(layers: Sequence[LayerKeys]) -> tuple[LayerShape, ...]:
    return tuple(
        LayerShape(num_heads=keys.shape[0], head_size=keys.shape[2], v_head_size=values.shape[2])
        for keys, values in layers
    )


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _unsupported(name: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        [_reason(f"an encoder once and a decoder with keys and values ({found})", "no more")],
        what=f"running {name}",
    )


def _reason(need: str, have: str) -> Reason:
    return Reason(
        code="model.encoder_decoder",
        need=need,
        have=have,
        remedy="use another encoder-decoder; docs/encoder-decoder.md lists those that run",
    )
