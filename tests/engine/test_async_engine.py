"""Many callers, one core: each gets his own, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager

import psutil
import pytest
from engine_fakes import MAX_MODEL_LEN, build_fake_core, expected_tokens

from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine, QueueFullError
from quire.core.errors import CheckpointError, ConfigError, EngineDeadError, RequestError
from quire.core.sampling_params import SamplingParams

GREEDY = {"temperature": 0.0, "seed": 0, "detokenize": False}


@asynccontextmanager
async def started(**settings):
    options = {
        f"fake.{name}": settings.pop(name)
        for name in ("step", "at", "running", "pause_s")
        if name in settings
    }
    config = EngineConfig(model="fake-model", options=options, **settings)
    engine = await AsyncEngine.start(config, build_core=build_fake_core)
    try:
        yield engine
    finally:
        await engine.shutdown()


def params(max_tokens: int = 8, **fields) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{**GREEDY, **fields})


async def tokens_of(outputs) -> list[int]:
    return [token async for output in outputs for token in output.outputs[0].token_ids]


async def until(is_so) -> None:
    async with asyncio.timeout(30):
        while not is_so():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


async def test_generate_many_at_once_each_gets_its_own():
    """Deltas put together are the whole output, for every caller; the last output says it is the last."""
    async with started() as engine:
        prompts = [[5 + index] * (1 + index % 7) for index in range(40)]
        outputs = await asyncio.gather(
            *(
                tokens_of(engine.generate(prompt, params(20), str(index)))
                for index, prompt in enumerate(prompts)
            )
        )
        assert outputs == [expected_tokens(prompt, 20) for prompt in prompts]
        assert engine.num_unfinished == 0
        assert (await engine.statistics()).num_finished == 40
        assert await engine.reset_prefix_cache()


async def test_generate_output_kinds_show_the_same_output():
    """Final shows once, cumulative all so far, delta what is new."""
    async with started() as engine:
        expected = expected_tokens([7, 8], 12)
        final = [one async for one in engine.generate([7, 8], params(12), "f", output_kind="final")]
        assert [list(one.outputs[0].token_ids) for one in final] == [expected]
        seen = []
        async for one in engine.generate([7, 8], params(12), "c", output_kind="cumulative"):
            seen.append(list(one.outputs[0].token_ids))
        assert seen[-1] == expected
        assert all(seen[i] == expected[: len(seen[i])] for i in range(len(seen)))


async def test_submit_slow_consumer_finds_deltas_merged():
    """Who does not read costs one output of memory, and loses nothing."""
    async with started() as engine:
        slow = await engine.submit([5], params(200, logprobs=1), "slow")
        await tokens_of(engine.generate([6], params(220), "fast"))
        await until(lambda: engine.num_unfinished == 0)
        outputs = [output async for output in slow]
        assert len(outputs) == 1
        assert list(outputs[0].outputs[0].token_ids) == expected_tokens([5], 200)
        assert len(outputs[0].outputs[0].logprobs) == 200
        assert outputs[0].outputs[0].cumulative_logprob == -200.0


async def test_generate_cancelled_consumer_aborts_in_the_core():
    """A client that hangs up frees its place in the engine."""
    async with started(pause_s="0.02") as engine:
        begun = asyncio.Event()

        async def consume():
            async for _ in engine.generate([5], params(200), "gone"):
                begun.set()

        task = asyncio.create_task(consume())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_unfinished == 0
        statistics = await engine.statistics()
        assert (statistics.num_running, statistics.num_finished) == (0, 1)


async def test_abort_ends_stream_with_reason_abort():
    """An aborted request gets a last output, with what it had."""
    async with started(pause_s="0.02") as engine:
        stream = await engine.submit([5], params(200), "a")
        first = await anext(stream)
        await engine.abort("a")
        await engine.abort("unknown")
        rest = [output async for output in stream]
        assert rest[-1].is_finished
        assert rest[-1].outputs[0].finish_reason == "abort"
        tokens = [t for one in [first, *rest] for t in one.outputs[0].token_ids]
        assert tokens == expected_tokens([5], 200)[: len(tokens)]


async def test_submit_bad_request_harms_nobody():
    """Malformed requests are refused at once; what is in flight goes on."""
    async with started() as engine:
        good = await engine.submit([5], params(50), "good")
        for prompt, fields, param in (
            ([], {}, "prompt"),
            ([4] * MAX_MODEL_LEN, {}, "prompt"),
            ([100_000], {}, "prompt"),
            ([5], {"stop_token_ids": [100_000]}, "stop_token_ids"),
            ([5], {"stop": "x", "detokenize": True}, "stop"),
            ([5], {"logits_processors": ["unknown"]}, "logits_processors"),
        ):
            with pytest.raises(RequestError) as refused:
                await engine.submit(prompt, params(**fields), "bad")
            assert refused.value.param == param
        with pytest.raises(RequestError, match="in flight"):
            await engine.submit([5], params(), "good")
        with pytest.raises(CheckpointError, match="tokenizer"):
            await engine.submit("text", params(), "text")
        assert await tokens_of(good) == expected_tokens([5], 50)


async def test_submit_full_queue_is_refused_and_frees_up():
    """Beyond max_num_queued requests are refused; when others are done they are taken again."""
    async with started(max_num_seqs=2, max_num_queued=1, pause_s="0.002") as engine:
        streams = [await engine.submit([5 + i], params(30), str(i)) for i in range(3)]
        with pytest.raises(QueueFullError):
            await engine.submit([9], params(), "more")
        for index, stream in enumerate(streams):
            assert await tokens_of(stream) == expected_tokens([5 + index], 30)
        assert await tokens_of(engine.generate([9], params(5), "more")) == expected_tokens([9], 5)


@pytest.mark.parametrize(
    ("kill", "fields", "cause"),
    [
        (signal.SIGKILL, {"step": "hang", "running": "8", "pause_s": "0.02"}, "SIGKILL"),
        (None, {"step": "bug", "running": "8", "pause_s": "0.02"}, "a bug of the worker"),
        (None, {"step": "exit", "running": "8", "pause_s": "0.02"}, "code 7"),
    ],
)
async def test_core_dies_everybody_who_waits_gets_the_cause(kill, fields, cause):
    """One typed error with the root cause for every stream and every later call; nobody hangs."""
    async with started(**fields) as engine:
        streams = [await engine.submit([5 + i], params(200), str(i)) for i in range(8)]
        if kill:
            os.kill(engine.core_pid, kill)
        results = await asyncio.wait_for(
            asyncio.gather(*map(tokens_of, streams), return_exceptions=True), timeout=30
        )
        assert all(isinstance(one, EngineDeadError) for one in results), results
        assert all(cause in one.root_cause for one in results)
        assert len({id(one) for one in results}) == len(results)
        assert engine.errored
        assert not engine.is_ready
        assert cause in engine.dead_error.root_cause
        for call in (engine.submit([5], params(), "late"), engine.statistics()):
            with pytest.raises(EngineDeadError):
                await call


async def test_statistics_pending_when_core_dies_raises():
    """A call that will never be answered ends with the same error."""
    async with started(step="hang", at="0") as engine:
        await engine.submit([5], params(200), "a")
        call = asyncio.create_task(engine.statistics())
        while (await asyncio.wait([call], timeout=0.2))[0]:  # answered before the step began
            call = asyncio.create_task(engine.statistics())
        os.kill(engine.core_pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await asyncio.wait_for(call, timeout=30)


async def test_shutdown_drains_then_refuses():
    """Requests in flight finish within the time given; new ones are refused meanwhile; no process is left."""
    async with started(pause_s="0.002") as engine:
        stream = await engine.submit([5], params(60), "a")
        pid = engine.core_pid
        closing = asyncio.create_task(engine.shutdown(drain_timeout_s=30))
        await asyncio.sleep(0)
        assert not engine.is_ready
        with pytest.raises(EngineDeadError, match="shutting down"):
            await engine.submit([6], params(), "b")
        assert await tokens_of(stream) == expected_tokens([5], 60)
        await closing
        assert not psutil.pid_exists(pid)
        assert not engine.errored
        with pytest.raises(EngineDeadError, match="closed"):
            await engine.statistics()


async def test_shutdown_without_patience_aborts():
    """With no time to drain streams end at once, as aborted."""
    async with started(pause_s="0.01") as engine:
        stream = await engine.submit([5], params(200), "a")
        await anext(stream)
        await engine.shutdown()
        assert [output.outputs[0].finish_reason async for output in stream][-1] == "abort"


async def test_start_refused_configuration_raises_it():
    """What the core cannot do is told as it was, and no process stays."""
    config = EngineConfig(model="fake-model", options={"fake.start": "config"})
    with pytest.raises(ConfigError, match="nothing fits"):
        await AsyncEngine.start(config, build_core=build_fake_core)
    children = psutil.Process().children()
    assert not [child for child in children if "spawn_main" in " ".join(child.cmdline())]


async def test_event_loop_stays_free_while_much_arrives():
    """A hundred streams at full speed leave the loop to others between slices."""
    async with started(max_num_seqs=128, max_num_batched_tokens=4096) as engine:
        longest, is_over = 0.0, False

        async def heartbeat():
            nonlocal longest
            last = time.thread_time()
            while not is_over:
                await asyncio.sleep(0)
                now = time.thread_time()
                longest, last = max(longest, now - last), now

        beat = asyncio.create_task(heartbeat())
        await asyncio.gather(
            *(tokens_of(engine.generate([5 + i], params(60), str(i))) for i in range(100))
        )
        is_over = True
        await beat
        assert longest < 0.25
