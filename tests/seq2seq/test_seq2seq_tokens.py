"""Encoder-decoders on the real engine give the tokens of `generate`, however they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_seq2seq import make_tiny_seq2seq

from quire import LLM, SamplingParams
from quire.core.errors import RequestError, UnsupportedError

QUICK = ("t5", "bart", "marian")
MORE = (
    "mt5", "umt5", "switch_transformers", "longt5", "mbart", "pegasus", "m2m_100", "blenderbot",
    "blenderbot-small", "plbart", "mvp", "nllb-moe", "pegasus_x",
)  # fmt: skip
NUM_TOKENS = 12
START, FIRST, PAD = 0, 5, 2
MARGIN = 1e-3


def prompts() -> list[list[int]]:
    """Several lengths; the third and the last are the same."""
    rng = np.random.default_rng(7)
    made = [rng.integers(4, 500, size=length).tolist() for length in (15, 31, 47, 4)]
    return [*made, made[2]]


def save(name: str, directory: Path, **generation: Any) -> Any:
    from transformers import GenerationConfig

    model = make_tiny_seq2seq(name)
    settings = {"decoder_start_token_id": START, "bos_token_id": START, "pad_token_id": PAD}
    model.generation_config = GenerationConfig(**settings, **generation)
    model.save_pretrained(directory)
    return model


def reference(
    model: Any, prompt: list[int], target: list[int] | None = None, num_tokens: int = NUM_TOKENS
) -> tuple[list[int], list[float]]:
    """The decoder's greedy tokens, all of them, and the margin of each that was chosen."""
    ids = torch.tensor([prompt])
    given = {} if target is None else {"decoder_input_ids": torch.tensor([target])}
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens,
            do_sample=False, output_logits=True, return_dict_in_generate=True, **given,
        )  # fmt: skip
    best = [step[0].float().topk(2).values for step in out.logits]
    return out.sequences[0].tolist(), [float(two[0] - two[1]) for two in best]


def agree(got: list[int], want: list[int], margins: list[float]) -> bool:
    """Whether tokens are the reference's, up to where it is itself undecided."""
    for a, b, margin in zip(got, want, margins, strict=True):
        if a != b:
            return margin < MARGIN
    return True


def engine(directory: Path, **changes: Any) -> LLM:
    """A cache for about two of the requests, and steps of few tokens."""
    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 8,
        "max_model_len": 64, "block_size": 16, "num_threads": 1, "cache_memory_bytes": 1 << 20,
    }  # fmt: skip
    return LLM(model=str(directory), **(settings | changes))


def greedy(num_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def check(name: str, directory: Path) -> None:
    """Many at once, with prompts of the decoder too, twice: the second time prefixes are there."""
    model = save(name, directory)
    target = np.random.default_rng(3).integers(4, 500, size=20).tolist()
    with engine(directory) as llm:
        for _ in range(2):
            plain = llm.generate(
                [{"prompt_token_ids": one} for one in prompts()], greedy(), use_tqdm=False
            )
            pairs = llm.generate(
                [{"encoder_prompt": one, "decoder_prompt": target} for one in prompts()],
                greedy(),
                use_tqdm=False,
            )
            for prompt, one, pair in zip(prompts(), plain, pairs, strict=True):
                for output, given in ((one, None), (pair, target)):
                    want, margins = reference(model, prompt, given)
                    got = [*output.prompt_token_ids, *output.outputs[0].token_ids]
                    rest = len(output.prompt_token_ids)
                    assert got[:rest] == want[:rest], (name, given)
                    assert agree(got[rest:], want[rest:], margins), (name, prompt, got, want)


@pytest.mark.parametrize("name", QUICK)
def test_engine_gives_the_tokens_of_generate(name, tmp_path):
    """Concurrent, chunked and prefix-shared requests of every family give the reference's tokens."""
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_engine_gives_the_tokens_of_generate_for_more(name, tmp_path):
    """The same for families that differ in smaller things."""
    check(name, tmp_path)


def test_preempted_requests_encode_again_and_go_on(tmp_path):
    """A cache for fewer requests than run takes blocks away, and no token changes."""
    model = save("bart", tmp_path)
    many = [one[:16] for one in prompts()[:3]]
    with engine(tmp_path, cache_memory_bytes=660_000, enable_prefix_caching=False) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in many], greedy(40), use_tqdm=False)
        assert llm.statistics().num_preemptions > 0
    for prompt, output in zip(many, outputs, strict=True):
        want, margins = reference(model, prompt, num_tokens=40)
        assert agree(output.outputs[0].token_ids, want[1:], margins)


