"""The worker in a process of its own: the same answers, and one typed error that says how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_fakes import expected_tokens, make_facts, model_info, spec
from test_core import PROMPTS, run_all, tokens_of
from test_process import is_gone, wait_until
from worker_fakes import start_fake_worker

from quire.core.config import EngineConfig
from quire.core.engine.core import EngineCore, make_core
from quire.core.engine.facts import PlanFacts
from quire.core.errors import (
    ConfigError,
    DeviceLost,
    DeviceOutOfMemory,
    EngineDeadError,
    RequestError,
    UnsupportedError,
)
from quire.core.executor import error_output, worker_process
from quire.core.executor.error_output import ErrorOutput
from quire.core.executor.worker_process import WorkerProcess
from quire.core.interface.worker import CachePlan, NewRequest, SamplingSpec, StepBatch


@contextmanager
def started(**options: object) -> Iterator[WorkerProcess]:
    settings = {name: options.pop(name) for name in list(options) if "_" in name}
    config = EngineConfig(
        model="fake-model",
        max_num_batched_tokens=32,
        worker_process=True,
        options={f"fake.{name}": str(value) for name, value in options.items()},
        **settings,
    )
    worker = WorkerProcess(start_fake_worker, config)
    try:
        assert worker.started(PlanFacts).config == config
        yield worker
    finally:
        worker.close()
        assert is_gone(worker.pid)


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    """One process for the tests that do it no harm."""
    with started() as worker:
        yield worker


def core_on(worker: WorkerProcess, **settings: object) -> EngineCore:
    config = EngineConfig(model="fake-model", max_num_seqs=8, max_num_batched_tokens=32, **settings)
    plan = CachePlan(num_blocks=[512])
    return make_core(config, make_facts(config, 512), model_info(), plan, worker)


def batch_of(step_id: int, name: str = "a", *, is_new: bool = False) -> StepBatch:
    """One request of one token; decode steps follow."""
    new = NewRequest(
        request_id=name,
        token_ids=[9],
        num_prompt_tokens=1,
        num_computed_tokens=0,
        block_ids=[[1]],
        sampling=SamplingSpec(temperature=0.0),
    )
    return StepBatch(
        step_id=step_id,
        finished_request_ids=[],
        new_requests=[new] if is_new else [],
        request_ids=[name],
        num_new_tokens=[1],
        num_computed_tokens=[0 if is_new else step_id],
        new_block_ids=[None],
        samples=[True],
    )


def notes_of(error: BaseException) -> str:
    return "".join(getattr(error, "__notes__", ()))


# --- the same answers -----------------------------------------------------------------------------


def test_calls_before_the_first_step_answer_as_in_process(worker):
    """What the start of an engine asks crosses the processes whole, and is answered over there."""
    assert worker.load_model() == model_info()
    assert worker.cache_budget_bytes() == 1 << 20
    worker.allocate_cache(CachePlan(num_blocks=[512]))
    worker.warm_up()
    worker.health()
    assert worker.memory_by_tag() == {"weights": 1, "pid": worker.pid}


@pytest.mark.parametrize("overlap", [False, True])
def test_step_gives_each_request_its_own_tokens(overlap):
    """Batching, chunking and overlap change nothing, wherever the worker runs."""
    with started(overlap_scheduling=overlap) as worker:
        core = core_on(worker, overlap_scheduling=overlap)
        for index, prompt in enumerate(PROMPTS):
            core.add(spec(str(index), prompt, max_tokens=20))
        updates = run_all(core)
        for index, prompt in enumerate(PROMPTS):
            assert tokens_of(updates[str(index)]) == expected_tokens(prompt, 20)
        assert core.statistics().memory_bytes["pid"] == worker.pid


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fault", [{"step": "oom", "at": "2"}, {"refuse": "2,3"}], ids=str)
def test_step_out_of_memory_is_tried_again_and_tokens_stay(overlap, fault):
    """Refused where it is submitted or where it runs, with a step behind it or none."""
    with started(overlap_scheduling=overlap, **fault) as worker:
        core = core_on(worker, overlap_scheduling=overlap)
        for index, prompt in enumerate(PROMPTS):
            core.add(spec(str(index), prompt, max_tokens=6))
        updates = run_all(core)
        for index, prompt in enumerate(PROMPTS):
            assert tokens_of(updates[str(index)]) == expected_tokens(prompt, 6)
        assert core.statistics().num_failed_steps >= 1


def test_submit_returns_at_once_and_results_keep_their_order():
    """Two steps are under way before anybody waits; asking for the later first changes nothing."""
    with started(overlap_scheduling=True) as worker:
        first, second = worker.submit(batch_of(0, is_new=True)), worker.submit(batch_of(1))
        tokens = expected_tokens([9], 2)
        assert second.result().sampled_token_ids == [tokens[1:]]
        assert first.result().sampled_token_ids == [tokens[:1]]
        assert first.result() is first.result()
        worker.health()


def test_step_behind_one_that_was_refused_does_not_happen():
    """The worker never sees what was built on a step that it refused; later ones it does."""
    with started(refuse="0", overlap_scheduling=True) as worker:
        first, second = worker.submit(batch_of(0, is_new=True)), worker.submit(batch_of(1))
        with pytest.raises(DeviceOutOfMemory, match="no room"):
            first.result()
        with pytest.raises(Exception, match="built on one that did not happen"):
            second.result()
        again = worker.execute(batch_of(2, "b", is_new=True))
        assert again.step_id == 2


def test_logits_processor_without_a_name_or_a_place_is_refused(worker):
    """A function that cannot be found over there, and a worker that takes none, are said in words."""
    with pytest.raises(RequestError, match="at the top of a module"):
        worker.register_logits_processor("f", lambda *row: row[-1])
    with pytest.raises(RequestError, match="takes no logits processors"):
        worker.register_logits_processor("f", os.getpid)


def test_signals_of_the_terminal_do_not_end_the_worker(worker):
    """Ctrl-C and SIGTERM reach the whole group; the front decides what becomes of its children."""
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    worker.health()


# --- a process that is gone -----------------------------------------------------------------------


def test_worker_that_dies_in_a_step_tells_how_and_its_last_lines():
    """Whoever asks, also later, is told the exit code; the end of stderr is in a note."""
    with started(step="exit", at=1) as worker:
        worker.execute(batch_of(0, is_new=True))
        for _ in range(2):
            with pytest.raises(DeviceLost, match="exited with code 7") as lost:
                worker.execute(batch_of(1))
            assert "the driver says: goodbye" in notes_of(lost.value)
        with pytest.raises(DeviceLost, match="exited with code 7"):
            worker.health()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_worker_that_is_killed_in_a_step_ends_the_core_with_the_signal(name):
    """The core is dead with the signal as its cause; a crash of native code shows every stack."""
    with started(step="hang", at=2) as worker:
        core = core_on(worker)
        core.add(spec("a", [5], max_tokens=50))
        core.step()
        core.step()
        killer = threading.Thread(target=os.kill, args=(worker.pid, signal.Signals[name]))
        killer.start()
        with pytest.raises(EngineDeadError, match=rf"DeviceLost: .*killed by {name}") as dead:
            core.step()
        killer.join()
        if name == "SIGSEGV":
            assert "Fatal Python error" in notes_of(dead.value.__cause__)
        with pytest.raises(EngineDeadError, match=name):
            core.health()


def test_worker_that_hangs_is_ended_with_the_place():
    """With a limit nobody waits for ever, also without a process of the engine core."""
    with started(step="hang", at=1, step_timeout_s=0.5) as worker:
        worker.execute(batch_of(0, is_new=True))
        with pytest.raises(DeviceLost, match="longer than step_timeout_s") as lost:
            worker.execute(batch_of(1))
        assert "engine_fakes.py" in notes_of(lost.value)


def test_worker_that_stands_still_as_a_whole_is_killed(monkeypatch):
    """One that cannot even look at its own clock is given up by its parent."""
    monkeypatch.setattr(worker_process, "_DEADLINE_GRACE_S", 0.0)
    with started(step_timeout_s=0.5) as worker:
        worker.execute(batch_of(0, is_new=True))
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(DeviceLost, match="did not answer within 1 s"):
            worker.execute(batch_of(1))


@pytest.mark.parametrize("way", ["segfault", "kill"])
def test_worker_that_dies_while_it_loads_ends_the_start(way, monkeypatch, capfd):
    """The signal and what it wrote last; what it wrote is also passed on as it came."""
    fault = "segfault" if way == "segfault" else "wait"
    with started(load=fault) as worker:
        if way == "kill":
            timer = threading.Thread(
                target=lambda: (
                    wait_until(lambda: "loading" in worker._stderr._tail.decode()),
                    os.kill(worker.pid, signal.SIGKILL),
                )
            )
            timer.start()
        with pytest.raises(DeviceLost, match="SIGABRT" if way == "segfault" else "SIGKILL") as lost:
            worker.load_model()
        assert "loading" in notes_of(lost.value)
    assert "loading" in capfd.readouterr().err


def test_start_and_load_that_fail_raise_what_the_worker_met():
    """Errors are as typed as in one process, with the place where they came from."""
    with pytest.raises(ConfigError, match="nothing fits"), started(start="config"):
        pass
    with started(load="unsupported") as worker:
        with pytest.raises(UnsupportedError) as refused:
            worker.load_model()
        assert [reason.code for reason in refused.value.reasons] == ["a.b", "c.d"]
    with started(load="bug") as worker:
        with pytest.raises(EngineDeadError) as dead:
            worker.load_model()
        assert dead.value.root_cause == "ZeroDivisionError: a bug of ours"
        assert "In the process of the worker" in notes_of(dead.value)


def test_worker_that_dies_idle_is_noticed_at_once_and_a_closed_one_is_no_loss():
    """Nobody asks an idle worker: its end is told. An end that was asked for is not."""
    lost, closed = threading.Event(), threading.Event()
    with started() as worker:
        worker.watch(lost.set)
        os.kill(worker.pid, signal.SIGKILL)
        assert lost.wait(30)
        late = threading.Event()
        worker.watch(late.set)
        assert late.is_set()
        with pytest.raises(DeviceLost, match="SIGKILL"):
            worker.health()
    with started() as worker:
        worker.watch(closed.set)
    assert not closed.is_set()
    with pytest.raises(DeviceLost, match="was closed"):
        worker.health()


def test_error_output_on_a_terminal_gives_the_child_one(monkeypatch):
    """A bar of progress that draws itself on terminals alone is still drawn."""
    master, slave = os.openpty()
    monkeypatch.setattr(error_output, "_STDERR", slave)
    output = ErrorOutput()
    code = "import sys; sys.stderr.write(f'terminal: {sys.stderr.isatty()}')"
    subprocess.run([sys.executable, "-c", code], stderr=output.writer.fileno(), check=True)
    output.writer.close()
    assert output.tail() == "terminal: True"
    assert os.read(master, 100) == b"terminal: True"
    os.close(master)
    os.close(slave)


PARENT = """
import os, signal, sys, threading
from engine_fakes import model_info
from test_worker_process import batch_of
from worker_fakes import start_fake_worker
from quire.core.config import EngineConfig
from quire.core.engine.facts import PlanFacts
from quire.core.executor.worker_process import WorkerProcess

def main(way):
    config = EngineConfig(model="fake-model", options={"fake.step": "hang", "fake.at": "0"})
    worker = WorkerProcess(start_fake_worker, config)
    worker.started(PlanFacts)
    print(worker.pid, flush=True)
    if way != "forget":
        worker.submit(batch_of(0, is_new=True))
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    if sys.argv[1] == "thread":
        thread = threading.Thread(target=main, args=("die",))
        thread.start()
        thread.join()
    else:
        main(sys.argv[1])
"""


@pytest.mark.parametrize("way", ["die", "thread", "forget"])
def test_parent_that_is_gone_takes_the_worker_along(tmp_path, way):
    """Killed in the middle of a step that hangs, or merely forgetful, a parent leaves no worker."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(Path(__file__).parent), str(root), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(script), way],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == (0 if way == "forget" else -signal.SIGKILL)
    wait_until(lambda: is_gone(int(done.stdout)))
