"""Every sampling setting, alone and together, against an independent implementation in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from slow_sampler import slow_change, slow_choice, slow_logprobs  # noqa: E402
from worker_driver import make_device  # noqa: E402

from quire.core.interface import NewRequest, SamplingSpec, StepBatch  # noqa: E402
from quire.core.worker.input_batch import InputBatch  # noqa: E402
from quire.core.worker.logits_processors import LogitsProcessors  # noqa: E402
from quire.core.worker.random_numbers import uniform  # noqa: E402
from quire.core.worker.sampler import CustomFailures, Sampler  # noqa: E402
from quire.core.worker.sampling_arrays import make_sampling_arrays  # noqa: E402
from quire.core.worker.staging import StagingBuffer  # noqa: E402

VOCAB = 60


class Bench:
    """A sampler over requests with a prompt, an output and settings of their own."""

    def __init__(self, specs, rng, *, num_rows=None, device=None, histories=None):
        self.specs, self.rng = specs, rng
        self.device = device or make_device()
        self.processors = LogitsProcessors()
        self.prompts = [rng.integers(0, VOCAB, 12).tolist() for _ in specs]
        self.outputs = histories or [rng.integers(0, VOCAB, 9).tolist() for _ in specs]
        self.logits = (3 * rng.standard_normal((num_rows or len(specs), VOCAB))).astype(np.float32)
        self.num_rows = num_rows or len(specs)

    def run(self):
        requests = InputBatch(
            capacity=len(self.specs),
            max_model_len=64,
            block_sizes=[64],
            vocab_size=VOCAB,
            processors=self.processors,
        )
        batch = self._batch()
        requests.apply(batch)
        step = requests.scheduled(batch)
        self.problems = [state.problem for state in requests.states(step.rows)]
        self.sampling = make_sampling_arrays(requests, step.rows, self.num_rows)
        sampler = Sampler(
            self.device, self.processors, vocab_size=VOCAB, max_rows=max(8, self.num_rows)
        )
        tensors = StagingBuffer(self.device).upload(self.sampling.arrays)
        fields = sampler.outputs(self.sampling)
        out = StagingBuffer(self.device).outputs(fields)
        self.failures = CustomFailures()
        sampler.run(
            torch.from_numpy(self.logits.copy()), self.sampling, tensors, out, self.failures
        )
        return {name: tensor.numpy() for name, tensor in out.items()}

    def expected(self) -> list[int]:
        numbers = uniform(
            np.array([spec.seed for spec in self.specs], np.uint64),
            np.array([len(output) for output in self.outputs]),
        )
        rows = zip(self.logits, self.specs, self.prompts, self.outputs, numbers, strict=False)
        return [
            slow_choice(slow_change(logits, spec, prompt, output), spec, float(number))
            for logits, spec, prompt, output, number in rows
        ]

    def _batch(self) -> StepBatch:
        names = [str(index) for index in range(len(self.specs))]
        rows = zip(names, self.prompts, self.outputs, self.specs, strict=True)
        return StepBatch(
            step_id=1,
            finished_request_ids=[],
            new_requests=[
                NewRequest(
                    request_id=name,
                    token_ids=prompt + output,
                    num_prompt_tokens=len(prompt),
                    num_computed_tokens=0,
                    block_ids=[[1]],
                    sampling=spec,
                )
                for name, prompt, output, spec in rows
            ],
            request_ids=names,
            num_new_tokens=[
                len(p) + len(o) for p, o in zip(self.prompts, self.outputs, strict=True)
            ],
            num_computed_tokens=[0] * len(names),
            new_block_ids=[None] * len(names),
            samples=[True] * len(names),
        )


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_more_than_vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p_1": {"min_p": 1.0},
    "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
    "repetition": {"repetition_penalty": 1.8},
    "repetition_below_1": {"repetition_penalty": 0.5},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.5},
    "penalties_greedy": {
        "temperature": 0.0,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.9,
    },
    "bias": {"logit_bias": ((3, 4.0), (5, -100.0), (3, 2.0))},
    "bias_greedy": {"temperature": 0.0, "logit_bias": ((7, 50.0),)},
    "allowed": {"allowed_token_ids": (4, 9, 33, 9)},
    "allowed_greedy": {"temperature": 0.0, "allowed_token_ids": (4, 9, 33)},
    "min_tokens": {"min_tokens": 10, "min_tokens_forbids": tuple(range(30))},
    "min_tokens_reached": {"min_tokens": 9, "min_tokens_forbids": tuple(range(30))},
    "bad_words": {"bad_words": tuple((token,) for token in range(40))},
    "everything": {
        "temperature": 0.8,
        "top_k": 25,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.4,
        "logit_bias": ((1, 1.0), (2, -1.0)),
        "allowed_token_ids": tuple(range(50)),
        "bad_words": ((1,), (2, 3)),
        "min_tokens": 20,
        "min_tokens_forbids": (0, 4),
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sampler_one_setting_equals_slow_implementation(name, rng):
    """Each setting does what its name says, for many seeds."""
    bench = Bench([SamplingSpec(**SETTINGS[name], seed=seed) for seed in range(64)], rng)
    assert bench.run()["tokens"].tolist() == bench.expected()


def test_sampler_all_settings_in_one_batch_equal_slow_implementation(rng):
    """Rows do not see each other's settings."""
    bench = Bench([SamplingSpec(**s, seed=n) for n, s in enumerate(SETTINGS.values())], rng)
    assert bench.run()["tokens"].tolist() == bench.expected()


