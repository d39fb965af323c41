"""From what a user asks for to what a worker is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quire.core.engine.tokenizer import TextCodec
from quire.core.errors import RequestError
from quire.core.interface.worker import SamplingSpec
from quire.core.sampling_params import MAX_SEED, SamplingParams


def make_sampling_spec(
    params: SamplingParams,
    *,
    seed: int,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    codec: TextCodec | None,
    logits_processors: tuple[str, ...],
) -> SamplingSpec:
    """The worker's part of `params`, checked against the model.

    Raises: RequestError naming the field that the model cannot serve.
    """
    stop_ids = tuple(params.stop_token_ids or ())
    check_token_ids(stop_ids, vocab_size, "stop_token_ids")
    check_token_ids(params.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    check_token_ids(params.logit_bias or (), vocab_size, "logit_bias")
    allowed = params.allowed_token_ids
    return SamplingSpec(
        temperature=float(params.temperature),
        top_k=min(max(int(params.top_k), 0), vocab_size),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        frequency_penalty=float(params.frequency_penalty),
        presence_penalty=float(params.presence_penalty),
        seed=wrap_seed(seed),
        min_tokens=params.min_tokens,
        min_tokens_forbids=_enders(params, eos_token_ids, stop_ids),
        logit_bias=tuple((params.logit_bias or {}).items()),
        allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
        bad_words=_bad_words(params, codec),
        num_logprobs=_at_most(params.logprobs, vocab_size),
        num_prompt_logprobs=_at_most(params.prompt_logprobs, vocab_size),
        logits_processors=logits_processors,
    )


def wrap_seed(seed: int) -> int:
    """Any whole number as a seed from 0 to 2**63 - 1."""
    return seed % (MAX_SEED + 1)


def check_token_ids(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises: RequestError if an id is not in the vocabulary."""
    ids = list(token_ids)
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        odd = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise RequestError(
            f"{param} has token id {odd}; the model's vocabulary is 0 to {vocab_size - 1}; give "
            "ids of it, and a tokenizer that belongs to the model",
            param=param,
        )


def _enders(
    params: SamplingParams, eos_token_ids: Sequence[int], stop_ids: tuple[int, ...]
) -> tuple[int, ...]:
    """What may not be chosen before `min_tokens`."""
    if params.min_tokens == 0:
        return ()
    eos = () if params.ignore_eos else tuple(eos_token_ids)
    return tuple(dict.fromkeys(eos + stop_ids))


def _bad_words(params: SamplingParams, codec: TextCodec | None) -> tuple[tuple[int, ...], ...]:
    if not params.bad_words:
        return ()
    if codec is None:
        raise RequestError(
            "bad_words are text and the model has no tokenizer; use logit_bias with token ids",
            param="bad_words",
        )
    ways = [ids for word in params.bad_words for ids in codec.bad_word_ids(word)]
    return tuple(dict.fromkeys(ways))


def _at_most(count: int | None, limit: int) -> int | None:
    return None if count is None else min(count, limit)
