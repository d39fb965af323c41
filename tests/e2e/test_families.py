"""The whole engine against transformers: every family, under every way of cutting the work up."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model, make_torch_model

from quire import LLM, SamplingParams

NUM_TOKENS = 10
MANY_TOKENS = 40
LENGTHS = (1, 5, 17, 40, 64, 90)

SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {"max_num_batched_tokens": 512, "max_num_seqs": 8},
    "chunked": {"max_num_batched_tokens": 24, "max_num_seqs": 4},
    # Room for about two of the longest requests, which grow: some must give way and start again.
    "preempted": {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 144},
    "guessed": {"max_num_batched_tokens": 96, "max_num_seqs": 4, "num_speculative_tokens": 3},
    "block_size_32": {"max_num_batched_tokens": 128, "block_size": 32},
}


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(4, VOCAB_SIZE, size=length).tolist() for length in LENGTHS]
    return [*prompts, prompts[-1][:48] + prompts[0], prompts[3]]


@cache
def _expected(variant: str, num_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers, one request at a time."""
    model = make_torch_model(variant)
    # torch's fused attention knows no soft cap, and some versions choose it all the same.
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    rows = []
    for prompt in _prompts():
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
            )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model of one family."""
    return make_tiny_model(request.param, tmp_path_factory.mktemp("models"))


def _greedy(llm: LLM, num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in _prompts()]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_output_equals_transformers(family: Path, device: str, settings: str) -> None:
    """Batching, chunking, preemption, prefix hits and overlap change no token."""
    options, num_tokens = dict(SETTINGS[settings]), NUM_TOKENS
    if settings == "guessed" and _keeps_states(family):
        options.pop("num_speculative_tokens")  # refused, since a wrong guess would stay in them
    if settings == "preempted":
        num_tokens = MANY_TOKENS
        options["cache_memory_bytes"] = _tight_cache(family, options)
    with LLM(model=str(family), device=device, dtype="float32", **options) as llm:
        first = _greedy(llm, num_tokens)
        again = _greedy(llm, num_tokens)  # now every prefix is in the cache
        num_preemptions = llm.statistics().num_preemptions
    assert first == _expected(family.name, num_tokens)
    assert again == first
    if settings == "preempted" and family.name != "mistral-swa":  # its windows free their blocks
        assert num_preemptions > 0


def _keeps_states(directory: Path) -> bool:
    from quire.core.models.description import describe_model

    groups = describe_model(directory).attention_groups
    return any(group.spec.kind == "recurrent" for group in groups)


def _tight_cache(directory: Path, options: dict[str, Any]) -> int:
    """Bytes in which one request of the longest kind fits, and not much more."""
    from quire.core.models.description import describe_model

    tokens = int(options["max_model_len"] * 1.6)
    total = 0
    for group in describe_model(directory, dtype="float32").attention_groups:
        spec = group.spec
        width = spec.num_kv_heads * (spec.head_size + spec.v_head_size)
        total += width * 4 * len(group.layers) * (tokens + 3 * spec.block_size)
    return total
