"""What comes back of a step: log-probabilities, seeds, and failures that stay with their request."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from slow_sampler import slow_logprobs  # noqa: E402
from worker_driver import GREEDY, Driver, make_device, make_worker  # noqa: E402

from quire.backends.sim.device import SimDevice  # noqa: E402
from quire.core.errors import QuireError  # noqa: E402
from quire.core.interface import SamplingSpec  # noqa: E402

SEEDED = {
    "plain": {},
    "filters": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "bad_words": {"bad_words": tuple((a, b) for a in range(4, 300) for b in (7, 9))},
}


def run_alone(directory, prompt, sampling, **changes) -> list[int]:
    driver = Driver(make_worker(directory, **changes))
    driver.add("alone", prompt, 12, sampling)
    return driver.run()["alone"]


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_request_any_batch_chunk_and_preemption_gives_the_same_tokens(name, tiny, prompts):
    """A token depends on its request's seed and place, and on nothing else in flight."""
    sampling = SamplingSpec(seed=1234, temperature=0.9, **SEEDED[name])
    expected = run_alone(tiny(), prompts["r33"], sampling)
    driver = Driver(make_worker(tiny()))
    watched = driver.add("watched", prompts["r33"], 12, sampling)
    for number, prompt in enumerate(prompts.values()):
        driver.add(f"other{number}", prompt, 5, SamplingSpec(seed=number, top_k=7))
    for _ in range(6):
        driver.step(driver.plan_step(9))
    driver.preempt(watched)
    driver.run(9)
    assert watched.output == expected
    overlapped = Driver(make_worker(tiny(), device=SimDevice()))
    watched = overlapped.add("watched", prompts["r33"], 12, sampling)
    overlapped.add("other", prompts["r8"], 5, SamplingSpec(seed=3))
    overlapped.run_overlapped(9)
    assert watched.output == expected


def test_seeds_of_the_same_prompt_give_different_tokens(tiny, prompts):
    """Ten requests for one prompt are ten samples."""
    driver = Driver(make_worker(tiny(), max_num_seqs=10))
    for seed in range(10):
        driver.add(str(seed), prompts["r8"], 8, SamplingSpec(seed=seed, temperature=1.5))
    outputs = driver.run()
    assert len({tuple(tokens) for tokens in outputs.values()}) > 5


def test_submit_on_an_asynchronous_device_returns_before_the_step_is_done(tiny, prompts, oracle):
    """Two steps wait in the queue; the second takes a token that no host has seen."""
    device = SimDevice()
    driver = Driver(make_worker(tiny(), device=device))
    job = driver.add("r33", prompts["r33"], 10)
    batches = [driver.make_batch({"r33": count}) for count in (33, 1)]
    steps = [driver.worker.submit(batch) for batch in batches]
    assert not device.queue().backlog.has_reached(1)
    for batch, step in zip(batches, steps, strict=True):
        driver.receive(batch, step.result())
    assert job.output == oracle()["r33"][:2]


def test_history_of_a_request_is_complete_when_a_step_needs_it(tiny, prompts, oracle):
    """Processors, penalties and bad words never see the placeholder of a token on its way."""
    worker = make_worker(tiny(), device=SimDevice())
    seen = []

    def note(prompt_ids, output_ids, logits):
        seen.append(list(output_ids))
        return logits

    worker.logits_processors.register("note", note)
    driver = Driver(worker)
    driver.add("r33", prompts["r33"], 6, SamplingSpec(temperature=0.0, logits_processors=("note",)))
    driver.run_overlapped()
    assert seen == [oracle()["r33"][:count] for count in range(6)]


