"""Traces: recorded on one device, replayed on another, and the first operator that differs named."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("transformers")

from saboteurs import (
    DropsLastToken,
    LeavesResidual,
    PositionOffByOne,
    SwapsHalves,
    WrongGroups,
    WrongScale,
    make_device,
)

from quire.backends.reference import ReferenceOps, TorchDevice
from quire.backends.sim.device import SimDevice
from quire.conformance.oracles.model import TinyLlama
from quire.conformance.stepping import Steps
from quire.conformance.tracing.layers import layer_names
from quire.conformance.tracing.recording import recorded_device
from quire.conformance.tracing.replaying import replay
from quire.conformance.tracing.traces import MAGIC, TraceWriter, read_trace
from quire.core.errors import ConfigError, UnsupportedError
from quire.core.interface import CachePlan, WorkerConfig
from quire.core.serving.cli.application import application


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TinyLlama().save(tmp_path_factory.mktemp("model"))


def make_trace(model, path, *, detail="tensors", device=None, dtype="float32"):
    """Three requests on the reference, prompts cut into chunks."""
    config = WorkerConfig(
        model=str(model),
        dtype=dtype,
        cache_dtype=dtype,
        block_size=16,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        device_memory_fraction=0.5,
        cache_memory_bytes=1 << 24,
    )
    with TraceWriter(path) as writer:
        recorded, _ = recorded_device(
            device or make_device(), writer, backend="reference", detail=detail
        )
        worker = recorded.make_worker(config)
        worker.load_model()
        worker.allocate_cache(CachePlan(num_blocks=[32]))
        worker.warm_up()
        rng = np.random.default_rng(3)
        steps = Steps(
            worker,
            block_size=16,
            num_blocks=32,
            num_groups=1,
            max_tokens=32,
            max_requests=4,
            rng=rng,
        )
        for name, length in {"a": 37, "b": 5, "c": 18}.items():
            steps.add(name, [int(t) for t in rng.integers(4, 250, length)], 4)
        steps.run(20)
        worker.close()
    return path


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return make_trace(model, tmp_path_factory.mktemp("trace") / "reference.trace")


@pytest.fixture(scope="module")
def trace(path):
    return read_trace(path)


def test_replay_same_device_differs_nowhere(trace):
    """A device agrees with itself, operator by operator."""
    found = replay(trace, make_device())
    assert found.is_same
    assert not found.result_difference
    assert {s.headroom for s in found.operators.values()} == {0.0}
    assert found.operators["paged_attention"].num_calls == 2 * found.num_steps


def test_replay_asynchronous_device_is_heard_in_its_own_order(trace):
    """Work that is deferred is compared when it happens."""
    found = replay(trace, SimDevice())
    assert (found.is_same, found.why_no_operators) == (True, "")
    assert found.operators["linear"].num_calls > found.num_steps


@pytest.mark.parametrize(
    ("parts", "op", "layer"),
    [
        ({"ops": PositionOffByOne}, "rotary", "0"),
        ({"ops": SwapsHalves}, "gated_activation", "0"),
        ({"ops": LeavesResidual}, "add_rms_norm", "0"),
        ({"attention": WrongScale}, "paged_attention", "0"),
        ({"attention": WrongGroups}, "paged_attention", "0"),
        ({"attention": DropsLastToken}, "paged_attention", "0"),
    ],
    ids=lambda value: "" if not isinstance(value, dict) else next(iter(value.values())).__name__,
)
def test_replay_broken_device_names_the_operator_that_differs(trace, parts, op, layer):
    """The first operator that computes something else is named, not the last that shows it."""
    found = replay(trace, make_device(**parts))
    difference = found.operator_difference
    assert not found.is_same
    assert (difference.op, difference.layer) == (op, layer)
    assert difference.headroom > 1
    assert "row" in difference.where


class BreaksInLayerOne(ReferenceOps):
    """Right in the first layer, wrong in the second."""

    count = 0

    def gated_activation(self, x, kind):
        self.count += 1
        result = super().gated_activation(x, kind)
        return result if self.count % 2 else result * 1.01


def test_replay_fault_of_one_layer_names_that_layer(trace):
    """What an earlier operator did cannot be taken for a later one's fault, nor the reverse."""
    difference = replay(trace, make_device(ops=BreaksInLayerOne)).operator_difference
    assert (difference.op, difference.layer) == ("gated_activation", "1")


def test_replay_device_with_its_own_worker_compares_results_and_says_so(trace):
    """Where nobody hears operators, the results of steps still tell."""

    class Alone(TorchDevice):
        torch_device = None

        def make_worker(self, config):
            from quire.core.worker.worker import DefaultWorker

            return DefaultWorker(make_device(ops=self.ops_class), config)

        ops_class = ReferenceOps

    same = make_device(base=Alone)
    same.torch_device = None
    found = replay(trace, same)
    assert found.is_same
    assert "runtime of its own" in found.why_no_operators
    broken = make_device(base=Alone)
    broken.torch_device, broken.ops_class = None, PositionOffByOne
    found = replay(trace, broken)
    assert not found.is_same
    assert found.result_difference.startswith("step ")


