"""Recorded decode steps: a replay sees the new data, whatever moved since it was recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from worker_driver import Driver, make_worker  # noqa: E402

from quire.backends.reference import TorchDevice  # noqa: E402
from quire.backends.reference.attention import ReferenceAttention  # noqa: E402
from quire.core.errors import DeviceLost, DeviceOutOfMemory, UnsupportedError  # noqa: E402
from quire.core.interface import (  # noqa: E402
    Capabilities,
    CapturedStep,
    DeviceInfo,
    GraphCapture,
    MemoryInfo,
)


class DeviceLengthsAttention(ReferenceAttention):
    """Takes lengths from the device's tensors alone, as recorded work must."""

    def plan(self, batch):
        return super().plan(
            replace(
                batch,
                seq_lens_host=batch.seq_lens.tolist(),
                query_start_loc_host=batch.query_start_loc.tolist(),
            )
        )


class Again(CapturedStep):
    """Calls the recorded function again: right only if all it reads lies in static buffers."""

    def __init__(self, owner, step):
        self.owner, self.step = owner, step

    def replay(self):
        self.owner.num_replays += 1
        self.step()


class CallingGraphs(GraphCapture):
    """Records by remembering the function."""

    def __init__(self, refused=()):
        self.keys, self.num_replays, self.refused, self.is_released = [], 0, refused, False
        self.too_large, self.before = (), lambda: None

    def capture(self, key, step):
        self.before()
        self.keys.append(key)
        if key in self.refused:
            raise UnsupportedError([], what=key)
        if key in self.too_large:
            raise DeviceOutOfMemory(f"no memory for {key}", tag="graphs")
        step()
        step()
        return Again(self, step)

    def release(self):
        self.is_released = True


class GraphDevice(TorchDevice):
    """The reference, with recordings."""

    def __init__(self, graphs, **claims):
        super().__init__(
            info=DeviceInfo(index=0, name="records"),
            capabilities=Capabilities(
                step_mode="capture",
                attention_kinds=frozenset({"causal", "sliding_window"}),
                **claims,
            ),
        )
        self._graphs = graphs

    def _attention_class(self, spec):
        return DeviceLengthsAttention

    def graphs(self):
        return self._graphs


def record_all(worker) -> None:
    """What an engine does in idle moments, without an engine."""
    while worker.warm_up_more():
        pass


def start(tiny, prompts, graphs, **claims) -> Driver:
    device = GraphDevice(graphs, **claims)
    driver = Driver(make_worker(tiny("gemma3"), device=device), num_groups=2)
    for number, (name, prompt) in enumerate(prompts.items()):
        driver.add(name, prompt, max_tokens=10 - number % 2)
    return driver


@pytest.mark.parametrize("claims", [{}, {"request_buckets": (2, 8)}, {"copy_mode": "unified"}])
def test_replayed_decodes_give_the_tokens_of_transformers(claims, tiny, prompts, oracle):
    """Recorded before the first request came, with other lengths, blocks and numbers of requests."""
    graphs = CallingGraphs()
    driver = start(tiny, prompts, graphs, **claims)
    driver.worker.warm_up()
    assert graphs.keys == [], "requests would wait for recordings"
    record_all(driver.worker)
    assert not driver.worker.warm_up_more()
    sizes = claims.get("request_buckets", (1, 2, 4, 8))[::-1]
    assert graphs.keys == [f"decode of {size} requests" for size in sizes]
    after_warm_up = graphs.num_replays
    outputs = driver.run(64)
    expected = {name: tokens[: len(outputs[name])] for name, tokens in oracle("gemma3").items()}
    assert outputs == expected
    assert graphs.num_replays - after_warm_up >= 8
    assert len(graphs.keys) == len(sizes)
    driver.worker.close()
    assert graphs.is_released


@pytest.mark.parametrize("features", [frozenset(), frozenset({"state_slots"})])
@pytest.mark.parametrize(
    ("name", "num_groups"),
    [("mamba", 1), ("mamba2", 1), ("jamba", 2), ("falcon_h1", 2), ("qwen3_next", 2)],
)
def test_replayed_decodes_move_each_state_on_by_one_token(
    name, num_groups, features, prompts, tmp_path
):
    """A recording that is made between two steps runs the buffers of neither once more."""
    from tiny_architectures import make_tiny_architecture

    make_tiny_architecture(name).save_pretrained(tmp_path)
    eager = CallingGraphs(refused=[f"decode of {size} requests" for size in (2, 4, 8)])
    outputs = []
    for graphs in (eager, CallingGraphs()):
        device = GraphDevice(graphs, request_buckets=(2, 4, 8), features=features)
        driver = Driver(make_worker(tmp_path, device=device), num_groups=num_groups)
        for number, (request, prompt) in enumerate(prompts.items()):
            driver.add(request, prompt, max_tokens=22 - 3 * number)
        outputs.append(driver.run(64))
    assert len(graphs.keys) == 3
    assert graphs.num_replays > 15
    assert outputs[0] == outputs[1]


