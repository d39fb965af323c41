"""What a user passes in becomes a complete request, or a refusal that names the field."""

from __future__ import annotations

import pytest
from engine_fakes import VOCAB_SIZE
from text_fakes import byte_fallback_tokenizer, byte_level_tokenizer

from quire.core.engine.generation_defaults import GenerationDefaults, read_generation_defaults
from quire.core.engine.input_processor import InputProcessor, ModelLimits, make_params
from quire.core.engine.prompts import parse_prompt, split_prompts
from quire.core.engine.tokenizer import TextCodec, load_codec
from quire.core.errors import CheckpointError, RequestError
from quire.core.sampling_params import SamplingParams

LIMITS = ModelLimits(
    model="m", vocab_size=VOCAB_SIZE, max_model_len=32, logits_processors=frozenset({"known"})
)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(byte_level_tokenizer())


def processor(codec=None, *, seed=0, eos=(9,), **fields) -> InputProcessor:
    return InputProcessor(
        LIMITS, codec=codec, defaults=GenerationDefaults(eos_token_ids=eos), seed=seed, **fields
    )


@pytest.mark.parametrize(
    "prompt",
    ["Hello", {"prompt": "Hello"}, {"prompt_token_ids": [43, 310]}, [43, 310], (43, 310)],
)
def test_prepare_prompt_in_any_form_gives_tokens(codec, prompt):
    """Text, ids and dicts of either are the same request."""
    prepared = processor(codec).prepare("a", prompt, SamplingParams())
    expected = codec.encode("Hello") if "Hello" in str(prompt) else [43, 310]
    assert prepared.prompt_token_ids == prepared.specs[0].prompt_token_ids == expected


