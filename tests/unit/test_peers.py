"""The comparison with other engines names who is missing, and writes what they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from quire.benchmarks import peers
from quire.benchmarks.gguf_model import write_gguf
from quire.benchmarks.peer_engines import PEERS, QUIRE, Outcome
from quire.benchmarks.peer_process import PeerError
from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.shapes import make_model
from quire.benchmarks.versus_transformers import LOADS
from quire.benchmarks.workloads import Work


def test_peer_that_is_not_installed_or_lacks_the_precision_says_so() -> None:
    """A silent gap in the table would read as a win."""
    absent = replace(PEERS[0], module="no_such_engine")
    assert absent.problem("bfloat16") == "no_such_engine is not installed"
    assert "has no int3" in absent.problem("int3")


def test_peer_that_fails_to_load_is_a_fact_with_its_reason(tmp_path: Path) -> None:
    """Another project's error must neither end the run nor be forgotten."""
    record = Record(name="peers", settings={"precision": "bfloat16", "threads": 1})
    assert peers._start([PEERS[0]], tmp_path / "nothing", record) == {}
    assert record.facts[PEERS[0].name].startswith("did not run the model: ")
    assert "nothing" in record.facts[PEERS[0].name]


def test_peer_whose_process_dies_is_dropped_and_the_others_go_on() -> None:
    """A crash in C++ takes no more with it than its own rows."""
    alive, dead = QUIRE, PEERS[0]
    record = Record(
        name="peers", settings={"rounds": 2, "sample": 1, "shape": "qwen2-tiny", "threads": 1}
    )
    processes = {alive: _Stub(fails_at=99), dead: _Stub(fails_at=1)}
    peers._measure(LOADS[0], processes, record)  # type: ignore[arg-type]
    assert list(processes) == [alive]
    assert [row.subject for row in record.measurements] == ["quire"]
    assert record.facts == {dead.name: "failed at one stream: ended with status -11"}


class _Stub:
    """A process that ends at its n-th load."""

    def __init__(self, *, fails_at: int) -> None:
        self._left = fails_at

    def run(self, works: Sequence[Work]) -> Outcome:
        if self._left == 0:
            raise PeerError("ended with status -11")
        self._left -= 1
        return Outcome(1.0, [1, 2])

    def close(self) -> None:
        """Nothing to end."""


def test_plot_shows_every_subject(tmp_path: Path) -> None:
    """Bars are the medians of the record."""
    rows = [
        Measurement(work="one stream", subject=name, unit="tokens/s", values=(rate,))
        for name, rate in (("quire", 20.0), ("other", 10.0))
    ]
    record = Record(name="peers", settings={}, measurements=rows)
    drawn = peers._draw(record, tmp_path / "plot.svg").read_text()
    assert 'width="370"' in drawn
    assert 'width="185"' in drawn


def test_gguf_keeps_every_tensor_of_the_checkpoint(tmp_path: Path) -> None:
    """A peer that misses a tensor would be measured on another model."""
    gguf = pytest.importorskip("gguf")
    directory = make_model("qwen2-tiny", tmp_path, dtype="bfloat16")
    tensors = gguf.GGUFReader(str(write_gguf(directory, "float16"))).tensors
    names = {tensor.name for tensor in tensors}
    assert len(names) == 2 + 2 * 12
    assert {"token_embd.weight", "blk.1.attn_q.bias", "blk.0.ffn_down.weight"} <= names
