"""The whole engine on tiny models against transformers."""

from __future__ import annotations

import pytest
from model_fakes import build_cpu_core, build_sim_core
from tiny_models import make_tiny_model

from quire import LLM, SamplingParams

PROMPTS = [
    "A quire is a gathering of twenty-four sheets",
    "Hello",
    "def read_pages(path, limit=24):\n    for number, line in enumerate(open(path)):",
    "x" * 70,
]


@pytest.fixture(scope="module", params=["llama-cpu", "gemma2-cpu", "gemma2-sim", "deepseek-v3-cpu"])
def pair(request, tmp_path_factory):
    """The same tiny model in both engines; on the simulated device steps overlap."""
    transformers = pytest.importorskip("transformers")
    variant, _, device = request.param.rpartition("-")
    build_core = build_sim_core if device == "sim" else build_cpu_core
    directory = make_tiny_model(variant, tmp_path_factory.mktemp("models"))
    # Eagerly: torch's fused attention knows no soft cap, and some versions choose it all the same.
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager"
    ).eval()
    with LLM(
        str(directory),
        build_core=build_core,
        cache_memory_bytes=8 << 20,
        max_num_batched_tokens=48,
    ) as llm:
        yield llm, oracle


def oracle_tokens(oracle, prompt: list[int], count: int) -> list[int]:
    import torch

    with torch.inference_mode():
        ids = oracle.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )
    return ids[0, len(prompt) :].tolist()


def oracle_logprobs(oracle, token_ids: list[int]):
    """Row i: of the token after position i."""
    import torch

    with torch.inference_mode():
        return oracle(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)


def test_generate_greedy_equals_transformers(pair):
    """Mixed lengths in one batch, prompts in chunks: the tokens of each prompt alone, and its text."""
    llm, oracle = pair
    lengths = (24, 5, 40, 17)
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, min_tokens=length) for length in lengths
    ]
    for output, length in zip(llm.generate(PROMPTS, params), lengths, strict=True):
        expected = oracle_tokens(oracle, list(output.prompt_token_ids), length)
        assert list(output.outputs[0].token_ids) == expected
        text = llm.get_tokenizer().decode(expected, skip_special_tokens=True)
        assert output.outputs[0].text == text
        assert output.outputs[0].finish_reason == "length"


def test_generate_overlaps_where_the_device_is_asynchronous(pair):
    """The device decides whether the next step is scheduled while this one runs."""
    llm, _ = pair
    assert llm.config.overlap_scheduling == (llm.facts.device == "sim")


def test_generate_logprobs_equal_transformers(pair):
    """Of prompt and output, chosen and best."""
    llm, oracle = pair
    params = SamplingParams(
        temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    (output,) = llm.generate(PROMPTS[:1], params)
    prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    expected = oracle_logprobs(oracle, prompt + answer)
    positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert output.prompt_logprobs[0] is None
    assert len(positions) == len(prompt) + len(answer) - 1
    for row, position, token_id in zip(expected, positions, [*prompt[1:], *answer], strict=False):
        assert next(iter(position)) == token_id
        best = row.topk(2).indices.tolist()
        assert best[0] in position
        for other, entry in position.items():
            assert entry.logprob == pytest.approx(row[other].item(), abs=2e-4)
    assert output.outputs[0].cumulative_logprob == pytest.approx(
        sum(
            one[token_id].logprob
            for one, token_id in zip(output.outputs[0].logprobs, answer, strict=True)
        )
    )


def test_generate_stop_string_cuts_the_greedy_text(pair):
    """A string out of the middle of the text ends it there."""
    llm, _ = pair
    greedy = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True}
    text = llm.generate(PROMPTS[0], SamplingParams(**greedy))[0].outputs[0].text
    stop = text[10:13]
    (output,) = llm.generate(PROMPTS[0], SamplingParams(**greedy, stop=[stop]))
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].finish_reason == "stop"


def test_generate_seeded_sample_is_the_same_in_any_company(pair):
    """A seed gives the same tokens alone, in a batch and as one of n."""
    llm, _ = pair
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=12, ignore_eos=True)
    alone = llm.generate(PROMPTS[0], params)[0].outputs[0].token_ids
    batch = llm.generate([PROMPTS[3], PROMPTS[0], PROMPTS[2]], params)[1].outputs[0].token_ids
    several = SamplingParams(
        n=3, temperature=1.0, top_p=0.95, seed=10, max_tokens=12, ignore_eos=True
    )
    (output,) = llm.generate(PROMPTS[0], several)
    assert list(alone) == list(batch) == list(output.outputs[1].token_ids)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    other = SamplingParams(temperature=1.0, top_p=0.95, seed=12, max_tokens=12, ignore_eos=True)
    assert list(llm.generate(PROMPTS[0], other)[0].outputs[0].token_ids) != list(alone)


def test_generate_function_as_logits_processor_steers_one_request(pair):
    """A function of the user's changes its request and no other."""
    llm, _ = pair

    def only_eleven(prompt_ids, output_ids, logits):
        logits[:] = float("-inf")
        logits[11] = 0.0
        return logits

    plain = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    steered = SamplingParams(
        temperature=0.0, max_tokens=5, ignore_eos=True, logits_processors=[only_eleven]
    )
    before = list(llm.generate(PROMPTS[0], plain)[0].outputs[0].token_ids)
    free, forced = llm.generate([PROMPTS[0]] * 2, [plain, steered])
    assert list(free.outputs[0].token_ids) == before
    assert list(forced.outputs[0].token_ids) == [11] * 5


def test_generate_processor_that_raises_fails_alone(pair):
    """A function with a bug ends its own request with the reason."""
    llm, _ = pair

    def broken(prompt_ids, output_ids, logits):
        raise ValueError("a bug of the user's")

    params = [
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=4, logits_processors=[broken]),
    ]
    fine, failed = llm.generate(PROMPTS[:2], params)
    assert len(fine.outputs[0].token_ids) == 4
    assert "a bug of the user's" in failed.error
    assert failed.outputs[0].finish_reason == "error"


def test_generate_again_uses_cached_prefix_and_changes_nothing(pair):
    """A prompt seen before is not computed again; its tokens are the same."""
    llm, _ = pair
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    first, second = (llm.generate(PROMPTS[2], params)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens > 0) == (0, True)
    assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids)
