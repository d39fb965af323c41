"""Every family and variant against transformers: the same greedy tokens, and logits near those of float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import load_tiny, run_greedy  # noqa: E402
from tiny_models import FAMILIES, TINY_VARIANTS, VOCAB_SIZE, make_tiny_model  # noqa: E402

NUM_TOKENS = 10
PROMPT_LENGTHS = (50, 7, 33)


@dataclass
class Oracle:
    """What transformers says of a prompt: greedy tokens, and float64 logits for each of them."""

    tokens: list[int]
    logits: torch.Tensor
    float32_error: float
    """How far transformers' own float32 is from float64."""


def make_prompts(variant: str) -> list[list[int]]:
    """The same prompts for the same variant; one longer than any window."""
    rng = np.random.default_rng(len(variant))
    return [rng.integers(4, VOCAB_SIZE, size=length).tolist() for length in PROMPT_LENGTHS]


@torch.no_grad()
def ask_transformers(directory, prompt: list[int]) -> Oracle:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    # Its grouped product knows no float64.
    model.set_experts_implementation("eager")
    # No id ends the text: the length is the same for all.
    model.generation_config.eos_token_id = None
    sequence = model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=2
    )
    context = sequence[:, :-1]
    single = model(context).logits[0, len(prompt) - 1 :]
    double = model.double()(context).logits[0, len(prompt) - 1 :]
    return Oracle(
        tokens=sequence[0, len(prompt) :].tolist(),
        logits=double,
        float32_error=float((single.double() - double).abs().max()),
    )


def assert_same(variant: str, tokens: list[int], logits: torch.Tensor, oracle: Oracle) -> None:
    """Tokens are equal and logits are as near to float64 as transformers' own float32."""
    top = oracle.logits.topk(2).values
    margin = float((top[:, 0] - top[:, 1]).min())
    assert margin > 1e-4, f"{variant}: a tie is no verdict (margin {margin})"
    assert tokens == oracle.tokens
    error = float((logits.double() - oracle.logits).abs().max())
    assert error < 4 * oracle.float32_error + 1e-5, f"{variant}: {error} vs {oracle.float32_error}"


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_greedy_of_mixed_batches_is_token_exact_with_transformers(variant, tmp_path):
    """A change to any layer, norm, bias, window, cap or RoPE of any family changes these tokens."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    max_model_len = 128 if variant == "phi3-longrope" else 256
    model = load_tiny(directory, max_model_len=max_model_len)
    prompts = make_prompts(variant)
    tokens, logits = run_greedy(model, prompts, NUM_TOKENS, chunk=64)
    for prompt, row, scores in zip(prompts, tokens, logits, strict=True):
        assert_same(variant, row, scores, ask_transformers(directory, prompt))


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 13])
def test_chunked_prefill_gives_the_logits_of_a_whole_one(variant, chunk, tmp_path):
    """Cutting a prompt anywhere, windows included, must not change what the model says."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    model = load_tiny(directory)
    prompts = make_prompts(variant)
    whole_tokens, whole_logits = run_greedy(model, prompts, 4, chunk=64)
    tokens, logits = run_greedy(model, prompts, 4, chunk=chunk)
    assert tokens == whole_tokens
    for row, whole in zip(logits, whole_logits, strict=True):
        torch.testing.assert_close(row, whole, rtol=1e-4, atol=1e-4)
