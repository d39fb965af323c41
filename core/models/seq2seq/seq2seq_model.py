"""An encoder-decoder as the runner sees it: the encoder once, the decoder request by request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire.core.errors import QuireError
from quire.core.models.seq2seq.cross_pages import CrossPlan, read_layers, write_layers
from quire.core.models.seq2seq.flat_attention import DecoderStep, plan_groups
from quire.core.models.transformers_adapter.pages import PagesPlan, RequestSlice

if TYPE_CHECKING:
    from quire.core.interface.attention import AttentionBackend
    from quire.core.models.attention_groups import AttentionGroup
    from quire.core.models.description import ModelDescription
    from quire.core.models.seq2seq.cross_pages import LayerKeys
    from quire.core.models.seq2seq.flat_run import FlatRun
    from quire.core.models.seq2seq.source_model import SourceModel
    from quire.core.models.step_context import StepContext

OWN, CROSS = 0, 1
"""The two groups, and their one layer each."""


class Seq2SeqModel:
    """A `LanguageModel` around a `SourceModel`."""

    can_be_recorded = False

    def __init__(
        self,
        source_model: SourceModel,
        description: ModelDescription,
        backends: Sequence[AttentionBackend],
        *,
        max_model_len: int,
        max_encoded_tokens: int,
        logits_processors: Mapping[str, Callable[..., Tensor]] | None = None,
    ) -> None:
        """`max_encoded_tokens`: as many encoder tokens run together at most."""
        self.logits_processors = dict(logits_processors or {})
        self.description = description
        self.attention_groups: tuple[AttentionGroup, ...] = description.attention_groups
        self.attention_backends = tuple(backends)
        self.max_model_len = max_model_len
        self.num_parameters = description.num_parameters
        self.source_model = source_model
        self.weight_bytes = sum(p.nbytes for p in source_model.model.parameters())
        self._max_encoded_tokens = max_encoded_tokens
        self._num_layers = len(self.attention_groups[OWN].pages) // 2

    @property
    def way(self) -> str:
        """`flat`: all requests in one row; `cached`: one after the other."""
        return "cached" if self.source_model.flat is None else "flat"

    def forward(self, step: StepContext) -> Tensor:
        """Encodes what new requests bring, then runs the T tokens; rows [T, V] are logits."""
        plan, cross = _plans(step)
        sources = self._encoded(step)
        if self.source_model.flat is not None:
            hidden = self._run_flat(self.source_model.flat, step, plan, cross, sources)
        else:
            rows = [
                self._run_request(step, plan, cross, index, sources.get(index))
                for index in range(len(plan.requests))
                if plan.requests[index].num_new
            ]
            hidden = torch.cat(rows)
        padding = len(step.token_ids) - len(hidden)
        return hidden if padding == 0 else torch.cat([hidden, hidden[-1:].expand(padding, -1)])

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows are logits already."""
        return hidden.float()

    def providers(self) -> dict[str, str]:
        """Everything is transformers'."""
        return {"forward": f"transformers ({self.way})", "paged_attention": "model"}

    def _encoded(self, step: StepContext) -> dict[int, Tensor]:
        """The encoder's output for each request that brings something, in as few runs as fit."""
        features = [feature for feature in step.features if feature.feature.offset is None]
        found: dict[int, Tensor] = {}
        begin = 0
        while begin < len(features):
            end, total = begin, 0
            while end < len(features) and (
                end == begin or total + features[end].feature.num_tokens <= self._max_encoded_tokens
            ):
                total += features[end].feature.num_tokens
                end += 1
            part = features[begin:end]
            for feature, hidden in zip(
                part, self.source_model.encode([one.arrays for one in part]), strict=True
            ):
                found[feature.request] = hidden
            begin = end
        return found

    def _run_flat(
        self,
        flat: FlatRun,
        step: StepContext,
        plan: PagesPlan,
        cross: CrossPlan,
        sources: dict[int, Tensor],
    ) -> Tensor:
        """Logits of all requests' tokens from one forward of the decoder."""
        num_tokens = plan.requests[-1].end
        slots = [_slots_of(cross, index, source) for index, source in sources.items()]
        own, groups = step.caches[OWN], plan_groups(plan, cross)
        decoder_step = DecoderStep(
            positions=step.positions[:num_tokens],
            own=own,
            cross=step.caches[CROSS],
            slot_mapping=plan.slot_mapping[:num_tokens],
            new_cross_slots=torch.cat(slots) if slots else plan.slot_mapping[:0],
            groups=groups,
            max_len=max(group.own_slots.shape[1] for group in groups),
        )
        shapes = [page.shape for page in self.attention_groups[CROSS].pages[::2]]
        source = torch.cat(list(sources.values())) if sources else self._stand_in(1)
        encoded = self.source_model.encoded(source)
        return flat.decode(step.token_ids[:num_tokens], decoder_step, encoded, shapes)

    def _run_request(
        self,
        step: StepContext,
        plan: PagesPlan,
        cross: CrossPlan,
        index: int,
        source: Tensor | None,
    ) -> Tensor:
        request = plan.requests[index]
        cross_slots = cross.slots(index)
        kept: list[LayerKeys] = []
        if source is None:
            source = self._stand_in(len(cross_slots))
            kept = read_layers(step.caches[CROSS], self._num_layers, cross_slots, source.dtype)
        else:
            cross_slots = _slots_of(cross, index, source)
        output = self.source_model.decode(
            step.token_ids[request.begin : request.end],
            source,
            self._past(step, plan, request, source.dtype),
            kept,
        )
        slots = plan.slot_mapping[request.begin : request.end]
        write_layers(step.caches[OWN], output.own, slots, first=request.num_past)
        if not kept:
            write_layers(step.caches[CROSS], output.cross, cross_slots)
        return output.logits

    def _past(
        self, step: StepContext, plan: PagesPlan, request: RequestSlice, dtype: torch.dtype
    ) -> list[LayerKeys]:
        if request.num_past == 0:
            return []
        slots = plan.slots(request, request.num_past)
        return read_layers(step.caches[OWN], self._num_layers, slots, dtype)

    def _stand_in(self, length: int) -> Tensor:
        """For a source whose keys and values are kept: only its length counts."""
        model = self.source_model
        width = self.description.hidden_size
        return torch.zeros((1, width), dtype=model.dtype, device=model.device).expand(length, -1)


def _slots_of(cross: CrossPlan, request: int, source: Tensor) -> Tensor:
    """Where the keys of a new source go."""
    slots = cross.slots(request)
    if len(source) != len(slots):
        raise QuireError(
            f"the encoder made {len(source)} tokens of what {len(slots)} were kept for"
        )
    return slots


def _plans(step: StepContext) -> tuple[PagesPlan, CrossPlan]:
    plan, cross = step.plans[OWN], step.plans[CROSS]
    assert isinstance(plan, PagesPlan), plan
    assert isinstance(cross, CrossPlan), cross
    return plan, cross