def test_replay_digests_name_the_first_operator_with_other_bits(model, tmp_path):
    """A trace without data still finds where bits differ."""
    trace = read_trace(make_trace(model, tmp_path / "d.trace", detail="digests"))
    assert replay(trace, make_device()).is_same
    difference = replay(trace, make_device(ops=SwapsHalves)).operator_difference
    assert (difference.op, difference.layer) == ("gated_activation", "0")


def test_replay_trace_without_operators_says_so(model, tmp_path):
    """Results alone are compared."""
    trace = read_trace(make_trace(model, tmp_path / "n.trace", detail="none"))
    found = replay(trace, make_device())
    assert (found.is_same, "without them" in found.why_no_operators) == (True, True)


def test_layer_names_follow_the_attentions():
    """The look-up before the first layer, the head after the last."""
    layer = ["rms_norm", "linear", "rotary", "paged_attention", "linear", "rms_norm", "linear"]
    ops = ["embedding", *layer, *layer, "rms_norm", "linear", "sample"]
    expected = ["embedding", *["0"] * 7, *["1"] * 7, "head", "head", "head"]
    assert layer_names(ops) == expected
    assert layer_names(["sample"]) == ["head"]


# --- bad input ------------------------------------------------------------------------------------


def frames_of(content):
    position, frames = len(MAGIC), []
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        frames.append(content[position + 8 : position + 8 + length])
        position += 8 + length
    return frames


def written(tmp_path, content):
    path = tmp_path / "bad.trace"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_read_trace_cut_file_says_after_which_step(path, tmp_path, share):
    """A copy that broke off is no shorter trace."""
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="is cut: it ends after"):
        read_trace(written(tmp_path, content[: int(len(content) * share)]))


def test_read_trace_without_its_footer_is_cut(path, tmp_path):
    """A recording that was interrupted says so."""
    content = path.read_bytes()
    footer = frames_of(content)[-1]
    with pytest.raises(ConfigError, match="is cut"):
        read_trace(written(tmp_path, content[: -8 - len(footer)]))


def test_read_trace_edited_file_is_refused(path, tmp_path):
    """One token changed by hand is found."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with pytest.raises(ConfigError, match=r"was changed after it was recorded|is damaged|is cut"):
        read_trace(written(tmp_path, bytes(content)))


def test_read_trace_other_version_says_which_it_reads(path, tmp_path):
    """A trace of another time is refused, not misread."""
    frames = frames_of(path.read_bytes())
    header = msgspec.msgpack.encode({**msgspec.msgpack.decode(frames[0]), "format_version": 7})
    content = MAGIC + len(header).to_bytes(8, "little") + header
    with pytest.raises(ConfigError, match="format 7; this quire reads format 1"):
        read_trace(written(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"{}", b"quire-trace"])
def test_read_trace_something_else_is_no_trace(tmp_path, content):
    """Any other file is told from a trace."""
    with pytest.raises(ConfigError, match="is no trace"):
        read_trace(written(tmp_path, content))


def test_replay_model_gone_or_another_is_refused(trace, model, tmp_path):
    """A replay on other weights would blame the device."""
    header = msgspec.structs.replace(
        trace.header,
        worker_config=msgspec.structs.replace(trace.header.worker_config, model="/gone"),
    )
    moved = msgspec.structs.replace(trace, header=header)
    with pytest.raises(ConfigError, match="--model DIRECTORY"):
        replay(moved, make_device())
    assert replay(moved, make_device(), model=model).is_same
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="another model than was recorded"):
        replay(trace, make_device(), model=tmp_path)


def test_replay_device_without_the_dtype_is_refused_with_reasons(trace):
    """What the device does not claim is not tried."""
    with pytest.raises(UnsupportedError, match=r"trace\.block_size"):
        replay(trace, make_device(block_sizes=(32,)))


def test_replay_command_same_and_bad_files_end_with_their_status(path, tmp_path):
    """Scripts see it by the exit status, people by the words."""
    run = CliRunner().invoke
    good = run(application, ["trace", "replay", str(path), "--backend", "sim"])
    assert (good.exit_code, "every step gave the recorded tokens" in good.output) == (0, True)
    bad = run(application, ["trace", "replay", str(written(tmp_path, b"x")), "--backend", "sim"])
    assert bad.exit_code == 2
    gone = run(application, ["trace", "replay", str(tmp_path / "no"), "--backend", "sim"])
    assert gone.exit_code == 2
    unknown = run(application, ["trace", "replay", str(path), "--backend", "nonesuch"])
    assert unknown.exit_code == 2


def test_record_command_writes_what_replay_reads(model, tmp_path):
    """From a prompt to a trace, on the device that serves."""
    path = tmp_path / "cpu.trace"
    recorded = CliRunner().invoke(
        application,
        [
            *("trace", "record", "-o", str(path), "--device", "cpu", "--dtype", "float32"),
            *("--max-tokens", "2", "def f"),
        ],
    )
    assert recorded.exit_code == 0, recorded.output
    trace = read_trace(path)
    assert trace.header.backend == "cpu"
    assert len(trace.steps) >= 2
    assert trace.steps[0].calls
    refused = CliRunner().invoke(
        application, ["trace", "record", "-o", str(path), "--operators", "all", "x"]
    )
    assert refused.exit_code == 2
