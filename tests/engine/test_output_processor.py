"""Updates of the core become what each user asked to see."""

from __future__ import annotations

import pytest
from engine_fakes import VOCAB_SIZE, fake_logprobs
from text_fakes import byte_level_tokenizer

from quire.core.engine.generation_defaults import GenerationDefaults
from quire.core.engine.input_processor import InputProcessor, ModelLimits
from quire.core.engine.output_processor import OutputProcessor
from quire.core.engine.tokenizer import TextCodec
from quire.core.errors import RequestError
from quire.core.outputs import RequestOutput
from quire.core.sampling_params import SamplingParams
from quire.core.scheduler.request import FinishReason, RequestUpdate


class Follow:
    """One processor and what its users saw."""

    def __init__(self, codec: TextCodec) -> None:
        limits = ModelLimits(
            model="m", vocab_size=VOCAB_SIZE, max_model_len=256, logits_processors=frozenset()
        )
        self.codec = codec
        self.inputs = InputProcessor(limits, codec=codec, defaults=GenerationDefaults(), seed=0)
        self.outputs = OutputProcessor()
        self.seen: list[RequestOutput] = []

    def add(self, kind: str = "delta", request_id: str = "a", **fields) -> None:
        prepared = self.inputs.prepare(request_id, [40, 41], SamplingParams(**fields))
        self.outputs.add(prepared, kind, self.seen.append)

    def step(
        self, *token_ids: int, request_id: str = "a", end: str | None = None, **fields
    ) -> list[str]:
        update = RequestUpdate(
            request_id, list(token_ids), FinishReason(end) if end else None, **fields
        )
        return self.outputs.process([update])

    def encode(self, text: str) -> list[int]:
        return self.codec.encode(text, add_special_tokens=False)


@pytest.fixture
def follow() -> Follow:
    return Follow(TextCodec(byte_level_tokenizer()))


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final"])
def test_process_kinds_of_output_tell_the_same_text(follow, kind):
    """Deltas add up to what cumulative and final show."""
    ids = follow.encode("A quire is a gathering of sheets é€😀")
    follow.add(kind, max_tokens=100)
    for token_id in ids[:-1]:
        assert follow.step(token_id) == []
    follow.step(ids[-1], end="length")
    outputs = [one.outputs[0] for one in follow.seen]
    if kind == "delta":
        text = "".join(one.text for one in outputs)
        tokens = [t for one in outputs for t in one.token_ids]
    else:
        text, tokens = outputs[-1].text, list(outputs[-1].token_ids)
    assert (text, tokens) == ("A quire is a gathering of sheets é€😀", ids)
    assert len(outputs) == (1 if kind == "final" else len(ids))
    assert [one.is_finished for one in follow.seen] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].finish_reason == "length"
    assert follow.outputs.num_unfinished == 0


@pytest.mark.parametrize("include", [False, True])
def test_process_stop_string_across_tokens_ends_and_aborts(follow, include):
    """The text ends exactly there, the core is told, and what it still sends is ignored."""
    ids = follow.encode("one two STOP three")
    follow.add("final", stop=["STOP"], include_stop_str_in_output=include, max_tokens=100)
    aborted = []
    for token_id in ids:
        aborted += follow.step(token_id)
    assert aborted == ["a"]
    (output,) = follow.seen
    assert output.outputs[0].text == ("one two STOP" if include else "one two ")
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "STOP")
    assert len(output.outputs[0].token_ids) < len(ids)


def test_process_stop_string_in_several_tokens_of_one_step_cuts_the_rest(follow):
    """Tokens that were accepted together behind the stop do not count, nor do their log-probabilities."""
    ids = follow.encode("ab#cd")
    follow.add("final", stop="#", logprobs=0, max_tokens=100)
    logprobs = [fake_logprobs(token_id, 0) for token_id in ids]
    assert follow.step(*ids, logprobs=logprobs) == ["a"]
    output = follow.seen[0].outputs[0]
    assert output.text == "ab"
    assert len(output.logprobs) == len(output.token_ids) == len(follow.encode("ab#"))
    assert output.cumulative_logprob == -1.0 * len(output.token_ids)


def test_process_stop_string_with_last_token_needs_no_abort(follow):
    """If the core ended the request itself in the same step, it is not told again."""
    ids = follow.encode("ab#")
    follow.add("final", stop="#", max_tokens=len(ids))
    assert follow.step(*ids, end="length") == []
    assert (follow.seen[0].outputs[0].text, follow.seen[0].outputs[0].finish_reason) == (
        "ab",
        "stop",
    )


