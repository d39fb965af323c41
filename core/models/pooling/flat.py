"""All texts of a step in one row through transformers' modules, each attending to itself alone.

Attention comes to us through AttentionInterface; positions are said to the model, or put into its
table of positions where it would count them itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quire.core.errors import QuireError
from quire.core.models.pooling.batch import TextBatch
from quire.core.models.transformers_adapter.text_model import set_attention

NAME = "quire_flat"
"""What configs call this attention."""
_BINDING = "_quire_flat"
_UNKNOWN = ("position_bias", "relative_position_bias", "alibi", "softcap", "s_aux", "head_mask")
"""Arguments that change what attention computes and that are not served here."""


class FlatBody:
    """A model's body on a flat batch."""

    def __init__(self, body: Any, parameters: set[str]) -> None:
        """`parameters`: names that the body's forward takes."""
        self.body = body
        self.output: Any = None
        """Of the last run: in its form, what comes after the body is told its rows."""
        self._takes = parameters
        self._batch: TextBatch | None = None
        self._has_types = bool(getattr(body.config, "type_vocab_size", 0))
        self._position_tables: list[tuple[nn.Embedding, int]] = []
        _register()
        for module in body.modules():
            object.__setattr__(module, _BINDING, self)

    def learn_positions(self, run_alone: Any, num_tokens: int) -> None:
        """Finds the tables that a text alone reads at consecutive rows, and where it begins.

        `run_alone`: runs one text of `num_tokens` tokens.
        """
        seen: dict[nn.Embedding, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda module, inputs: seen.__setitem__(module, inputs[0])
            )
            for module in self.body.modules()
            if isinstance(module, nn.Embedding)
        ]
        try:
            run_alone()
        finally:
            for hook in hooks:
                hook.remove()
        for module, index in seen.items():
            first = _first_of_row(index, num_tokens)
            if first is not None:
                self._position_tables.append((module, first))
                module.register_forward_pre_hook(self._place)

    def run(self, batch: TextBatch) -> Tensor:
        """Rows [T, H] of the texts."""
        arguments: dict[str, Any] = {"input_ids": batch.token_ids.unsqueeze(0)}
        if "position_ids" in self._takes:
            arguments["position_ids"] = batch.positions.unsqueeze(0)
        if "token_type_ids" in self._takes and self._has_types:
            types = batch.token_types
            types = torch.zeros_like(batch.token_ids) if types is None else types
            arguments["token_type_ids"] = types.unsqueeze(0)
        if "use_cache" in self._takes:
            arguments["use_cache"] = False
        with self._running(batch):
            self.output = self.body(**arguments)
        rows: Tensor = self.output[0][0]
        return rows

    @contextmanager
    def _running(self, batch: TextBatch) -> Iterator[None]:
        self._batch = batch
        try:
            with set_attention(self.body, NAME):
                yield
        finally:
            self._batch = None

    def _place(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Positions of the flat batch, whatever the model counted."""
        if self._batch is None:
            return None
        first = next(first for table, first in self._position_tables if table is module)
        return ((self._batch.positions + first).unsqueeze(0), *inputs[1:])

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        arguments: dict[str, Any],
    ) -> Tensor:
        """q, k, v [1, heads, T, size] to [1, T, Hq, Dv]."""
        batch = self._batch
        if (
            batch is None
            or query.shape[2] != len(batch.token_ids)
            or key.shape[2] != query.shape[2]
        ):
            raise QuireError("attention was called outside a step, or over other tokens than its")
        unknown = [name for name in _UNKNOWN if arguments.get(name) is not None]
        if unknown:
            raise QuireError(f"{type(module).__name__} passes {', '.join(unknown)} to attention")
        is_causal = arguments.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window, scale = arguments.get("sliding_window"), arguments.get("scaling")
        out = query.new_empty((query.shape[2], query.shape[1], value.shape[3]))
        for begin, length in zip(batch.starts, batch.lengths, strict=True):
            part = slice(begin, begin + length)
            mask = None
            if window is not None and length > window:
                mask = _window_mask(length, int(window), is_causal=is_causal, like=query)
            attended = functional.scaled_dot_product_attention(
                query[:, :, part], key[:, :, part], value[:, :, part],
                attn_mask=mask, is_causal=is_causal and mask is None, scale=scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )  # fmt: skip
            out[part] = attended[0].transpose(0, 1)
        return out.unsqueeze(0)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; the module knows its model's step."""
    if attention_mask is not None:
        raise QuireError(f"{type(module).__name__} makes a mask of its own")
    flat: FlatBody = getattr(module, _BINDING)
    return flat.attend(module, query, key, value, arguments), None


def _register() -> None:
    """Makes the attention known to transformers; with no mask of that name, none is made."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _window_mask(length: int, window: int, *, is_causal: bool, like: Tensor) -> Tensor:
    """bool [n, n]: what is less than `window` tokens away."""
    places = torch.arange(length, device=like.device)
    distance = places.unsqueeze(1) - places
    if is_causal:
        return (distance >= 0) & (distance < window)
    return distance.abs() < window


def _first_of_row(index: Any, num_tokens: int) -> int | None:
    """Where consecutive indices of that many tokens begin; None: they are not."""
    if not isinstance(index, Tensor) or index.numel() != num_tokens:
        return None
    flat = index.flatten()
    first = int(flat[0])
    steps = torch.arange(first, first + num_tokens, device=flat.device)
    return first if num_tokens > 1 and torch.equal(flat, steps) else None