@pytest.mark.parametrize("name", ["greedy", "plain", "everything"])
def test_sampler_with_padding_rows_leaves_real_rows_as_they_are(name, rng):
    """A device with buckets samples rows that nobody asked for."""
    specs = [SamplingSpec(**SETTINGS[name], seed=seed) for seed in range(3)]
    bench = Bench(specs, rng, num_rows=8)
    assert bench.run()["tokens"][:3].tolist() == bench.expected()


def test_sampler_plain_rows_prepare_nothing_they_do_not_need(rng):
    """Greedy uploads nothing, plain sampling its temperature and random number."""
    greedy = Bench([SamplingSpec(temperature=0.0, top_k=3, top_p=0.5)] * 2, rng)
    greedy.run()
    assert greedy.sampling.arrays == {}
    assert greedy.sampling.is_all_greedy
    plain = Bench([SamplingSpec()] * 2, rng)
    plain.run()
    assert set(plain.sampling.arrays) == {"temperature", "uniform"}
    assert not plain.sampling.needs_filter


def test_bad_word_of_several_tokens_is_forbidden_only_after_its_beginning(rng):
    """The last token of a bad word may stand anywhere else."""
    spec = SamplingSpec(temperature=0.0, bad_words=((5, 6, 7),))
    histories = [[1, 5, 6], [5, 1, 6], [6], [5, 6]]
    bench = Bench([spec] * 4, rng, histories=histories)
    bench.prompts[2] = [*bench.prompts[2][:-1], 5]  # begins in the prompt: not produced here
    bench.logits[:, 7] = 100.0
    tokens = bench.run()["tokens"].tolist()
    assert [token == 7 for token in tokens] == [False, True, True, False]
    assert tokens == bench.expected()


def test_tiny_temperature_is_greedy(rng):
    """A temperature that would overflow float32 picks the largest logit and not NaN."""
    bench = Bench([SamplingSpec(temperature=1e-30, seed=s) for s in range(4)], rng)
    assert bench.run()["tokens"].tolist() == bench.logits.argmax(axis=1).tolist()


def test_logprobs_are_of_the_raw_logits_and_of_those_rows_that_asked(rng):
    """Changed logits choose the token; the model's own say how likely it was."""
    specs = [
        SamplingSpec(temperature=0.0),
        SamplingSpec(temperature=0.0, logit_bias=((11, 90.0),), num_logprobs=3),
        SamplingSpec(seed=5, num_logprobs=0),
        SamplingSpec(seed=6, top_k=2, repetition_penalty=3.0, num_logprobs=200),
    ]
    bench = Bench(specs, rng)
    out = bench.run()
    assert out["tokens"][1] == 11
    assert bench.sampling.logprob_rows.tolist() == [1, 2, 3]
    assert out["top_ids"].shape == (3, VOCAB)
    for place, row in enumerate([1, 2, 3]):
        expected = slow_logprobs(bench.logits[row])
        token = out["tokens"][row]
        assert out["selected"][place] == pytest.approx(expected[token], abs=1e-5)
        assert out["ranks"][place] == 1 + (expected > expected[token]).sum()
        order = np.argsort(-expected, kind="stable")
        assert out["top_ids"][place].tolist() == order.tolist()
        np.testing.assert_allclose(out["top_logprobs"][place], expected[order], atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["greedy", "plain", "filters", "everything"])