def test_process_stop_string_before_min_tokens_does_not_end(follow):
    """min_tokens goes before stop strings."""
    follow.add("final", stop="#", min_tokens=3, max_tokens=5)
    (sharp,) = follow.encode("#")
    for _ in range(2):
        assert follow.step(sharp) == []
    assert follow.step(sharp) == ["a"]
    assert follow.seen[0].outputs[0].text == "##"


def test_process_stop_token_is_not_in_the_text_but_in_the_tokens(follow):
    """A stop token of the user's ends the text before itself and is named as the reason."""
    (sharp,) = follow.encode("#")
    follow.add("final", stop_token_ids=[sharp], max_tokens=5)
    follow.step(40)
    follow.step(sharp, end="stop", stop_reason=sharp)
    output = follow.seen[0].outputs[0]
    assert (output.text, list(output.token_ids)) == (follow.codec.decode([40]), [40, sharp])
    assert output.stop_reason == sharp


def test_process_held_back_text_comes_with_the_end(follow):
    """Half a stop string and half a character are text after all when nothing follows."""
    follow.add("delta", stop="##", max_tokens=5)
    (sharp,) = follow.encode("#")
    half = follow.encode("€")[:1]
    follow.step(sharp)
    follow.step(*half, end="length")
    assert "".join(one.outputs[0].text for one in follow.seen) == "#\ufffd"


@pytest.mark.parametrize("kind", ["delta", "final"])
def test_process_several_outputs_come_together(follow, kind):
    """Each of n outputs is its own; the request ends with the last of them."""
    follow.add(kind, n=2, max_tokens=5)
    follow.step(50, request_id="a#1")
    follow.step(60, request_id="a#0", end="length")
    assert not any(one.is_finished for one in follow.seen)
    follow.step(51, request_id="a#1", end="stop")
    assert follow.seen[-1].is_finished
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for one in follow.seen:
        for output in one.outputs:
            tokens[output.index] += output.token_ids
    assert tokens == {0: [60], 1: [50, 51]}
    if kind == "final":
        assert [output.finish_reason for output in follow.seen[-1].outputs] == ["length", "stop"]


def test_process_logprobs_have_chosen_token_first_and_texts(follow):
    """The chosen token with its rank, then the best ones in order, each with its text."""
    follow.add("final", logprobs=3, prompt_logprobs=1, max_tokens=5)
    prompt = [fake_logprobs(41, 1)]
    follow.step(40, end="length", logprobs=[fake_logprobs(40, 3)], prompt_logprobs=prompt)
    output = follow.seen[0]
    (position,) = output.outputs[0].logprobs
    assert list(position) == [40, 41, 0]
    assert [one.rank for one in position.values()] == [2, 1, 3]
    assert position[40].decoded_token == follow.codec.decode([40])
    assert position[40].logprob == -1.0
    assert output.outputs[0].cumulative_logprob == -1.0
    assert output.prompt_logprobs[0] is None
    assert list(output.prompt_logprobs[1]) == [41, 42]


def test_process_prompt_logprobs_in_chunks_are_shown_once_in_deltas(follow):
    """A prompt computed in pieces still gives one list, with the first output."""
    follow.add("delta", prompt_logprobs=0, max_tokens=5)
    follow.step(prompt_logprobs=[fake_logprobs(41, 0)])
    assert follow.seen == []
    follow.step(50)
    follow.step(51, end="length")
    assert [len(one.prompt_logprobs or []) for one in follow.seen] == [2, 0]


def test_process_failed_request_tells_why(follow):
    """A request that failed alone carries the reason."""
    follow.add("delta")
    follow.step(end="error", error="NaN in the logits")
    assert follow.seen[-1].error == "NaN in the logits"
    assert follow.seen[-1].outputs[0].finish_reason == "error"


def test_abort_gives_a_last_output_and_names_unfinished_children(follow):
    """Finished outputs stay finished; the rest are aborted in the core."""
    follow.add("final", n=3, max_tokens=5)
    follow.step(50, request_id="a#1", end="length")
    follow.step(60, request_id="a#0")
    assert follow.outputs.abort(["a", "unknown"]) == ["a#0", "a#2"]
    assert [one.finish_reason for one in follow.seen[-1].outputs] == ["abort", "length", "abort"]
    assert follow.step(61, request_id="a#0") == []
    assert len(follow.seen) == 1


def test_add_id_in_flight_is_refused_and_free_again_after(follow):
    """Two requests of one id would get each other's tokens."""
    follow.add("delta")
    with pytest.raises(RequestError) as refused:
        follow.add("delta")
    assert refused.value.param == "request_id"
    follow.step(50, end="length")
    follow.add("delta")