class FillingGraphs(CallingGraphs):
    """Copies bytes, as one launch for all arrays of a step would."""

    def __init__(self):
        super().__init__()
        self.num_pairs = []

    def fill(self, pairs):
        self.num_pairs.append(len(pairs))
        for source, target in pairs:
            assert source.dtype == target.dtype
            assert source.shape == target.shape
            assert source.stride(-1) == target.stride(-1) == 1
            target.numpy()[...] = source.numpy()


def test_device_that_copies_a_steps_arrays_at_once_is_asked_once_a_replay(tiny, prompts, oracle):
    """All that changes from step to step goes through it: tokens, lengths, tables and slots."""
    graphs = FillingGraphs()
    driver = start(tiny, prompts, graphs)
    driver.worker.warm_up()
    record_all(driver.worker)
    before = graphs.num_replays
    outputs = driver.run(64)
    expected = {name: tokens[: len(outputs[name])] for name, tokens in oracle("gemma3").items()}
    assert outputs == expected
    assert graphs.num_pairs == [8] * (graphs.num_replays - before)


def test_decode_that_cannot_be_recorded_runs_eagerly_and_says_so(tiny, prompts, oracle, caplog):
    """A slower path is chosen aloud."""
    graphs = CallingGraphs(refused=("decode of 8 requests",))
    driver = start(tiny, prompts, graphs)
    driver.worker.warm_up()
    record_all(driver.worker)
    assert "decodes of 8 requests run eagerly" in caplog.text
    outputs = driver.run(64)
    expected = {name: tokens[: len(outputs[name])] for name, tokens in oracle("gemma3").items()}
    assert outputs == expected


def test_steps_run_eagerly_while_recordings_are_made_between_them(tiny, prompts, oracle):
    """Served from the first moment; the size that ran eagerly most often comes first.

    What the last replay left in the buffers belongs to requests: no recording may write it again.
    """
    graphs = CallingGraphs()
    driver = start(tiny, prompts, graphs)
    worker = driver.worker
    worker.warm_up()
    execute, ours = worker.execute, worker._running()._graphs
    seen = []

    def look():
        seen.append((ours._static["slot_mapping.0"].unique().tolist(), graphs.num_replays))

    graphs.before = look
    num_steps = 0

    def execute_and_record(batch):
        nonlocal num_steps
        num_steps += 1
        if num_steps % 3 == 0:
            worker.warm_up_more()
        return execute(batch)

    worker.execute = execute_and_record
    outputs = driver.run(64)
    expected = {name: tokens[: len(outputs[name])] for name, tokens in oracle("gemma3").items()}
    assert outputs == expected
    assert num_steps >= 9
    assert [slots for slots, _ in seen] == [[0]] * len(seen)
    assert seen[-1][1] > 0, "no recording was made after a replay"
    assert graphs.keys[0] == "decode of 8 requests"


def test_size_that_runs_most_often_is_recorded_first(tiny, prompts, oracle):
    """One user alone waits for the recording of one request, not for three others."""
    graphs = CallingGraphs()
    driver = start(tiny, {"r17": prompts["r17"]}, graphs)
    driver.worker.warm_up()
    driver.run(64)
    driver.worker.warm_up_more()
    assert graphs.keys == ["decode of 1 requests"]


def test_memory_refused_to_a_recording_leaves_it_out_and_says_so_once(
    tiny, prompts, oracle, caplog
):
    """Serving goes on; smaller ones are still tried."""
    graphs = CallingGraphs()
    graphs.too_large = ("decode of 8 requests", "decode of 1 requests")
    driver = start(tiny, prompts, graphs)
    driver.worker.warm_up()
    record_all(driver.worker)
    assert graphs.keys == [f"decode of {size} requests" for size in (8, 4, 2, 1)]
    assert caplog.text.count("run eagerly") == 1
    assert "no memory for decode of 8 requests" in caplog.text
    outputs = driver.run(64)
    expected = {name: tokens[: len(outputs[name])] for name, tokens in oracle("gemma3").items()}
    assert outputs == expected
    assert graphs.num_replays > 0


def test_device_lost_in_a_recording_is_told_and_remembered(tiny, prompts):
    """It is no reason to go on eagerly."""
    graphs = CallingGraphs()
    driver = start(tiny, prompts, graphs)
    driver.worker.warm_up()

    def fail():
        raise DeviceLost("the device is gone")

    graphs.before = fail
    with pytest.raises(DeviceLost):
        driver.worker.warm_up_more()
    with pytest.raises(DeviceLost):
        driver.worker.health()


def test_memory_of_recordings_is_counted(tiny, prompts, monkeypatch):
    """Buffers from the start, and what each recording took of a device with memory of its own."""
    graphs = CallingGraphs()
    driver = start(tiny, prompts, graphs)
    worker = driver.worker
    worker.warm_up()
    before = worker.memory_by_tag()["graphs"]
    assert before > 0
    taken = 0

    def memory():
        return MemoryInfo(total_bytes=1 << 30, free_bytes=(1 << 30) - taken)

    def take():
        nonlocal taken
        taken += 1000

    monkeypatch.setattr(worker._device, "memory", memory)
    graphs.before = take
    record_all(worker)
    assert worker.memory_by_tag()["graphs"] - before == 4000