@pytest.fixture(scope="module")
def float64_logprobs(tiny):
    """log_softmax in float64 after each position of a sequence, by transformers in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float64).eval()

    @torch.no_grad()
    def of(tokens: list[int]) -> np.ndarray:
        logits = model(torch.tensor([tokens])).logits[0].double().numpy()
        return np.stack([slow_logprobs(row) for row in logits])

    return of


def check_position(entry, token: int, expected: np.ndarray, num_top: int) -> None:
    """One PositionLogprobs against the float64 row that predicts it."""
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(expected[token], abs=2e-4)
    better = (expected > expected[token] + 2e-4).sum()
    ties = (np.abs(expected - expected[token]) <= 2e-4).sum()
    assert 1 + better <= entry.rank <= better + ties
    assert len(entry.top_ids) == len(entry.top_logprobs) == num_top
    np.testing.assert_allclose(entry.top_logprobs, expected[entry.top_ids], atol=2e-4)
    np.testing.assert_allclose(entry.top_logprobs, np.sort(expected)[::-1][:num_top], atol=2e-4)


@pytest.mark.parametrize("device", [make_device, SimDevice])
def test_logprobs_equal_those_of_transformers_in_float64(device, tiny, prompts, float64_logprobs):
    """Every sampled token of those who asked, as many alternatives as they asked for."""
    driver = Driver(make_worker(tiny(), device=device()))
    asks = {
        "three": SamplingSpec(temperature=0.0, num_logprobs=3),
        "none": SamplingSpec(temperature=0.0),
        "zero": SamplingSpec(seed=4, temperature=1.3, num_logprobs=0),
        "biased": SamplingSpec(seed=5, logit_bias=((9, 5.0),), num_logprobs=5),
    }
    for name, sampling in asks.items():
        driver.add(name, prompts["r33"], 6, sampling)
    driver.run(16)
    for name, sampling in asks.items():
        job = driver.jobs[name]
        if sampling.num_logprobs is None:
            assert job.logprobs == []
            continue
        expected = float64_logprobs(job.prompt + job.output)
        assert len(job.logprobs) == 6
        for place, entry in enumerate(job.logprobs):
            row = expected[len(job.prompt) - 1 + place]
            check_position(entry, job.output[place], row, sampling.num_logprobs)


def test_logprobs_columns_tell_who_asked(tiny, prompts):
    """None where nobody asked, an empty list where nothing was sampled yet."""
    driver = Driver(make_worker(tiny()))
    driver.add("plain", prompts["r8"], 2)
    assert driver.step({"plain": 8}).logprobs is None
    driver.add("asks", prompts["r33"], 2, SamplingSpec(temperature=0.0, num_logprobs=1))
    assert driver.step({"plain": 1, "asks": 10}).logprobs == [None, []]
    (column,) = driver.step({"asks": 23}).logprobs
    assert len(column) == 1


@pytest.mark.parametrize("chunk", [64, 7, 1])
@pytest.mark.parametrize("max_slice_bytes", [64 * 2**20, 4 * 512 * 3])
def test_prompt_logprobs_equal_those_of_transformers_in_float64(
    chunk, max_slice_bytes, tiny, prompts, float64_logprobs, monkeypatch
):
    """Chunk by chunk and slice by slice: an entry for each prompt token but the first."""
    from quire.core.worker import model_runner, prompt_logprobs

    def sliced(*args):
        return prompt_logprobs.run_prompt_logprobs(*args, max_slice_bytes=max_slice_bytes)

    monkeypatch.setattr(model_runner, "run_prompt_logprobs", sliced)
    driver = Driver(make_worker(tiny()))
    asks = {"r50": 2, "r1": 1, "r17": 0}
    for name, number in asks.items():
        sampling = SamplingSpec(temperature=0.0, num_prompt_logprobs=number)
        driver.add(name, prompts[name], 3, sampling)
    driver.add("plain", prompts["r33"], 3)
    driver.run(chunk)
    assert driver.jobs["plain"].prompt_logprobs == []
    for name, number in asks.items():
        job = driver.jobs[name]
        expected = float64_logprobs(job.prompt)
        assert len(job.prompt_logprobs) == len(job.prompt) - 1
        for place, entry in enumerate(job.prompt_logprobs):
            check_position(entry, job.prompt[place + 1], expected[place], number)


def test_penalties_greedy_equal_repetition_penalty_of_transformers(tiny, prompts):
    """The one penalty that transformers has too, over a whole generation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompts["r17"]])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.7,
    )[0, ids.shape[1] :].tolist()
    sampling = SamplingSpec(temperature=0.0, repetition_penalty=1.7)
    assert run_alone(tiny(), prompts["r17"], sampling) == expected


# --- failures ------------------------------------------------------------------------------------


def poison_rows(driver: Driver, request_id: str) -> None:
    """From now on the model's logits are NaN for one request's row."""
    runner = driver.worker._running()
    sampler_run = runner._sampler.run

    def run(logits, sampling, tensors, out, failures):
        names = [driver.order[index] for index in driver.sampled]
        logits[names.index(request_id), 5] = float("nan")
        return sampler_run(logits, sampling, tensors, out, failures)

    runner._sampler.run = run


