"""What stands before every engine core: input made requests, updates made outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.core.config import EngineConfig
from quire.core.engine.facts import EngineFacts
from quire.core.engine.generation_defaults import read_generation_defaults
from quire.core.engine.input_processor import InputProcessor, ModelLimits
from quire.core.engine.output_processor import OutputProcessor
from quire.core.engine.tokenizer import TextCodec, load_codec


@dataclass(frozen=True, slots=True)
class Front:
    """One engine's input and output side."""

    codec: TextCodec | None
    inputs: InputProcessor
    outputs: OutputProcessor


def make_front(
    config: EngineConfig,
    facts: EngineFacts,
    *,
    name_function: Callable[[Any], str] | None = None,
) -> Front:
    """The front for a core that is ready. Loads the tokenizer.

    Raises: CheckpointError for a tokenizer or defaults that cannot be read.
    """
    codec = load_codec(facts.model_directory, tokenizer=config.tokenizer)
    limits = ModelLimits(
        model=facts.model,
        vocab_size=facts.vocab_size,
        max_model_len=facts.max_model_len,
        logits_processors=frozenset(config.logits_processors),
    )
    inputs = InputProcessor(
        limits,
        codec=codec,
        defaults=read_generation_defaults(facts.model_directory),
        seed=config.seed,
        name_function=name_function,
    )
    return Front(codec=codec, inputs=inputs, outputs=OutputProcessor())
