"""How steps of CUDA, ROCm and XPU go through a device, on a stand-in that writes down what it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerator_stand_in import StandIn
from test_engine_answers import SETTINGS, run, tokens_of
from tiny_models import make_tiny_model

from quire import LLM
from quire.core.errors import UnsupportedError

VENDORS = ("cuda", "rocm", "xpu")
PROGRAM = Path(__file__).parent / "parent_accelerator.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


def start(model: Path, name: str, **settings: object) -> LLM:
    return LLM(model=str(model), device=name, **{**SETTINGS, "max_num_seqs": 4, **settings})


@pytest.mark.parametrize("name", VENDORS)
def test_next_step_is_scheduled_and_queued_before_the_last_one_is_awaited(
    model: Path, name: str
) -> None:
    """The host works while the device does: an event is awaited when the next is recorded already."""
    with StandIn(name) as machine, start(model, name) as llm:
        machine.log.clear()
        run(llm)
        events = [line for line in machine.log if not line.startswith("copy")]
    waits = [i for i, line in enumerate(events) if line.startswith("wait")]
    ahead = [events[i].partition(" ")[2] for i in waits]
    overlapped = [
        number
        for i, number in zip(waits, ahead, strict=True)
        if f"record {int(number) + 1}" in events[:i]
    ]
    assert len(overlapped) >= len(waits) - 2, events  # but for the last ones
    assert len(waits) > 8


@pytest.mark.parametrize("name", VENDORS)
def test_copies_of_a_step_are_asynchronous_and_have_a_pinned_end(model: Path, name: str) -> None:
    """From pageable memory a driver copies twice, and the host waits for it."""
    with StandIn(name) as machine, start(model, name) as llm:
        machine.log.clear()
        run(llm)
        copies = [line for line in machine.log if line.startswith("copy")]
        num_steps = llm.statistics().num_steps
    assert set(copies) == {"copy, 1 end pinned"}
    assert len(copies) >= 2 * num_steps  # what goes up, and the tokens that come down


@pytest.mark.parametrize("name", VENDORS)
def test_requests_are_served_before_the_first_recording_is_made(model: Path, name: str) -> None:
    """A start does not wait for recordings; they come between steps, and then steps are replayed."""
    with StandIn(name) as machine, start(model, name) as llm:
        assert machine.num_graphs == 0
        prompts = [{"prompt_token_ids": [5, 6, 7]}]
        stream = llm.stream(prompts[0], {"max_tokens": 100, "ignore_eos": True})
        seen = [(machine.num_graphs, machine.num_replays) for _ in stream]
        assert seen[0][1] == 0, "the first token waited for a recording"
        assert seen[-1][0] > 0, "no recording was made between steps"
        llm.warm_up()
        before = machine.num_replays
        llm.generate(prompts, {"max_tokens": 10, "ignore_eos": True}, use_tqdm=False)
        assert machine.num_replays - before >= 9, "steps ran eagerly though recordings are there"


@pytest.mark.parametrize(
    "name", ["cuda", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rocm", "xpu"))]
)
def test_process_of_the_user_never_asks_for_the_device(model: Path, name: str) -> None:
    """A context in the parent would take memory, and break whoever forks it."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(model)],
        env={**os.environ, "STAND_IN": json.dumps([name, {}])},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"made": 4, "asked": 0}


@pytest.mark.parametrize("name", VENDORS)
def test_batch_invariance_is_refused_where_a_vendors_library_chooses_by_the_batch(
    model: Path, name: str
) -> None:
    """The claim is that a run can be repeated, and no more is promised than that."""
    with (
        StandIn(name),
        pytest.raises(UnsupportedError, match=r"config\.deterministic.*run_to_run"),
    ):
        start(model, name, deterministic=True)


@pytest.mark.parametrize("name", VENDORS)
def test_run_that_is_repeated_gives_the_same_tokens(model: Path, name: str) -> None:
    """The class that is claimed: with the same requests in the same order."""
    told = []
    for _ in range(2):
        with StandIn(name), start(model, name) as llm:
            told.append(tokens_of(run(llm)))
    assert told[0] == told[1]