def test_nan_logits_fail_their_own_request(tiny, prompts, oracle):
    """One request gets a message, the others get their tokens."""
    driver = Driver(make_worker(tiny()))
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=10)
    driver.step(driver.plan_step())
    work = driver.plan_step()
    driver.order, driver.sampled = list(work), range(len(work))
    original = driver.worker._running()._sampler.run
    poison_rows(driver, "r33")
    result = driver.step(work)
    driver.worker._running()._sampler.run = original
    assert list(result.errors) == ["r33"]
    assert "no finite largest value" in result.errors["r33"]
    outputs = driver.run()
    expected = oracle()
    assert len(outputs.pop("r33")) == 1
    assert outputs == {name: tokens for name, tokens in expected.items() if name != "r33"}


@pytest.mark.parametrize("device", [make_device, SimDevice])
def test_processor_that_raises_fails_its_own_request(device, tiny, prompts, oracle):
    """A function registered by the user's process is found, and its exception is told."""
    worker = make_worker(tiny(), device=device())

    def fail_from_the_third_on(prompt_ids, output_ids, logits):
        if len(output_ids) >= 2:
            raise KeyError("third")
        return logits

    worker.logits_processors.register("fussy", fail_from_the_third_on)
    driver = Driver(worker)
    sampling = SamplingSpec(temperature=0.0, logits_processors=("fussy",))
    driver.add("r33", prompts["r33"], 10, sampling)
    driver.add("r8", prompts["r8"], 10)
    driver.run_overlapped()
    assert driver.jobs["r33"].output == oracle()["r33"][:2]
    assert "KeyError: 'third'" in driver.jobs["r33"].error
    assert driver.jobs["r8"].output == oracle()["r8"]


def test_processors_of_the_configuration_are_imported(tiny, prompts, oracle):
    """`module:attribute` in WorkerConfig is a processor by its name."""
    worker = make_worker(tiny(), logits_processors={"same": "operator:or_"})
    driver = Driver(worker)
    driver.add("a", prompts["r8"], 2, SamplingSpec(temperature=0.0, logits_processors=("same",)))
    driver.run()
    assert "raised TypeError" in driver.jobs["a"].error


def test_request_with_ids_out_of_bounds_fails_alone(tiny, prompts, oracle):
    """An id that no embedding has is refused here, whatever the front let through."""
    driver = Driver(make_worker(tiny()))
    driver.add("bad", [5, 512, 7], 4)
    driver.add("bias", prompts["r7"], 4, SamplingSpec(logit_bias=((9999, 1.0),)))
    driver.add("r8", prompts["r8"], 10)
    driver.run()
    assert "token_ids holds token 512" in driver.jobs["bad"].error
    assert "logit_bias holds token 9999" in driver.jobs["bias"].error
    assert driver.jobs["r8"].output == oracle()["r8"]


def test_unknown_request_is_refused_and_the_worker_lives_on(tiny, prompts, oracle):
    """A batch that does not fit is an error of the engine, not of the worker."""
    driver = Driver(make_worker(tiny()))
    driver.add("r8", prompts["r8"], 10)
    driver.step({"r8": 8})
    job = driver.jobs["r8"]
    batch = driver.make_batch({"r8": 1})
    stray = type(batch)(
        **{name: getattr(batch, name) for name in batch.__struct_fields__ if name != "request_ids"},
        request_ids=["ghost"],
    )
    with pytest.raises(QuireError, match="ghost"):
        driver.worker.execute(stray)
    driver.receive(batch, driver.worker.execute(batch))
    driver.run()
    assert job.output == oracle()["r8"]
    assert job.sampling is GREEDY


def test_token_masks_bind_their_request_alone(tiny, prompts):
    """A mask allows what its bits say, from the first bit to the last, and no other row sees it."""
    driver = Driver(make_worker(tiny()))
    free = driver.add("free", prompts["r8"], 1)
    masked = [driver.add(f"masked{n}", prompts["r8"], 1) for n in range(3)]
    vocab_size = driver.worker._model.description.vocab_size
    allowed = [0, 31, vocab_size - 1]
    masks = {
        job.request_id: mask_of([token], vocab_size)
        for job, token in zip(masked, allowed, strict=True)
    }
    batch = driver.make_batch(driver.plan_step(64))
    batch = msgspec.structs.replace(batch, token_masks=masks)
    driver.receive(batch, driver.worker.execute(batch))
    assert [job.output for job in masked] == [[token] for token in allowed]
    assert free.output == run_alone(tiny(), prompts["r8"], GREEDY)[:1]


def mask_of(token_ids, vocab_size):
    """The wire form of a set of tokens."""
    words = np.zeros(-(-vocab_size // 32), "<u4")
    for token in token_ids:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words.tobytes()
