"""Sampling of one row in plain Python and float64, straight from what each setting means."""

from __future__ import annotations

import math

import numpy as np

from quire.core.interface import SamplingSpec

INF = math.inf


def slow_logprobs(logits: np.ndarray) -> np.ndarray:
    """log_softmax of one row, float64."""
    wide = logits.astype(np.float64)
    peak = wide.max()
    return wide - peak - np.log(np.exp(wide - peak).sum())


def slow_change(
    logits: np.ndarray, spec: SamplingSpec, prompt: list[int], output: list[int]
) -> np.ndarray:
    """The logits after everything but temperature and filters."""
    changed = logits.astype(np.float64).copy()
    if spec.allowed_token_ids is not None:
        for token in range(len(changed)):
            if token not in spec.allowed_token_ids:
                changed[token] = -INF
    for word in spec.bad_words:
        *prefix, last = word
        if not prefix or output[-len(prefix) :] == prefix:
            changed[last] = -INF
    if len(output) < spec.min_tokens:
        for token in spec.min_tokens_forbids:
            changed[token] = -INF
    for token, bias in spec.logit_bias:
        changed[token] += bias
    for token in set(prompt) | set(output):
        if changed[token] > 0:
            changed[token] /= spec.repetition_penalty
        else:
            changed[token] *= spec.repetition_penalty
        changed[token] -= spec.frequency_penalty * output.count(token)
        changed[token] -= spec.presence_penalty * (token in output)
    return changed


def slow_choice(changed: np.ndarray, spec: SamplingSpec, uniform: float) -> int:
    """The token that a row draws with its random number."""
    if spec.temperature == 0:
        return int(np.argmax(changed))
    p = np.exp(slow_logprobs(changed / spec.temperature))
    order = sorted(range(len(p)), key=lambda token: (-changed[token], token))
    kept = [token for token in order if p[token] > 0]
    if spec.top_k > 0:
        limit = sorted(changed, reverse=True)[min(spec.top_k, len(p)) - 1]
        kept = [token for token in kept if changed[token] >= limit]
    if spec.top_p < 1:
        total, reached, nucleus = sum(p[token] for token in kept), 0.0, []
        for token in kept:
            if reached >= spec.top_p * total:
                break
            nucleus.append(token)
            reached += p[token]
        kept = nucleus
    kept = [token for token in kept if p[token] >= spec.min_p * p[order[0]]]
    target, running = uniform * sum(p[token] for token in kept), 0.0
    for token in sorted(kept):
        running += p[token]
        if running > target:
            return token
    return max(kept)
