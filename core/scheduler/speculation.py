"""Adds guesses to a step: a request that is right about itself takes several tokens at once."""

from __future__ import annotations

from quire.core.kv_cache.manager import KVCacheManager
from quire.core.scheduler.request import Request
from quire.core.scheduler.step import StepDraft


def guess_ahead(request: Request, draft: StepDraft, cache: KVCacheManager, most: int) -> None:
    """Puts guesses behind the last token of the request that was added last.

    As many as `most`, as tokens and free blocks reach, and never so many that somebody would have
    to give blocks back for them.
    """
    if request.lookup is None:
        return
    computed = request.num_computed_tokens
    limit = min(most, draft.budget, request.max_total_tokens - computed - 1)
    tokens = request.lookup.guess(request.token_ids, limit) if limit > 0 else []
    if computed + len(tokens) > request.table.capacity:
        blocks = cache.allocate(request.table, computed + len(tokens))
        if blocks is None:
            tokens = tokens[: request.table.capacity - computed]
        else:
            draft.add_blocks(blocks)
    if tokens:
        draft.guess(request, tokens)
