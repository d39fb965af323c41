"""From what the front hands over to a request that can run, or the reason why it cannot."""

from __future__ import annotations

import msgspec

from quire.core.errors import RequestError
from quire.core.interface.worker import Feature
from quire.core.kv_cache.manager import KVCacheManager
from quire.core.scheduler.guessing import PromptLookup, may_guess
from quire.core.scheduler.request import Request, RequestSpec
from quire.core.scheduler.settings import SchedulerSettings


def make_request(
    spec: RequestSpec, arrival_index: int, settings: SchedulerSettings, cache: KVCacheManager
) -> Request:
    """A request that waits for its first step. Owns a copy of the prompt."""
    num_prompt = len(spec.prompt_token_ids)
    eos = frozenset(spec.eos_token_ids)
    is_free = spec.constraint is None and spec.pooling is None and may_guess(spec.sampling)
    guesses = settings.num_guessed_tokens > 0 and is_free
    return Request(
        request_id=spec.request_id,
        token_ids=list(spec.prompt_token_ids),
        num_prompt_tokens=num_prompt,
        # What is pooled ends with its last token: the one that counts as sampled never comes.
        max_total_tokens=num_prompt + 1
        if spec.pooling is not None
        else min(num_prompt + spec.max_tokens, settings.max_model_len),
        min_total_tokens=num_prompt + spec.sampling.min_tokens,
        eos_token_ids=eos,
        end_token_ids=eos.union(spec.stop_token_ids),
        sampling=spec.sampling,
        priority=spec.priority,
        arrival_index=arrival_index,
        table=cache.make_table(
            spec.cache_salt,
            [f"{feature.kind}:{feature.key}@{feature.offset}" for feature in spec.features],
            num_source_tokens=num_source_tokens(spec),
        ),
        features=spec.features,
        num_tokens=num_prompt,
        needs_last_token=spec.constraint is not None or guesses,
        lookup=PromptLookup() if guesses else None,
        pooling=spec.pooling,
    )


def num_source_tokens(spec: RequestSpec) -> int:
    """How many tokens the model's encoder makes of what the request brings."""
    return sum(feature.num_tokens for feature in spec.features if feature.offset is None)


def features_to_send(request: Request) -> list[Feature]:
    """The request's features as its worker needs them.

    What an encoder has made of the same source for another request is not made again.
    """
    if not request.table.has_shared_source:
        return request.features
    return [
        feature if feature.offset is not None else msgspec.structs.replace(feature, arrays={})
        for feature in request.features
    ]


def refuse_what_never_fits(
    spec: RequestSpec, settings: SchedulerSettings, cache: KVCacheManager
) -> None:
    """Looks for everything that would keep the request from ever running.

    Raises: RequestError that names what is too much and what there is.
    """
    num_prompt = len(spec.prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("the prompt has no tokens; give at least one", param="prompt")
    if spec.max_tokens < 1:
        raise RequestError(
            f"max_tokens is {spec.max_tokens}; it must be at least 1", param="max_tokens"
        )
    if spec.pooling is not None:
        _refuse_long_text(num_prompt, settings)
        return
    if num_prompt >= settings.max_model_len:
        raise RequestError(
            f"the prompt has {num_prompt} tokens; with one token of output the context of "
            f"{settings.max_model_len} is exceeded; shorten the prompt",
            param="prompt",
        )
    if not settings.enable_chunked_prefill and num_prompt > settings.max_num_batched_tokens:
        raise RequestError(
            f"the prompt has {num_prompt} tokens; a step computes at most "
            f"{settings.max_num_batched_tokens} and chunked prefill is off; shorten the prompt, "
            "or raise max_num_batched_tokens",
            param="prompt",
        )
    num_total = min(num_prompt + spec.max_tokens, settings.max_model_len)
    num_source = num_source_tokens(spec)
    if not cache.can_ever_hold(num_total - 1, settings.max_num_batched_tokens, num_source):
        raise RequestError(
            f"prompt and output of {num_total} tokens need more blocks than the whole KV cache "
            "has; shorten the prompt or max_tokens, or give the cache more memory",
            param="prompt",
        )


def _refuse_long_text(num_tokens: int, settings: SchedulerSettings) -> None:
    """A text that becomes numbers is computed whole in one step."""
    limit = min(settings.max_model_len, settings.max_num_batched_tokens)
    if num_tokens > limit:
        raise RequestError(
            f"the text has {num_tokens} tokens; it is computed whole, and at most {limit} fit; "
            "shorten it, or set truncate_prompt_tokens",
            param="prompt",
        )
