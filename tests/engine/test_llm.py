"""The offline front on a worker without tensors: order, refusals, interruptions."""

from __future__ import annotations

import signal

import pytest
from engine_fakes import FakeWorker, build_fake_core, expected_tokens, make_fake_core
from text_fakes import byte_level_tokenizer

from quire import LLM, SamplingParams
from quire.core.errors import (
    CheckpointError,
    ConfigError,
    DeviceLost,
    EngineDeadError,
    RequestError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, seed=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A directory with a tokenizer; the weights are the fake worker's."""
    directory = tmp_path_factory.mktemp("model")
    byte_level_tokenizer().save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 3}')
    return str(directory)


@pytest.fixture(scope="module")
def shared(model):
    with LLM(model, build_core=build_fake_core) as llm:
        yield llm


def started(model, before_step=lambda batch: None, **settings) -> LLM:
    return LLM(
        model,
        build_core=lambda config: make_fake_core(FakeWorker(before_step=before_step), model=model),
        **settings,
    )


def test_generate_many_prompts_come_back_in_order(shared):
    """Texts, ids and dicts mixed, of different lengths, each with its own output."""
    prompts = ["A quire is", [50, 51, 52], {"prompt": "x"}, {"prompt_token_ids": [9] * 40}, "A"]
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, seed=0, ignore_eos=True)
        for length in (3, 20, 1, 7, 12)
    ]
    outputs = shared.generate(prompts, params)
    for output, given in zip(outputs, params, strict=True):
        expected = expected_tokens(output.prompt_token_ids, given.max_tokens)
        assert list(output.outputs[0].token_ids) == expected
        assert output.finished
    assert [output.prompt for output in outputs] == ["A quire is", None, "x", None, "A"]


def test_generate_one_prompt_gives_a_list_of_one(shared):
    """The shape that users of vLLM know."""
    (output,) = shared.generate("Hello", GREEDY, use_tqdm=False)
    tokens = expected_tokens(output.prompt_token_ids, 10)
    assert output.outputs[0].text == shared.get_tokenizer().decode(tokens, skip_special_tokens=True)
    assert shared.generate([], GREEDY) == []


def test_generate_without_params_takes_the_models_own(shared):
    """generation_config.json says how the authors sample."""
    (output,) = shared.generate("Hello")
    assert len(output.outputs[0].token_ids) == 3
    assert shared.get_default_sampling_params().temperature == 0.0


def test_generate_bad_prompt_raises_before_anything_runs(shared):
    """One malformed prompt of many: nothing is computed, the engine stays usable, the index is told."""
    steps = shared.statistics().num_steps
    with pytest.raises(RequestError, match="prompt 1") as refused:
        shared.generate(["fine", [10**9], "fine"], GREEDY)
    assert refused.value.param == "prompt"
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        shared.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="sampling_params"):
        shared.generate("a", 7)
    assert shared.statistics().num_steps == steps
    assert len(shared.generate(["fine"], GREEDY)) == 1


def test_generate_n_outputs_have_seeds_of_their_own(shared):
    """Output i of n draws from seed + i."""
    (output,) = shared.generate(
        [[50, 51]], SamplingParams(n=3, seed=5, max_tokens=4, ignore_eos=True)
    )
    assert [list(one.token_ids) for one in output.outputs] == [
        expected_tokens([50, 51], 4, seed=5 + index) for index in range(3)
    ]
    assert [one.index for one in output.outputs] == [0, 1, 2]


def test_generate_stop_string_ends_text_and_request(shared):
    """The text ends before the string, and the core stops computing."""
    whole = shared.generate([[50]], SamplingParams(max_tokens=60, seed=0, ignore_eos=True))[0]
    text = whole.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    params = SamplingParams(max_tokens=60, seed=0, ignore_eos=True, stop=stop)
    (output,) = shared.generate([[50]], params)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].stop_reason == stop
    assert shared.statistics().num_running == 0