def test_prepare_dict_with_text_and_ids_counts_ids(codec):
    """Ids are what the model sees; the text is shown with the output."""
    prepared = processor(codec).prepare(
        "a", {"prompt": "shown", "prompt_token_ids": [7]}, SamplingParams()
    )
    assert (prepared.prompt, prepared.prompt_token_ids) == ("shown", [7])


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ([], {}, "prompt"),
        ("", {}, "prompt"),
        (None, {}, "prompt"),
        (7, {}, "prompt"),
        (b"bytes", {}, "prompt"),
        ({}, {}, "prompt"),
        ({"prompt": None}, {}, "prompt"),
        ({"prompt": "x", "image": 1}, {}, "prompt"),
        ({"prompt": 3}, {}, "prompt"),
        ({"prompt_token_ids": "abc"}, {}, "prompt"),
        ([1, "2"], {}, "prompt"),
        ([1, 2.0], {}, "prompt"),
        ([True], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([4] * 32, {}, "prompt"),
        ([4], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ([4], {"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ([4], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([4], {"logits_processors": ["unknown"]}, "logits_processors"),
        ([4], {"logits_processors": [print]}, "logits_processors"),
    ],
)
def test_prepare_bad_request_names_the_field(codec, prompt, fields, param):
    """Every refusal says which field is wrong."""
    with pytest.raises(RequestError) as refused:
        processor(codec).prepare("a", prompt, SamplingParams(**fields))
    assert refused.value.param == param


def test_prepare_without_tokenizer_takes_ids_and_refuses_text():
    """Token ids need no tokenizer; text says where to get one."""
    bare = processor()
    prepared = bare.prepare("a", [5, 6], SamplingParams())
    assert prepared.codec is None
    with pytest.raises(CheckpointError, match="tokenizer="):
        bare.prepare("a", "text", SamplingParams())
    for fields, param in (({"stop": ["x"]}, "stop"), ({"bad_words": ["x"]}, "bad_words")):
        with pytest.raises(RequestError) as refused:
            bare.prepare("a", [5], SamplingParams(**fields))
        assert refused.value.param == param


def test_prepare_max_tokens_is_cut_to_the_context(codec):
    """Prompt and output fit the context together; None asks for all that is left."""
    for asked, given in ((5, 5), (None, 22), (1000, 22)):
        prepared = processor(codec).prepare("a", [4] * 10, SamplingParams(max_tokens=asked))
        assert prepared.specs[0].max_tokens == given


def test_prepare_truncation_keeps_the_end_of_the_prompt(codec):
    """The last tokens of a prompt matter most."""
    params = SamplingParams(truncate_prompt_tokens=3)
    prepared = processor(codec).prepare("a", list(range(4, 104)), params)
    assert prepared.prompt_token_ids == [101, 102, 103]


def test_prepare_seeds_are_drawn_from_the_engine_and_count_up(codec):
    """The same engine seed gives the same run; each of n outputs has its own seed."""
    seeds = [
        [processor(codec, seed=seed).prepare("a", [4], SamplingParams()).specs[0].sampling.seed]
        for seed in (1, 1, 2)
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    several = processor(codec).prepare("a", [4], SamplingParams(n=3, seed=7, prompt_logprobs=1))
    assert [spec.sampling.seed for spec in several.specs] == [7, 8, 9]
    assert [spec.sampling.num_prompt_logprobs for spec in several.specs] == [1, None, None]
    assert len({spec.request_id for spec in several.specs}) == 3
    negative = processor(codec).prepare("a", [4], SamplingParams(n=2, seed=-1))
    assert [spec.sampling.seed for spec in negative.specs] == [2**63 - 1, 0]


def test_prepare_ends_are_eos_of_model_and_tokenizer_unless_ignored(codec):
    """Output ends where the model or its tokenizer says, and where the user says."""
    params = SamplingParams(stop_token_ids=[20, 20], min_tokens=2)
    (spec,) = processor(codec, eos=(9, 12)).prepare("a", [4], params).specs
    assert spec.eos_token_ids == (9, 12, codec.eos_token_id)
    assert spec.stop_token_ids == (20,)
    assert spec.sampling.min_tokens_forbids == (9, 12, codec.eos_token_id, 20)
    ignoring = SamplingParams(ignore_eos=True, stop_token_ids=[20], min_tokens=2)
    (spec,) = processor(codec).prepare("a", [4], ignoring).specs
    assert (spec.eos_token_ids, spec.sampling.min_tokens_forbids) == ((), (20,))


def test_prepare_bad_words_are_forbidden_at_start_and_after_space(codec):
    """A word is caught however the text comes to it."""
    (spec,) = processor(codec).prepare("a", [4], SamplingParams(bad_words=["quire"])).specs
    texts = {codec.decode(list(ids)) for ids in spec.sampling.bad_words}
    assert texts == {"quire", " quire"}
    fallback = TextCodec(byte_fallback_tokenizer())
    assert all(fallback.bad_word_ids("the"))


def test_prepare_function_is_registered_and_named(codec):
    """In process a function is a logits processor like any other."""
    names = processor(codec, name_function=lambda function: f"named {function.__name__}")
    params = SamplingParams(logits_processors=["known", print])
    (spec,) = names.prepare("a", [4], params).specs
    assert spec.sampling.logits_processors == ("known", "named print")


def test_split_prompts_tells_one_from_many():
    """A list of numbers is one prompt; a list of anything else is many."""
    assert split_prompts("a") == ["a"]
    assert split_prompts([1, 2]) == [[1, 2]]
    assert split_prompts([[1], [2, 3]]) == [[1], [2, 3]]
    assert split_prompts(["a", {"prompt": "b"}]) == ["a", {"prompt": "b"}]
    assert split_prompts([]) == []
    with pytest.raises(RequestError):
        parse_prompt(split_prompts(None)[0])


def test_read_generation_defaults_finds_every_end(tmp_path):
    """Lists of ends, ends in the model's configuration, and files that are not there."""
    assert read_generation_defaults(str(tmp_path)).eos_token_ids == ()
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 5}}')
    assert read_generation_defaults(str(tmp_path)).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [7, 8, 7], "temperature": 0.6, "top_p": null, "max_new_tokens": 9}'
    )
    defaults = read_generation_defaults(str(tmp_path))
    assert defaults.eos_token_ids == (7, 8)
    params = make_params(None, defaults)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 1.0, 9)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        read_generation_defaults(str(tmp_path))


def test_load_codec_missing_or_broken_says_what_to_do(tmp_path):
    """No tokenizer is no error until one is needed; a broken one is."""
    assert load_codec(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_codec("unused", tokenizer=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_codec(str(tmp_path))
