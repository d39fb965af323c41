"""What a prompt brings besides its tokens, made plain records in the front's process.

A model with an encoder, or one that sees or hears, has a `FeatureReader`: it turns the parts of a
prompt into token ids and `Feature`s. It may be slow (resampling, spectra, images), so fronts that
share an event loop call it in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quire.core.errors import RequestError
from quire.core.interface.worker import Feature, FeatureArray

if TYPE_CHECKING:
    from quire.core.engine.prompts import ParsedPrompt

MAX_FEATURE_BYTES = 64 << 20
"""Of all arrays of one request: they cross to the engine core whole."""

Encode = Callable[..., list[int]]
"""(text, *, add_special_tokens) to token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """A prompt as the core takes it."""

    token_ids: list[int]
    features: list[Feature] = field(default_factory=list)
    suppressed_ids: tuple[int, ...] = ()
    """Tokens that the output may not have."""
    begin_suppressed_ids: tuple[int, ...] = ()
    """Tokens that the output may not begin with."""
    text: str | None = None
    """The prompt for show, where the reader made it."""


class FeatureReader(Protocol):
    """Reads the prompts of one kind of model."""

    def read(self, parsed: ParsedPrompt, encode: Encode, *, add_special_tokens: bool) -> ModelInput:
        """Token ids and features of a prompt; safe in another thread.

        Raises: RequestError naming what is missing, broken or too much.
        """


def make_feature(
    kind: str, arrays: Mapping[str, Any], *, num_tokens: int, offset: int | None = None
) -> Feature:
    """A feature of numpy arrays, with the hash of their content.

    Raises: RequestError if it is larger than a request may be.
    """
    plain = {name: _plain(np.asarray(array)) for name, array in arrays.items()}
    check_feature_size(plain.values())
    digest = hashlib.blake2b(digest_size=32, person=b"quire-feature")
    for name, array in sorted(plain.items()):
        digest.update(f"{name} {array.dtype} {array.shape} {num_tokens} ".encode())
        digest.update(array.data)
    return Feature(
        kind=kind, key=digest.hexdigest(), num_tokens=num_tokens, offset=offset, arrays=plain
    )


def check_feature_size(arrays: Any) -> None:
    """Raises: RequestError if arrays are together larger than a request may bring."""
    size = sum(len(array.data) for array in arrays)
    if size > MAX_FEATURE_BYTES:
        raise RequestError(
            f"what the prompt brings takes {size:,} bytes; a request may bring "
            f"{MAX_FEATURE_BYTES:,}; make it smaller",
            param="multi_modal_data",
        )


def refuse_images(parsed: ParsedPrompt, model: str, why: Callable[[], str]) -> None:
    """Raises: RequestError with the cause if a prompt brings images to a model that takes none."""
    if "image" in parsed.data:
        raise RequestError(
            f"the prompt brings 'image'; {model!r} takes none: {why()}", param="multi_modal_data"
        )


def refuse_features(parsed: ParsedPrompt, model: str) -> None:
    """Raises: RequestError if a prompt brings what a model of text alone has no place for."""
    if parsed.data:
        named = ", ".join(map(repr, sorted(map(str, parsed.data))))
        raise RequestError(
            f"the prompt brings {named}; {model!r} takes text alone", param="multi_modal_data"
        )
    if parsed.source is not None:
        raise RequestError(
            f"encoder_prompt was given; {model!r} has no encoder; give prompt",
            param="encoder_prompt",
        )


def check_features(features: Sequence[Feature], max_source_tokens: int) -> None:
    """Raises: RequestError if an encoder would get more than it takes, or all is too large."""
    check_feature_size(array for feature in features for array in feature.arrays.values())
    num_source = sum(feature.num_tokens for feature in features if feature.offset is None)
    if num_source > max_source_tokens:
        raise RequestError(
            f"the encoder would get {num_source} tokens; it takes at most {max_source_tokens}; "
            "shorten what it is to read",
            param="prompt",
        )


def _plain(array: Any) -> FeatureArray:
    little = np.ascontiguousarray(array)
    little = little.astype(little.dtype.newbyteorder("<"), copy=False)
    return FeatureArray(data=little.tobytes(), dtype=little.dtype.name, shape=array.shape)
