"""The paged way: all requests in one flat row, attention served by the device.

A layer of the cache is a call of the attention interface in a forward, in their order: a module
that runs several times a step has as many layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from quire.core.errors import QuireError
from quire.core.interface.attention import AttentionBackend, AttentionSpec
from quire.core.models.attention_groups import AttentionGroup
from quire.core.models.description import ModelDescription
from quire.core.models.step_context import StepContext
from quire.core.models.transformers_adapter.adapted_model import AdaptedModel, layers_in_order
from quire.core.models.transformers_adapter.both_ways import Span, attend_both_ways
from quire.core.models.transformers_adapter.hearing import senses_of
from quire.core.models.transformers_adapter.probing import AttentionCall, Probe
from quire.core.models.transformers_adapter.seeing import (
    Eyes,
    spans_of,
    use_text_attention,
)
from quire.core.models.transformers_adapter.text_model import TextModel, attention_of, use_attention

NAME = "quire"
"""What configs call our attention."""
_BINDING = "_quire_attention"
"""The attribute of a module that leads to its model's batch: some models hand no arguments down."""


class PagedModel(AdaptedModel):
    """One flat token batch through transformers' modules and the device's attention."""

    way = "paged"

    def __init__(
        self,
        text_model: TextModel,
        description: ModelDescription,
        backends: Sequence[AttentionBackend],
        *,
        max_model_len: int,
    ) -> None:
        super().__init__(text_model, description, backends, max_model_len=max_model_len)
        self._attention = _StepAttention(self.attention_groups, backends)
        self._own_attention = attention_of(text_model.model)
        register_attention()
        use_attention(text_model.model, NAME)
        self._eyes: Eyes | None = None
        make, sight = senses_of(text_model.model.config, description.accepts)
        if sight is not None:
            self._eyes = make(text_model, sight)
            self._attention.eyes = self._eyes
            use_attention(text_model.model, self._own_attention)
            use_text_attention(text_model, sight, NAME)
        for module in text_model.model.modules():
            object.__setattr__(module, _BINDING, self._attention)

    def release(self) -> None:
        """Gives the modules back to their own attention."""
        use_attention(self._text_model.model, self._own_attention)

    def forward(self, step: StepContext) -> Tensor:
        """Runs the T tokens of a step; rows [T, H]."""
        with self._attention.of(step):
            if step.images and self._eyes is not None:
                return self._eyes.run(step)
            return self._text_model.run(step.token_ids, step.positions).hidden


class _StepAttention:
    """Serves the calls of one step, one after the other."""

    def __init__(
        self, groups: Sequence[AttentionGroup], backends: Sequence[AttentionBackend]
    ) -> None:
        group_of = layers_in_order(groups)
        self._group_of = [group_of[layer] for layer in range(len(group_of))]
        self._specs = [group.spec for group in groups]
        self._backends = backends
        self._step: StepContext | None = None
        self._next_call = 0
        self._spans: list[Span] = []
        self.eyes: Eyes | None = None

    def of(self, step: StepContext) -> _StepAttention:
        """For the length of a `with`, calls belong to `step`."""
        self._step = step
        self._next_call = 0
        self._spans = [] if self.eyes is None else spans_of(self.eyes, step.images)
        return self

    def __enter__(self) -> None:
        """The step begins."""

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """The step is over.

        Raises: QuireError if it made fewer calls than the model was found to make.
        """
        self._step = None
        if error is None and self._next_call != len(self._group_of):
            raise QuireError(
                f"the model called attention {self._next_call} times in a step and "
                f"{len(self._group_of)} times when it was loaded; report this architecture"
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """q, k, v [1, heads, T, size] to [1, T, Hq, Dv]."""
        step, call = self._step, self._next_call
        if step is None or call >= len(self._group_of):
            raise QuireError("attention was called outside a step, or more often than at load")
        self._next_call += 1
        group = self._group_of[call]
        q, k, v = (_rows(tensor) for tensor in (query, key, value))
        out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
        self._backends[group].forward(
            q, k, v, step.caches[call], step.plans[group], out,
            sinks=None if sinks is None else sinks.float(),
        )  # fmt: skip
        backend = self._backends[group]
        for span in self._spans:
            attend_both_ways(
                span, self._specs[group], backend, step.caches[call], group, q, k, v, out
            )
        return out.unsqueeze(0)


def _rows(tensor: Tensor) -> Tensor:
    """[1, H, T, D] as [T, H, D] with a dense last dimension."""
    rows = tensor[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the interface passes it
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; the module knows its model's step."""
    attention: _StepAttention = getattr(module, _BINDING)
    return attention.attend(query, key, value, arguments.get("s_aux")), None


def register_attention() -> None:
    """Makes `quire` known to transformers; with no mask of that name, none is made."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def paged_groups(
    probe: Probe, *, dtype: str, cache_dtype: str, block_size: int
) -> tuple[AttentionGroup, ...]:
    """The groups of a probed model: calls that need the same share a block table."""
    layers_of: dict[AttentionSpec, list[int]] = {}
    for layer, call in enumerate(probe.calls):
        spec = _spec_of(call, dtype=dtype, cache_dtype=cache_dtype, block_size=block_size)
        layers_of.setdefault(spec, []).append(layer)
    names: dict[str, int] = {}
    groups = []
    for spec, layers in layers_of.items():
        name = (
            "full" if spec.window is None else f"{spec.kind.removesuffix('_window')}_{spec.window}"
        )
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}_{names[name]}"
        groups.append(AttentionGroup(name=name, spec=spec, layers=tuple(layers)))
    return tuple(groups)


def _spec_of(
    call: AttentionCall, *, dtype: str, cache_dtype: str, block_size: int
) -> AttentionSpec:
    return AttentionSpec(
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_size=call.head_size,
        v_head_size=call.v_head_size,
        scale=call.scale,
        dtype=dtype,
        cache_dtype=cache_dtype,
        block_size=block_size,
        kind=call.visibility.kind,
        window=call.visibility.window,
        soft_cap=call.soft_cap,
        has_sinks=call.has_sinks,
    )
