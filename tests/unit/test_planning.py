"""Planning refuses before weights load, with every reason at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.core.config import EngineConfig
from quire.core.discovery import ChosenDevice
from quire.core.errors import UnsupportedError
from quire.core.interface import Backend, Capabilities, Device, DeviceInfo, MemoryInfo, Probe
from quire.core.planning import Plan, make_plan

GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "sliding_window": 32,
}
INFO = DeviceInfo(index=0, name="board")


class Board(Device):
    """A device that torch does not own, with the claims and memory of the test."""

    def __init__(self, capabilities: Capabilities, free_bytes: int) -> None:
        self.info = INFO
        self.capabilities = capabilities
        self._free_bytes = free_bytes

    def memory(self) -> MemoryInfo:
        return MemoryInfo(total_bytes=self._free_bytes, free_bytes=self._free_bytes)

    def ops(self):
        raise AssertionError("planning needs no operators of a device that torch does not own")

    def attention(self, spec):
        raise AssertionError("nor its attention")


class BoardBackend(Backend):
    name = "board"
    interface_version = "1.1"

    def probe(self) -> Probe:
        return Probe(devices=(INFO,))

    def open(self, index: int) -> Device:
        raise NotImplementedError


CHOSEN = ChosenDevice(
    name="board", backend=BoardBackend(), index=0, info=INFO, why="asked for", considered=()
)
ABLE = Capabilities(
    attention_kinds=frozenset({"causal", "sliding_window"}),
    attention_features=frozenset({"soft_cap"}),
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Gemma 2, which needs sliding windows and a soft cap."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA2))
    return tmp_path


def plan(
    directory: Path,
    capabilities: Capabilities = ABLE,
    free_bytes: int = 1 << 30,
    **settings: Any,
) -> Plan:
    config = EngineConfig(model=str(directory), **settings)
    return make_plan(config, directory, CHOSEN, Board(capabilities, free_bytes))[0]


def cache_bytes(made: Plan) -> int:
    return next(row.size_bytes for row in made.memory if row.tag == "cache")


def test_plan_of_an_able_device_decides_everything(directory: Path) -> None:
    """Device, kernels, cache groups and memory by tag are known before a weight is read."""
    made = plan(directory)
    assert {row.kind for row in made.cache} == {"causal", "sliding_window"}
    assert {row.tag for row in made.memory} == {"weights", "activations", "cache"}
    assert made.kernels["linear"] == "worker"
    assert made.worker_config.dtype == "float32"
    assert made.changes


def test_plan_with_conservative_claims_lists_every_missing_one(directory: Path) -> None:
    """A user must not mend one refusal to meet the next."""
    with pytest.raises(UnsupportedError) as caught:
        plan(directory, Capabilities(head_sizes=(64,)), free_bytes=1000)
    codes = {reason.code for reason in caught.value.reasons}
    assert codes == {
        "attention.kind",
        "attention.feature",
        "attention.head_size",
        "memory.weights",
    }
    assert all(reason.remedy for reason in caught.value.reasons)


def test_plan_with_settings_beyond_the_claims_lists_them_all(directory: Path) -> None:
    """What the user asked for by name is refused by name, never replaced."""
    with pytest.raises(UnsupportedError) as caught:
        plan(directory, dtype="float8", cache_dtype="int3", block_size=7, quantization="int2")
    codes = [reason.code for reason in caught.value.reasons]
    assert codes == [
        "config.dtype",
        "config.cache_dtype",
        "config.block_size",
        "config.quantization",
    ]


def test_plan_deterministic_without_the_claim_is_refused(directory: Path) -> None:
    """A promise that the device does not make is not made in its name."""
    with pytest.raises(UnsupportedError) as caught:
        plan(directory, replace(ABLE, determinism="run_to_run"), deterministic=True)
    assert [reason.code for reason in caught.value.reasons] == ["config.deterministic"]
    able = replace(ABLE, determinism="invariant")
    assert plan(directory, able, deterministic=True).worker_config.deterministic


def test_plan_cache_shrinks_to_what_memory_allows(directory: Path) -> None:
    """The cache takes what is left, and never more than can be of use."""
    small = plan(directory, free_bytes=8 << 20, max_num_batched_tokens=64, max_num_seqs=4)
    large = plan(directory, free_bytes=8 << 30, max_num_batched_tokens=64, max_num_seqs=4)
    assert cache_bytes(small) <= cache_bytes(large) < 1 << 30


def test_plan_of_a_quantized_mixture_counts_experts_as_the_device_keeps_them(
    tmp_path: Path,
) -> None:
    """Nine tenths of a mixture are its experts: in codes, or wide where a device has no such codes."""
    settings = {
        **GEMMA2, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    able = replace(ABLE, features=frozenset({"moe"}), quantizations=frozenset({"int8"}))
    both = replace(able, features=frozenset({"moe", "quantized_experts"}))
    wide, codes = (
        next(
            row.size_bytes
            for row in plan(tmp_path, claims, quantization="int8").memory
            if row.tag == "weights"
        )
        for claims in (able, both)
    )
    assert wide - codes == 3 * (2 * 8 * 3 * 64 * 128)


@pytest.mark.parametrize(("claimed", "share"), [({"int4"}, 0.75), (set(), 1.0)])
def test_plan_of_codes_that_are_stored_counts_them_where_they_stay_codes(
    directory: Path, claimed: set[str], share: float
) -> None:
    """A checkpoint in 4 bits must not be refused for the memory of 16, nor promised where it is widened."""
    able = replace(ABLE, quantizations=frozenset(claimed))
    wide = weights_of(plan(directory, able))
    path = directory / "config.json"
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "quantization_config": stored}))
    assert weights_of(plan(directory, able)) <= share * wide
    assert claimed or weights_of(plan(directory, able)) == wide


def weights_of(planned: Plan) -> int:
    """Bytes of the row of weights."""
    return next(row.size_bytes for row in planned.memory if row.tag == "weights")
