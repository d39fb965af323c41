"""The last way: the whole text of a request is computed anew in every step; pages hold token ids.

Right for every model whose uncached forward is, and slow: the work of a text of n tokens grows with
n^2 at the least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.models.attention_groups import AttentionGroup, PageTensor
from quire.core.models.step_context import StepContext
from quire.core.models.transformers_adapter.adapted_model import AdaptedModel
from quire.core.models.transformers_adapter.cached import own_spec
from quire.core.models.transformers_adapter.pages import PagesPlan, read_slots, write_slots

_TOKENS = "token_ids"


class RecomputedModel(AdaptedModel):
    """Runs each request's whole text and gives back the rows of its new tokens."""

    way = "recomputed"

    def forward(self, step: StepContext) -> Tensor:
        """Runs the requests of a step one after the other; rows [T, H]."""
        plan = step.plans[0]
        assert isinstance(plan, PagesPlan), plan
        page = step.caches[0].tensors[_TOKENS]
        write_slots(page, plan.slot_mapping, step.token_ids.unsqueeze(-1))
        rows = []
        for request in plan.requests:
            length = request.num_past + request.num_new
            token_ids = read_slots(page, plan.slots(request, length)).squeeze(-1)
            positions = torch.arange(length, device=token_ids.device)
            output = self._text_model.run(token_ids, positions)
            rows.append(output.hidden[request.num_past :])
        hidden = torch.cat(rows)
        padding = len(step.token_ids) - len(hidden)
        return hidden if padding == 0 else torch.cat([hidden, hidden[-1:].expand(padding, -1)])


def recomputed_groups(
    *, dtype: str, cache_dtype: str, block_size: int
) -> tuple[AttentionGroup, ...]:
    """One group that keeps a number for each token."""
    page = PageTensor(name=_TOKENS, shape=(1,), is_per_token=True, dtype="int64")
    spec = own_spec(dtype=dtype, cache_dtype=cache_dtype, block_size=block_size)
    return (AttentionGroup(name="tokens", spec=spec, layers=(0,), pages=(page,)),)
