"""A dry run of a model that writes down what its attention asks for, call by call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.core.models.transformers_adapter.masks import (
    OTHER,
    MarkedMask,
    Visibility,
    make_marked_mask,
    recognize,
)
from quire.core.models.transformers_adapter.text_model import TextModel, set_attention

PROBE = "quire_probe"
_NUM_TOKENS = 6
_FATAL = ("position_bias", "indices", "relative_position_bias", "block_indices", "alibi")
"""Arguments that change what attention computes and that no plan of ours knows."""
_SELECTIONS = ("indices", "block_indices")
"""Those of them that depend on what the tokens are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of the attention interface in a forward."""

    module: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    scale: float
    visibility: Visibility
    soft_cap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a dry run found."""

    calls: tuple[AttentionCall, ...]
    objections: tuple[str, ...]
    """Why the paged way cannot be right; empty: it may be, and is tried at load."""
    logits_size: int | None
    selections: tuple[str, ...] = ()
    """Arguments by which the model tells its attention what to see, by content."""


class _Recorder:
    """Stands in for attention and for the making of masks while a model is probed."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.objections: list[str] = []
        self.selections: list[str] = []

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """Writes the call down; zeros of the right shape come back."""
        self._object(arguments, module)
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        self.calls.append(
            AttentionCall(
                module=type(module).__name__,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_size=query.shape[-1],
                v_head_size=value.shape[-1],
                scale=scale,
                visibility=self._visibility(attention_mask, module),
                soft_cap=arguments.get("softcap"),
                has_sinks=arguments.get("s_aux") is not None,
            )
        )
        if key.shape[-2] != query.shape[-2]:
            self.objections.append(f"{type(module).__name__} attends to other tokens than its own")
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return query.new_zeros(shape), None

    def make_mask(self, *args: Any, **arguments: Any) -> Tensor:
        """A mask that knows what it stands for."""
        length = arguments.get("q_length", _NUM_TOKENS)
        function = arguments.get("mask_function")
        visibility = Visibility("causal") if function is None else recognize(function)
        device = arguments.get("device") or torch.device("cpu")
        return make_marked_mask(visibility, int(length), torch.device(device))

    def _object(self, arguments: dict[str, Any], module: nn.Module) -> None:
        self.selections += [name for name in _SELECTIONS if arguments.get(name) is not None]
        for name in _FATAL:
            if arguments.get(name) is not None:
                self.objections.append(f"{type(module).__name__} passes {name} to its attention")

    def _visibility(self, mask: Tensor | None, module: nn.Module) -> Visibility:
        if isinstance(mask, MarkedMask):
            visibility = mask.visibility
        elif mask is None and getattr(module, "is_causal", True):
            visibility = Visibility("causal")
        else:
            visibility = OTHER
        if visibility == OTHER:
            self.objections.append(
                f"the mask of {type(module).__name__} carries more than causal, window or chunk"
            )
        return visibility


def probe(text_model: TextModel) -> Probe:
    """Runs a few tokens of one text and tells what attention was asked for. Never raises."""
    recorder = _Recorder()
    device = text_model.device
    token_ids = torch.arange(3, 3 + _NUM_TOKENS, device=device)
    positions = torch.arange(_NUM_TOKENS, device=device)
    size = None
    try:
        with _recording(recorder), set_attention(text_model.model, PROBE), torch.no_grad():
            size = text_model.whole_logits(token_ids, positions, _NUM_TOKENS).shape[-1]
    # A model's own code may fail in any way on stand-ins.
    except Exception as error:
        recorder.objections.append(f"a dry run fails with {type(error).__name__}: {error}")
    if not recorder.calls:
        recorder.objections.append("it never calls the attention interface")
    objections = tuple(dict.fromkeys(recorder.objections))
    return Probe(
        calls=tuple(recorder.calls),
        objections=objections,
        logits_size=size,
        selections=tuple(dict.fromkeys(recorder.selections)),
    )


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBE, recorder.attend)
    AttentionMaskInterface.register(PROBE, recorder.make_mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(PROBE, None)  # noqa: SLF001 - no way out
        AttentionMaskInterface._global_mapping.pop(PROBE, None)  # noqa: SLF001 - no way out
