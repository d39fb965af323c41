"""The comparison with other engines names who is missing, and writes what they read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quire.benchmarks import peers
from quire.benchmarks.gguf_model import write_gguf
from quire.benchmarks.peer_engines import PEERS
from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.shapes import make_model


def test_peer_that_is_not_installed_or_lacks_the_precision_says_so() -> None:
    """A silent gap in the table would read as a win."""
    absent = replace(PEERS[0], module="no_such_engine")
    assert absent.problem("bfloat16") == "no_such_engine is not installed"
    assert "has no int3" in absent.problem("int3")


def test_peer_that_fails_to_load_is_a_fact_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another project's error must neither end the run nor be forgotten."""

    def fail(directory: Path, precision: str) -> peers.Runner:
        raise RuntimeError("no such\nlayer")

    broken = replace(PEERS[0], start=fail)
    monkeypatch.setattr(peers, "PEERS", (broken,))
    record = Record(name="peers", settings={})
    assert peers._start_peers(tmp_path, "bfloat16", record) == {}
    assert record.facts == {broken.name: "did not load the model: no such layer"}


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
