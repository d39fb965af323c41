"""What stands before every engine core: input made requests, updates made outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from quire.core.config import EngineConfig
from quire.core.engine.facts import EngineFacts
from quire.core.engine.feature_readers import AUDIO, make_reader
from quire.core.engine.generation_defaults import read_generation_defaults
from quire.core.engine.grammars import constraint_of, front_checker
from quire.core.engine.image_causes import why_no_images
from quire.core.engine.image_reader import IMAGE, make_image_reader
from quire.core.engine.input_processor import InputProcessor, ModelLimits
from quire.core.engine.output_processor import OutputProcessor
from quire.core.engine.pooling_desk import PoolingDesk
from quire.core.engine.sound_reader import make_sound_reader
from quire.core.engine.tokenizer import TextCodec, load_codec
from quire.core.engine.transcription import TIMESTAMP_RULE
from quire.core.sampling_params import SamplingParams
from quire.core.structured.compiler import GrammarChecker


@dataclass(frozen=True, slots=True)
class Front:
    """One engine's input and output side."""

    codec: TextCodec | None
    inputs: InputProcessor
    outputs: OutputProcessor
    pooling: PoolingDesk
    grammars: GrammarChecker

    def check_grammar(self, params: SamplingParams) -> None:
        """Compiles the grammar that is asked for, if one is; in the caller's time.

        Raises: RequestError with the reason, for one that cannot be compiled in its limits.
        """
        constraint = constraint_of(params, self.codec)
        if constraint is not None and constraint.grammar is not None:
            self.grammars.compile(constraint.grammar)


def make_front(
    config: EngineConfig,
    facts: EngineFacts,
    *,
    name_function: Callable[[Any], str] | None = None,
    stream_interval_s: float = 0.0,
) -> Front:
    """The front for a core that is ready. Loads the tokenizer.

    `stream_interval_s`: see `OutputProcessor`; who sets it calls `flush`.

    Raises: CheckpointError for a tokenizer or defaults that cannot be read.
    """
    codec = load_codec(facts.model_directory, tokenizer=config.tokenizer)
    limits = ModelLimits(
        model=facts.model,
        vocab_size=facts.vocab_size,
        max_model_len=facts.max_model_len,
        logits_processors=frozenset({*config.logits_processors, *_own_processors(facts)}),
        max_source_tokens=facts.max_source_tokens,
    )
    inputs = InputProcessor(
        limits,
        codec=codec,
        defaults=read_generation_defaults(facts.model_directory),
        seed=config.seed,
        name_function=name_function,
        reader=make_reader(config, facts)
        or make_image_reader(config, facts)
        or make_sound_reader(config, facts),
        why_no_images=None
        if IMAGE in (*facts.accepts, facts.encoder_input)
        else partial(why_no_images, facts),
    )
    return Front(
        codec=codec,
        inputs=inputs,
        outputs=OutputProcessor(stream_interval_s=stream_interval_s),
        pooling=PoolingDesk(facts, codec),
        grammars=front_checker(codec, facts.model, facts.vocab_size),
    )


def _own_processors(facts: EngineFacts) -> tuple[str, ...]:
    """Logits processors that the model itself brings."""
    return (TIMESTAMP_RULE,) if facts.encoder_input == AUDIO else ()