def test_process_metrics_are_in_order(follow):
    """Arrival, first schedule, first and last token, end; preemptions and cached tokens are told."""
    follow.add("final")
    follow.step(50, num_cached_tokens=16, first_scheduled_time_s=1.0)
    follow.step(51, end="length", num_preemptions=2, num_cached_tokens=16)
    output = follow.seen[0]
    metrics = output.metrics
    assert output.num_cached_tokens == 16
    assert metrics.num_preemptions == 2
    assert metrics.first_scheduled_time_s == 1.0
    assert metrics.arrival_time_s <= metrics.first_token_time_s <= metrics.last_token_time_s
    assert metrics.finished_time_s == metrics.last_token_time_s


class Clock:
    """A clock that tests move."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("quire.core.engine.output_processor.time.monotonic", clock)
    return clock


@pytest.fixture
def paced(follow, clock) -> Follow:
    """Pieces come no faster than one a second."""
    follow.outputs = OutputProcessor(stream_interval_s=1.0)
    return follow


def seen_tokens(follow: Follow) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in follow.seen]


def test_paced_stream_gives_first_and_last_at_once_and_the_rest_together(paced, clock):
    """Neither the first token nor the end waits, whatever the interval."""
    ids = paced.encode("gathering of sheets")
    paced.add("delta", max_tokens=100)
    for token_id in ids[:-1]:
        paced.step(token_id)
        clock.now_s += 0.001
    paced.step(ids[-1], end="length")
    assert seen_tokens(paced) == [ids[:1], ids[1:]]
    assert "".join(one.outputs[0].text for one in paced.seen) == "gathering of sheets"
    assert paced.seen[-1].is_finished
    assert paced.outputs.flush() is None


def test_paced_stream_is_flushed_when_its_time_has_come(paced, clock):
    """A step that takes long must not keep back what was made before it."""
    ids = paced.encode("abc")
    paced.add("delta", max_tokens=100)
    paced.step(ids[0])
    paced.step(ids[1])
    clock.now_s += 0.25
    assert paced.outputs.flush() == pytest.approx(0.75)
    assert seen_tokens(paced) == [ids[:1]]
    clock.now_s += 0.75
    assert paced.outputs.flush() is None
    assert seen_tokens(paced) == [ids[:1], ids[1:2]]


def test_paced_stream_that_is_aborted_ends_with_what_was_held(paced):
    """What the engine has made and counted belongs to the user."""
    ids = paced.encode("abcd")
    paced.add("delta", max_tokens=100)
    for token_id in ids:
        paced.step(token_id)
    assert paced.outputs.abort(["a"]) == ["a"]
    assert seen_tokens(paced) == [ids[:1], ids[1:]]
    assert "".join(one.outputs[0].text for one in paced.seen) == "abcd"
    assert paced.seen[-1].outputs[0].finish_reason == "abort"


def test_paced_stream_with_stop_strings_does_not_wait(paced):
    """A token may end the output, which the core must know at once."""
    ids = paced.encode("abXc")
    paced.add("delta", stop=["X"], max_tokens=100)
    assert [paced.step(token_id) for token_id in ids[:3]] == [[], [], ["a"]]
    assert paced.seen[-1].outputs[0].finish_reason == "stop"


def test_paced_stream_keeps_a_log_probability_for_each_token(paced):
    """Held tokens bring theirs along."""
    ids = paced.encode("abcd")
    paced.add("delta", logprobs=0, max_tokens=100)
    for token_id in ids[:-1]:
        paced.step(token_id, logprobs=[fake_logprobs(token_id, 1)])
    paced.step(ids[-1], end="length", logprobs=[fake_logprobs(ids[-1], 1)])
    shown = [one for out in paced.seen for one in out.outputs[0].logprobs]
    assert [next(iter(one)) for one in shown] == ids


def test_pieces_of_many_streams_come_less_often_and_first_ones_at_once(follow, clock):
    """What pieces cost is bounded for all streams together, without making anybody wait long."""
    follow.outputs = OutputProcessor(stream_interval_s=0.01)
    ids = follow.encode("abc")
    for number in range(40):
        follow.add("delta", f"r{number}", max_tokens=100)
    updates = lambda token_id: [  # noqa: E731
        RequestUpdate(request_id=f"r{number}", new_token_ids=[token_id]) for number in range(40)
    ]
    follow.outputs.process(updates(ids[0]))
    assert len(follow.seen) == 40
    clock.now_s += 0.02
    follow.outputs.process(updates(ids[1]))
    assert len(follow.seen) == 40, "40 streams share what one may have"
    clock.now_s += 0.1
    assert follow.outputs.flush() is None
    assert len(follow.seen) == 80
