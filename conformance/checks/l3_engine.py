"""Level 3: the real engine on the device: many requests, however they meet, begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.conformance.cases import check, dtypes
from quire.conformance.engines import TrialEngine, tight_engine, trial_engine, trial_llm
from quire.conformance.trial import Trial
from quire.core.engine.llm import LLM
from quire.core.interface import Capabilities, SamplingSpec
from quire.core.sampling_params import SamplingParams

_LENGTHS = (1, 50, 7, 33, 16, 90, 15, 17, 2, 64, 31, 5)
_NUM_OUTPUT = 10
_NUM_SHORT = 320
_WARM = SamplingSpec(temperature=2.0, seed=7)


def _needs_cache_dtype(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if arguments["dtype"] not in claims.cache_dtypes:
        return f"cache dtype {arguments['dtype']} is not claimed"
    return ""


def _needs_asynchronous(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    del arguments
    return "" if claims.is_asynchronous else "the device is synchronous: steps never overlap"


@check(level=3, op="engine", over=dtypes("float32", "bfloat16"), needs=_needs_cache_dtype)
def concurrent_equals_alone(trial: Trial, *, dtype: str) -> None:
    """Requests of mixed lengths that run together give the tokens that each gives alone."""
    with trial_engine(trial, dtype) as engine:
        prompts = [engine.prompt(length) for length in _LENGTHS]
        alone = [engine.run_alone(prompt, _NUM_OUTPUT) for prompt in prompts]
        engine.core.reset_prefix_cache()
        answers = [
            engine.ask(f"r{number}", prompt, _NUM_OUTPUT) for number, prompt in enumerate(prompts)
        ]
        engine.run()
        for prompt, answer, expected in zip(prompts, answers, alone, strict=True):
            engine.hold_same(prompt, answer.tokens, expected, f"among {len(prompts)} requests")
        engine.hold_empty("after requests of mixed lengths")


@check(level=3, op="engine")
def aborts_leave_nothing(trial: Trial) -> None:
    """Requests that are ended at random moments leave no block and disturb nobody."""
    with trial_engine(trial) as engine:
        keeper = engine.prompt(29)
        expected = engine.run_alone(keeper, 40)
        kept = engine.ask("kept", keeper, 40)
        names = [f"r{number}" for number in range(24)]
        for name in names:
            engine.ask(name, engine.prompt(int(trial.rng.integers(1, 70))), 30)
        while engine.core.has_work():
            engine.step()
            if names and trial.rng.random() < 0.6:
                engine.abort([names.pop(int(trial.rng.integers(len(names))))])
        engine.hold_same(keeper, kept.tokens, expected, "among requests that were aborted")
        engine.hold_empty("after aborts at random moments")


@check(level=3, op="engine")
def many_short_requests_leak_nothing(trial: Trial) -> None:
    """Hundreds of requests later memory and blocks are what they were after the first few."""
    with trial_engine(trial, enable_prefix_caching=False) as engine:
        _run_short(engine, "warm", 40)
        before = engine.core.statistics().memory_bytes
        _run_short(engine, "r", _NUM_SHORT)
        after = engine.core.statistics().memory_bytes
        engine.hold_empty(f"after {_NUM_SHORT} short requests")
        grown = {tag: after[tag] - size for tag, size in before.items() if after[tag] > size}
        trial.require(
            not grown,
            f"after {_NUM_SHORT} short requests the worker's memory has grown by {grown} bytes: "
            "something is kept of requests that it was told to forget (finished_request_ids)",
        )
        counts = {len(answer.tokens) for answer in engine.answers.values()}
        trial.require(counts == {2}, f"short requests gave {counts} tokens instead of 2")


def _run_short(engine: TrialEngine, name: str, count: int) -> None:
    for number in range(count):
        engine.ask(f"{name}{number}", engine.prompt(1 + number % 9), 2)
    engine.run()


@check(level=3, op="engine")
def preemption_in_a_tight_cache(trial: Trial) -> None:
    """Requests that lose their blocks and get others go on as if nothing had happened."""
    with tight_engine(trial) as engine:
        prompts = [engine.prompt(60 + 4 * number) for number in range(6)]
        alone = [engine.run_alone(prompt, 50) for prompt in prompts]
        engine.core.reset_prefix_cache()
        answers = [engine.ask(f"r{n}", prompt, 50) for n, prompt in enumerate(prompts)]
        engine.run()
        for prompt, answer, expected in zip(prompts, answers, alone, strict=True):
            engine.hold_same(prompt, answer.tokens, expected, "in a cache for two, preempted")
        num_tokens = sum(len(prompt) + 50 for prompt in prompts)
        is_tight = engine.core.facts.num_cache_tokens < num_tokens // 2
        if is_tight and engine.core.config.max_num_seqs >= len(prompts):
            trial.require(engine.core.statistics().num_preemptions, "nothing was preempted")
        engine.hold_empty("after preemptions")


@check(level=3, op="engine")
def prefix_hits(trial: Trial) -> None:
    """A prompt whose beginning is cached gives the tokens of one that is computed whole."""
    with trial_engine(trial) as engine:
        system = engine.prompt(3 * trial.block_size)
        prompts = [system + engine.prompt(length) for length in (1, 9, 20)]
        alone = [engine.run_alone(prompt, _NUM_OUTPUT) for prompt in prompts]
        engine.core.reset_prefix_cache()
        for round_number in range(2):
            for number, (prompt, expected) in enumerate(zip(prompts, alone, strict=True)):
                answer = engine.ask(f"r{round_number}-{number}", prompt, _NUM_OUTPUT)
                engine.run()
                assert answer.last is not None, answer
                hit = answer.last.num_cached_tokens
                trial.require(
                    (hit > 0) == bool(round_number or number),
                    f"{hit} tokens of the prompt were found in the cache",
                )
                how = f"with {hit} tokens of its prompt from the prefix cache"
                engine.hold_same(prompt, answer.tokens, expected, how)
        engine.hold_empty("after prefix hits")


@check(level=3, op="engine")
def seeds(trial: Trial) -> None:
    """A seed gives the same tokens in every run; another one gives others."""
    with trial_engine(trial) as engine:
        prompt = engine.prompt(20)
        first, again = (engine.run_alone(prompt, 16, _WARM) for _ in range(2))
        trial.require(
            first == again,
            f"seed 7 gave {first} and then {again}: token i must use random number i of its seed",
        )
        other = engine.run_alone(prompt, 16, SamplingSpec(temperature=2.0, seed=8))
        trial.require(other != first, "seeds 7 and 8 gave the same 16 tokens: is the seed used?")
        among = engine.ask("among", prompt, 16, _WARM)
        for number in range(5):
            engine.ask(f"r{number}", engine.prompt(3 + 9 * number), 16)
        engine.run()
        common = next(
            (i for i, (a, b) in enumerate(zip(among.tokens, first, strict=True)) if a != b), 16
        )
        trial.require(
            common,
            f"seed 7 gave {first} alone and {among.tokens} among others, from the first token on: "
            "random numbers must not depend on the batch",
        )
        engine.hold_empty("after seeded requests")


@check(level=3, op="engine")
def restarts_in_one_process(trial: Trial) -> None:
    """An engine that is closed can be followed by another in the same process."""
    answers = []
    prompt: list[int] = []
    for _ in range(3):
        with trial_engine(trial) as engine:
            prompt = prompt or engine.prompt(40)
            answers.append(engine.run_alone(prompt, _NUM_OUTPUT))
            engine.hold_same(prompt, answers[-1], answers[0], "after a restart")


@check(level=3, op="engine", needs=_needs_asynchronous)
def overlap_changes_nothing(trial: Trial) -> None:
    """Steps that are submitted before the last one is back give the same tokens."""
    prompts: list[list[int]] = []
    expected: list[list[int]] = []
    for overlaps in (False, True):
        with trial_engine(trial, overlap_scheduling=overlaps) as engine:
            prompts = prompts or [engine.prompt(length) for length in _LENGTHS]
            answers = [engine.ask(f"r{n}", p, _NUM_OUTPUT) for n, p in enumerate(prompts)]
            engine.run()
            expected = expected or [answer.tokens for answer in answers]
            for prompt, answer, tokens in zip(prompts, answers, expected, strict=True):
                engine.hold_same(prompt, answer.tokens, tokens, "with steps that overlap")
            engine.hold_empty("after steps that overlap")


def _params(**settings: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "detokenize": False} | settings
    )


def _prompts(trial: Trial, *lengths: int) -> list[dict[str, list[int]]]:
    rng = trial.rng
    return [{"prompt_token_ids": [int(t) for t in rng.integers(4, 256, n)]} for n in lengths]


def _tokens(
    llm: LLM, prompts: list[dict[str, list[int]]], params: SamplingParams
) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(part.token_ids) for output in outputs for part in output.outputs]


@check(level=3, op="engine")
def several_outputs(trial: Trial) -> None:
    """n outputs of one prompt: greedy ones are alike, sampled ones are not, none is missing."""
    with trial_llm(trial) as llm:
        prompts = _prompts(trial, 21)
        greedy = _tokens(llm, prompts, _params())
        sampled = _tokens(llm, prompts, _params(n=3, temperature=2.0, seed=5))
        trial.require(len(sampled) == 3, f"n=3 gave {len(sampled)} outputs")
        trial.require(
            len({tuple(tokens) for tokens in sampled}) == 3,
            f"n=3 at temperature 2 gave outputs that are alike ({sampled}): each has its own seed",
        )
        again = _tokens(llm, prompts, _params())
        trial.require(again == greedy, f"greedy gave {greedy}, and {again} after n=3")


@check(level=3, op="engine")
def stop_and_stream(trial: Trial) -> None:
    """A stop token ends the output where it comes; a stream's pieces are the whole output."""
    with trial_llm(trial) as llm:
        (prompt,) = _prompts(trial, 18)
        (whole,) = _tokens(llm, [prompt], _params())
        pieces = [list(output.outputs[0].token_ids) for output in llm.stream(prompt, _params())]
        streamed = [token for piece in pieces for token in piece]
        trial.require(streamed == whole, f"streamed {streamed}, at once {whole}")
        stop = whole[5]
        at = whole.index(stop)
        (output,) = llm.generate([prompt], _params(stop_token_ids=[stop]), use_tqdm=False)
        part = output.outputs[0]
        trial.require(
            (list(part.token_ids), part.finish_reason) == (whole[: at + 1], "stop"),
            f"with stop token {stop} the output is {list(part.token_ids)} ({part.finish_reason}); "
            f"without it {whole}: it must end with the first {stop}",
        )
        for early in llm.stream(prompt, _params()):
            del early
            break
        trial.require(_tokens(llm, [prompt], _params()) == [whole], "other tokens after an abort")


@check(level=3, op="engine")
def own_process_equals_this_one(trial: Trial) -> None:
    """An engine in a process of its own, as a server has it, gives the same tokens."""
    prompts = _prompts(trial, 3, 40, 17, 64)
    with trial_llm(trial) as llm:
        here = _tokens(llm, prompts, _params())
    with trial_llm(trial, has_own_process=trial.backend is not None) as llm:
        there = _tokens(llm, prompts, _params())
    trial.require(
        there == here,
        f"the engine in its own process gave {there}, in this one {here}: does the device keep "
        "state that a fresh process does not have?",
    )
