"""An encoder-decoder of transformers behind a signature that is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.core.models.seq2seq.cross_pages import LayerKeys
from quire.core.models.seq2seq.example_sources import Examples
from quire.core.models.seq2seq.flat_run import FlatRun
from quire.core.source_features import SOUNDS

TOKENS, AUDIO, IMAGE = "tokens", "audio", "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOutput:
    """What a run of the decoder brought."""

    logits: Tensor
    """[n, V]."""
    own: list[LayerKeys]
    """Of each layer, over all tokens of the text so far."""
    cross: list[LayerKeys]
    """Of each layer, over the encoder's output."""


class SourceModel:
    """Encodes what a request brings, and decodes with or without kept keys and values."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        find_encoder: Any = model.get_encoder
        self.encoder: Any = find_encoder()
        self._output_class: Any = None
        self._is_pooled = False
        self.flat: FlatRun | None = None
        """Set: many requests run in one flat row."""
        self.input_kind = TOKENS
        if self.model.main_input_name != "input_ids":
            self.input_kind = AUDIO if self.encoder.main_input_name in SOUNDS else IMAGE
        self.examples: Examples | None = None
        """What is made up for an encoder of pictures, or of sound of any length."""
        self.copies_source = False
        """Set: the decoder writes to the encoder's output that it is given."""
        self.goes_singly = False
        """Set: of several tokens each is decoded alone, as `generate` does; the model's own code
        hides none of them from those before where keys are kept."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def input_name(self) -> str:
        """What the encoder calls its input."""
        holder = self.model if self.input_kind == TOKENS else self.encoder
        return str(holder.main_input_name)

    def encode(self, arrays: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The encoder's output [S, H] for each of several inputs.

        Inputs of one shape run together, or texts in one row; nothing is padded, so that none
        depends on another.
        """
        if self.flat is not None and self.flat.encodes:
            rows, self._output_class = self.flat.encode([one[self.input_name] for one in arrays])
            return rows
        found: list[Tensor | None] = [None] * len(arrays)
        together: dict[tuple[int, ...], list[int]] = {}
        for index, given in enumerate(arrays):
            together.setdefault(tuple(given[self.input_name].shape), []).append(index)
        for indices in together.values():
            batch = torch.stack([arrays[i][self.input_name] for i in indices])
            if batch.is_floating_point():
                batch = batch.to(self.dtype)
            output = self.encoder(**{self.input_name: batch}, return_dict=True)
            self._output_class = type(output)
            hidden = output[0]
            # A tower of feature maps: the decoder reads what a projector made of them.
            self._is_pooled = hidden.dim() != 3 and "pooler_output" in output
            hidden = output["pooler_output"] if self._is_pooled else hidden
            for index, rows in zip(indices, hidden, strict=True):
                found[index] = rows
        return [rows for rows in found if rows is not None]

    def decode(
        self,
        token_ids: Tensor,
        source: Tensor,
        own: Sequence[LayerKeys] = (),
        cross: Sequence[LayerKeys] = (),
    ) -> DecoderOutput:
        """Runs int64 [n] tokens after those of `own` over a source [S, H].

        Given `cross`, the source's content does not count, only its length.
        """
        if self.goes_singly and len(token_ids) > 1:
            rows = []
            for token in torch.split(token_ids, 1):
                output = self.decode(token, source, own, cross)
                own, cross = output.own, output.cross
                rows.append(output.logits)
            return DecoderOutput(logits=torch.cat(rows), own=output.own, cross=output.cross)
        cache = _make_cache(own, cross)
        output = self._run(token_ids, source, past_key_values=cache, use_cache=True)
        return DecoderOutput(
            logits=output.logits[0],
            own=_layers(output.past_key_values.self_attention_cache),
            cross=_layers(output.past_key_values.cross_attention_cache),
        )

    def encoded(self, source: Tensor) -> Any:
        """Rows [S, H] as an encoder's output."""
        assert self._output_class is not None, "nothing was ever encoded"
        rows = source.clone() if self.copies_source else source
        name = "pooler_output" if self._is_pooled else "last_hidden_state"
        return self._output_class(**{name: rows.unsqueeze(0)})

    def whole_logits(self, token_ids: Tensor, source: Tensor) -> Tensor:
        """Logits [n, V] of an uncached run."""
        logits: Tensor = self._run(token_ids, source, use_cache=False).logits[0]
        return logits

    def single_logits(self, token_ids: Tensor, source: Tensor) -> Tensor:
        """Logits [n, V] of a token at a time, as `generate` runs the model."""
        before, self.goes_singly = self.goes_singly, True
        try:
            return self.decode(token_ids, source).logits
        finally:
            self.goes_singly = before

    def _run(self, token_ids: Tensor, source: Tensor, **settings: Any) -> Any:
        return self.model(
            decoder_input_ids=token_ids.unsqueeze(0),
            encoder_outputs=self.encoded(source),
            return_dict=True,
            **settings,
        )


def _make_cache(own: Sequence[LayerKeys], cross: Sequence[LayerKeys]) -> Any:
    """Nothing in it is thrown away behind a window: masks hide what must not be seen."""
    from transformers import DynamicCache, EncoderDecoderCache

    caches = []
    for layers in (own, cross):
        cache = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.unsqueeze(0), values.unsqueeze(0), index)
        caches.append(cache)
    return EncoderDecoderCache(*caches)


def _layers(cache: Any) -> list[LayerKeys]:
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]
