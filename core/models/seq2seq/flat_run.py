"""Runs an encoder-decoder of transformers over one flat row of the tokens of many requests.

Attention comes to us through AttentionInterface; positions and T5's biases, which the modules would
take from the cache's length, are put into the modules while a step runs, and only then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quire.core.errors import QuireError
from quire.core.models.seq2seq.flat_attention import DecoderStep, EncoderStep

NAME = "quire_flat_encoder_decoder"
_BINDING = "quire_flat_run"
_FAMILIES = (
    "t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small",
    "plbart", "whisper",
)  # fmt: skip
"""Whose layers treat each token by itself but for attention: no experts with a capacity."""


class FlatRun:
    """A model whose modules are bound to the step that runs."""

    def __init__(self, model: nn.Module, *, encodes: bool) -> None:
        """`encodes`: whether sources of several lengths go through the encoder in one row."""
        self.model: Any = model
        self.encodes = encodes
        self._step: DecoderStep | EncoderStep | None = None
        configs: dict[int, Any] = {
            id(m.config): m.config for m in model.modules() if hasattr(m, "config")
        }
        self._configs = list(configs.values())
        self._stand_in: Any = None
        for module in model.modules():
            setattr(module, _BINDING, self)
        for stack in stacks_of(self.model, encodes=encodes):
            self._bind(stack)
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attend)

    def encode(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """The output [S, H] for each of several int64 [S] texts, and the class that held it."""
        spans, begin = [], 0
        for ids in inputs:
            spans.append((begin, begin + len(ids)))
            begin += len(ids)
        device = inputs[0].device
        positions = torch.cat([torch.arange(len(ids), device=device) for ids in inputs])
        with self._running(EncoderStep(positions=positions, spans=tuple(spans))):
            output = self.model.get_encoder()(
                input_ids=torch.cat(list(inputs)).unsqueeze(0), return_dict=True
            )
        return list(output[0][0].split([len(ids) for ids in inputs])), type(output)

    def decode(self, token_ids: Tensor, step: DecoderStep, encoded: Any, shapes: Any) -> Tensor:
        """Logits [T, V] of int64 [T] tokens.

        encoded: an encoder's output over the new sources, or over anything where there are none;
        shapes: (heads, size) of each layer's keys of sources.
        """
        is_kept = len(step.new_cross_slots) == 0
        with self._running(step):
            self._stand_in = encoded[0].new_zeros((1, *shapes[0][:1], 1, 1))
            output = self.model(
                decoder_input_ids=token_ids.unsqueeze(0),
                encoder_outputs=encoded,
                past_key_values=self._make_cache(len(shapes), is_kept=is_kept),
                use_cache=True,
                return_dict=True,
            )
        logits: Tensor = output.logits[0]
        return logits

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """[1, T, heads, size] of q, k, v [1, heads, T, size]."""
        step, scale = self._step, settings.get("scaling")
        assert step is not None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        bias = settings.get("position_bias")
        if isinstance(step, EncoderStep):
            return step.attend(q, k, v, scale, bias).unsqueeze(0)
        rows = q[0].transpose(0, 1)
        if k is self._stand_in:
            return step.attend_cross(module.layer_idx, rows, scale).unsqueeze(0)
        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
        return step.attend_own(module.layer_idx, rows, k, v, scale, bias).unsqueeze(0)

    def _make_cache(self, num_layers: int, *, is_kept: bool) -> Any:
        """Hands keys of the step through; those of sources go to the pages as they are made."""
        from transformers import DynamicCache, EncoderDecoderCache

        cross: Any = DynamicCache()
        if is_kept:
            for layer in range(num_layers):
                cross.update(self._stand_in, self._stand_in, layer)
                # What is stored may be a copy, and is told by its identity.
                cross.layers[layer].keys = cross.layers[layer].values = self._stand_in
        own: Any = DynamicCache()
        own.update = lambda k, v, *_, **__: (k, v)
        joined = EncoderDecoderCache(own, cross)
        if not is_kept:
            cross.update = self._keep_source
        return joined

    def _keep_source(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        assert isinstance(self._step, DecoderStep)
        self._step.write_cross(layer, k[0].transpose(0, 1), v[0].transpose(0, 1))
        return self._stand_in, self._stand_in

    @contextmanager
    def _running(self, step: DecoderStep | EncoderStep) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]  # noqa: SLF001
        self._step = step
        try:
            for config in self._configs:
                config._attn_implementation = NAME  # noqa: SLF001 - no public way
            yield
        finally:
            self._step = None
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name  # noqa: SLF001

    def _bind(self, stack: Any) -> None:
        embedding = getattr(stack, "embed_positions", None)
        if embedding is not None:
            embedding.forward = self._positioned(embedding.forward)
        for module in stack.modules():
            if getattr(module, "has_relative_attention_bias", False):
                module.compute_bias = self._biased(module.compute_bias)

    def _positioned(self, original: Any) -> Any:
        def forward(*arguments: Any, **settings: Any) -> Tensor:
            step = self._step
            if step is None:
                found: Tensor = original(*arguments, **settings)
            else:
                found = original(arguments[0], position_ids=step.positions)
            return found

        return forward

    def _biased(self, original: Any) -> Any:
        def compute_bias(*arguments: Any, **settings: Any) -> Tensor:
            step = self._step
            if step is None:
                found: Tensor = original(*arguments, **settings)
            elif isinstance(step, EncoderStep):
                longest = max(b - a for a, b in step.spans)
                found = original(longest, longest)
            else:
                # One query at the end, its keys turned about: by how far back they lie.
                found = original(1, step.max_len, past_seen_tokens=step.max_len - 1).flip(-1)
            return found

        return compute_bias


def flat_run(model: Any, *, reads_text: bool) -> FlatRun | None:
    """The model made ready for flat rows; None: of its kind this is not known to be sound."""
    if getattr(model.config, "model_type", None) not in _FAMILIES:
        return None
    if not all(_is_known(stack) for stack in stacks_of(model, encodes=reads_text)):
        return None
    return FlatRun(model, encodes=reads_text)


def stacks_of(model: Any, *, encodes: bool) -> list[Any]:
    """What runs in flat rows: the decoder, and the encoder where sources are of many lengths."""
    return [model.get_encoder(), model.get_decoder()] if encodes else [model.get_decoder()]


def is_flat(model: Any) -> bool:
    """Whether `flat_run` will try this model."""
    return getattr(model.config, "model_type", None) in _FAMILIES


def _is_known(stack: Any) -> bool:
    embedding = getattr(stack, "embed_positions", None)
    if embedding is not None:
        return "position_ids" in inspect.signature(embedding.forward).parameters
    return any(getattr(m, "has_relative_attention_bias", False) for m in stack.modules())


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
) -> tuple[Tensor, None]:
    """What transformers calls; the module knows whose step it is in."""
    if attention_mask is not None:
        raise QuireError(f"{type(module).__name__} makes a mask of its own")
    run: FlatRun = getattr(module, _BINDING)
    return run.attend(module, query, key, value, rest), None