def test_broken_logits_mark_their_row_and_no_other(name, value, rng):
    """One request's NaN does not reach another's token, and no id beyond the vocabulary."""
    specs = [SamplingSpec(**SETTINGS[name], seed=seed) for seed in range(4)]
    bench = Bench(specs, rng)
    expected = bench.expected()
    bench.logits[2, 30] = value
    out = bench.run()
    assert out["is_broken"].tolist() == [False, False, True, False]
    assert np.delete(out["tokens"], 2).tolist() == expected[:2] + expected[3:]
    assert out["tokens"][2] == 0


def test_row_without_any_token_left_is_marked_empty(rng):
    """Settings that contradict each other fail their own request."""
    specs = [
        SamplingSpec(allowed_token_ids=(5,)),
        SamplingSpec(allowed_token_ids=(5,), min_tokens=99, min_tokens_forbids=(5,)),
    ]
    out = Bench(specs, rng).run()
    assert out["is_empty"].tolist() == [False, True]
    assert out["is_broken"].tolist() == [False, False]
    assert out["tokens"][0] == 5


def test_infinite_bias_forces_its_token(rng):
    """Infinity is a legal bias; it must not make the row unusable."""
    bench = Bench([SamplingSpec(logit_bias=((9, np.inf),), seed=seed) for seed in range(3)], rng)
    out = bench.run()
    assert out["tokens"].tolist() == [9, 9, 9]
    assert not out["is_empty"].any()


def test_custom_processors_run_in_order_and_see_the_history(rng):
    """A processor gets prompt, output and logits of its own row, before anything else changes them."""
    spec = SamplingSpec(
        temperature=0.0, logits_processors=("note", "double"), logit_bias=((3, 1000.0),)
    )
    bench = Bench([SamplingSpec(temperature=0.0), spec], rng)
    seen = []

    def note(prompt_ids, output_ids, logits):
        seen.append((list(prompt_ids), list(output_ids), logits.clone()))
        return logits

    def double(prompt_ids, output_ids, logits):
        assert len(seen) == 1
        row = torch.zeros_like(logits)
        row[3] = -5000.0
        row[17] = 1.0
        return row

    bench.processors.register("note", note)
    bench.processors.register("double", double)
    tokens = bench.run()["tokens"].tolist()
    ((prompt, output, logits),) = seen
    assert (prompt, output) == (bench.prompts[1], bench.outputs[1])
    np.testing.assert_array_equal(logits.numpy(), bench.logits[1])
    assert tokens == [bench.logits[0].argmax(), 17]


def test_custom_processor_that_raises_fails_its_own_row(rng):
    """A user's bug costs that user's request alone."""
    bench = Bench([SamplingSpec(seed=1), SamplingSpec(seed=2, logits_processors=("bad",))], rng)
    expected = bench.expected()

    def bad(prompt_ids, output_ids, logits):
        logits.fill_(float("nan"))
        raise ZeroDivisionError("oops")

    bench.processors.register("bad", bad)
    out = bench.run()
    assert out["tokens"][0] == expected[0]
    assert list(bench.failures.messages) == ["1"]
    assert "ZeroDivisionError: oops" in bench.failures.messages["1"]


def test_custom_processor_that_returns_another_shape_fails_its_own_row(rng):
    """A wrong result is reported with both shapes."""
    bench = Bench([SamplingSpec(logits_processors=("cut",))], rng)
    bench.processors.register("cut", lambda prompt_ids, output_ids, logits: logits[:5])
    bench.run()
    assert (
        "returned shape (5,); it must return a tensor of shape (60,)"
        in (bench.failures.messages["0"])
    )
