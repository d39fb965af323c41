"""Recorded decode steps: a replay sees the new data, whatever moved since it was recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from worker_driver import Driver, make_worker  # noqa: E402

from quire.backends.reference import TorchDevice  # noqa: E402
from quire.backends.reference.attention import ReferenceAttention  # noqa: E402
from quire.core.errors import UnsupportedError  # noqa: E402
from quire.core.interface import Capabilities, CapturedStep, DeviceInfo, GraphCapture  # noqa: E402


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

    def capture(self, key, step):
        self.keys.append(key)
        if key in self.refused:
            raise UnsupportedError([], what=key)
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
    sizes = claims.get("request_buckets", (1, 2, 4, 8))
    assert graphs.keys == [f"decode of {size} requests" for size in sizes]
    after_warm_up = graphs.num_replays
    outputs = driver.run(64)
    expected = {name: tokens[: len(outputs[name])] for name, tokens in oracle("gemma3").items()}
    assert outputs == expected
    assert graphs.num_replays - after_warm_up >= 8
    assert len(graphs.keys) == len(sizes)
    driver.worker.close()
    assert graphs.is_released


def test_decode_that_cannot_be_recorded_runs_eagerly_and_says_so(tiny, prompts, oracle, caplog):
    """A slower path is chosen aloud."""
    graphs = CallingGraphs(refused=("decode of 8 requests",))
    driver = start(tiny, prompts, graphs)
    driver.worker.warm_up()
    assert "decodes of 8 requests run eagerly" in caplog.text
    outputs = driver.run(64)
    expected = {name: tokens[: len(outputs[name])] for name, tokens in oracle("gemma3").items()}
    assert outputs == expected