def test_stream_deltas_add_up_to_generate(shared):
    """A stream shows the same text, piece by piece."""
    (whole,) = shared.generate("Once upon", GREEDY)
    deltas = list(shared.stream("Once upon", GREEDY))
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.outputs[0].text
    assert [delta.is_finished for delta in deltas][-1]
    assert len(deltas) == 10


def test_stream_left_early_ends_the_request(shared):
    """Breaking out of the loop frees the request's place; other calls may run in between."""
    stream = shared.stream([60], SamplingParams(max_tokens=200, seed=0, ignore_eos=True))
    next(stream)
    assert len(shared.generate("meanwhile", GREEDY)[0].outputs[0].token_ids) == 10
    assert shared.statistics().num_running == 1
    stream.close()
    assert shared.statistics().num_running == 0
    with pytest.raises(RequestError):
        shared.stream([], GREEDY)


def test_chat_is_generate_on_the_rendered_template(shared):
    """One conversation or many; special tokens are not added twice."""
    conversation = [{"role": "user", "content": "Hello"}]
    text = shared.get_tokenizer().apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    (expected,) = shared.generate([text], GREEDY, add_special_tokens=False)
    (one,) = shared.chat(conversation, GREEDY)
    many = shared.chat([conversation, conversation], GREEDY)
    for output in (one, *many):
        assert output.outputs[0].text == expected.outputs[0].text
        assert output.prompt == text
    with pytest.raises(RequestError, match="template"):
        shared.chat(conversation, GREEDY, chat_template="{% for %}")


def test_generate_interrupted_by_ctrl_c_leaves_engine_usable(model):
    """Ctrl-C in the middle of a step: the step ends, the requests are dropped, the next call works."""
    # A process that a shell started in the background ignores the signal from its birth.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pressed = []

    def press(batch) -> None:
        if batch.step_id == 2 and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    with started(model, press) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Hello", "World"], GREEDY)
        assert llm.statistics().num_running == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        (output,) = llm.generate([[50]], GREEDY)
        assert list(output.outputs[0].token_ids) == expected_tokens([50], 10)


def test_generate_after_death_tells_the_cause_again(model):
    """A lost device is told to every later call."""

    def lose(batch) -> None:
        raise DeviceLost("gone")

    with started(model, lose) as llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="DeviceLost: gone"):
                llm.generate("Hello", GREEDY)


def test_generate_in_own_process_gives_the_same(model, shared):
    """Where the core lives changes nothing."""
    with LLM(model, build_core=build_fake_core, has_own_process=True) as llm:
        prompts = ["Hello", [50, 51]]
        here, there = shared.generate(prompts, GREEDY), llm.generate(prompts, GREEDY)
        assert [one.outputs[0].text for one in here] == [one.outputs[0].text for one in there]
        with pytest.raises(RequestError, match="logits_processors"):
            llm.generate("x", SamplingParams(logits_processors=[lambda p, o, logits: logits]))


def test_generate_model_without_tokenizer_takes_ids(tmp_path):
    """Ids in, ids out; text and chat say how to get a tokenizer."""
    with LLM(str(tmp_path), build_core=build_fake_core) as llm:
        (output,) = llm.generate([[50]], GREEDY)
        assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", 10)
        for call in (
            lambda: llm.generate("text", GREEDY),
            lambda: llm.chat([{"role": "user", "content": "x"}]),
            llm.get_tokenizer,
        ):
            with pytest.raises(CheckpointError, match="tokenizer="):
                call()


def test_settings_of_vllm_are_understood_or_refused_aloud(model):
    """Scripts run with the import changed; nothing that is asked for is dropped silently."""
    llm = LLM(model, build_core=build_fake_core, gpu_memory_utilization=0.5, tensor_parallel_size=1)
    assert llm.config.device_memory_fraction == 0.5
    llm.close()
    with pytest.warns(UserWarning, match="enforce_eager"):
        LLM(model, build_core=build_fake_core, enforce_eager=True).close()
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        LLM(model, build_core=build_fake_core, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="misspelt"):
        LLM(model, build_core=build_fake_core, misspelt=1)