def test_same_source_is_encoded_once(tmp_path, monkeypatch):
    """Keys of an encoder's output are shared by what the source holds, and by nothing else."""
    from quire.core.models.seq2seq.source_model import SourceModel

    save("bart", tmp_path)
    encoded: list[int] = []
    encode = SourceModel.encode

    def counted(self, arrays):
        encoded.append(len(arrays))
        return encode(self, arrays)

    monkeypatch.setattr(SourceModel, "encode", counted)
    with engine(tmp_path) as llm:
        encoded.clear()
        first, second, third = prompts()[:3]
        again = [
            llm.generate({"prompt_token_ids": one}, greedy(2), use_tqdm=False)[0]
            for one in (first, second, first, third, second)
        ]
        assert sum(encoded) == 3
    assert again[0].outputs[0].token_ids == again[2].outputs[0].token_ids


def test_forced_and_suppressed_tokens_are_those_of_generate(tmp_path):
    """A forced first token, forbidden tokens and a forbidden beginning come from the checkpoint."""
    plain = save("bart", tmp_path / "plain")
    prompt = prompts()[0]
    free, _ = reference(plain, prompt)
    settings = {
        "forced_bos_token_id": FIRST,
        "suppress_tokens": sorted(set(free[1:4])),
        "bad_words_ids": [[free[5]]],
    }
    model = save("bart", tmp_path / "forced", **settings)
    want, _ = reference(model, prompt)
    with engine(tmp_path / "forced") as llm:
        (output,) = llm.generate(
            {"prompt_token_ids": prompt}, greedy(NUM_TOKENS - 1), use_tqdm=False
        )
    assert [*output.prompt_token_ids, *output.outputs[0].token_ids] == want
    begun = save("bart", tmp_path / "begun", begin_suppress_tokens=[free[1]])
    want, _ = reference(begun, prompt)
    with engine(tmp_path / "begun") as llm:
        (output,) = llm.generate({"prompt_token_ids": prompt}, greedy(), use_tqdm=False)
    assert output.outputs[0].token_ids == want[1:]
    assert want[1] != free[1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [4, 100_000]}, "token id 100000"),
        ({"prompt_token_ids": [4] * 600}, "takes at most"),
        ({"prompt_token_ids": [4], "multi_modal_data": {"audio": [1.0]}}, "reads text alone"),
        ({"encoder_prompt": [4], "decoder_prompt": [4] * 70}, "context"),
        ({"encoder_prompt": None, "decoder_prompt": [4]}, "no encoder_prompt"),
    ],
)
def test_bad_prompt_is_refused_and_harms_nobody(prompt, message, bart):
    """What the encoder cannot take is a clear error, and the engine goes on."""
    with pytest.raises(RequestError, match=message):
        bart.generate(prompt, greedy(), use_tqdm=False)
    assert bart.generate({"prompt_token_ids": [4, 5]}, greedy(2), use_tqdm=False)[0].error is None


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bart")
    save("bart", directory)
    with engine(directory) as llm:
        yield llm


def test_decoder_alone_is_still_a_causal_model(tmp_path):
    """BartForCausalLM has no source, and runs as it did."""
    from tiny_architectures import make_tiny_architecture

    from quire.core.models.registry import describe

    make_tiny_architecture("bart").save_pretrained(tmp_path)
    assert describe(tmp_path).encoder_input is None


def test_encoder_decoder_of_another_form_is_refused_with_its_cause(tmp_path):
    """A model that writes several tokens at once is never run wrongly."""
    from quire.core.models.registry import describe

    make_tiny_seq2seq("dia").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="9 tokens of as many code books at once"):
        describe(tmp_path)
