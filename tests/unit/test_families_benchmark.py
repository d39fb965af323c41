"""The benchmark of the native families: a row for each, and active bytes as its page says."""

from __future__ import annotations

import pytest

from quire.benchmarks.families import FAMILIES, _state_bytes, _Weights, _write_config
from quire.core.models.families import known_architectures
from quire.core.models.families.registry import find_family
from quire.core.models.hybrid.families import FAMILIES as HYBRIDS
from quire.core.models.state_space.spec import ARCHITECTURES


def test_families_benchmark_every_native_architecture_has_a_row():
    """A family without a row would be slow unseen; one that sees decodes as its text model does."""
    families = (find_family({"model_type": model_type}) for model_type, _ in FAMILIES.values())
    measured = {family.architecture for family in families if family is not None}
    text = {name for name in known_architectures() if name.endswith("ForCausalLM")}
    assert text <= measured


def test_families_benchmark_every_architecture_with_states_has_a_row():
    """The same for mixers, alone and beside attention."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    measured = {
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] for model_type, _ in FAMILIES.values()
    }
    text = {name for name in (*HYBRIDS, *ARCHITECTURES) if name.endswith("ForCausalLM")}
    assert text <= measured


def test_active_bytes_of_mixtral_equal_those_counted_by_hand(tmp_path):
    """One token reads two experts of eight, the head, but no table of embeddings."""
    weights = _write_config("mixtral", tmp_path, "bfloat16")
    hidden, layers, vocabulary, intermediate = 2048, 6, 8192, 2816
    attention = hidden * (hidden + 2 * 512) + hidden * hidden
    other = layers * (attention + 8 * hidden + 2 * hidden) + hidden + vocabulary * hidden
    expert = 3 * hidden * intermediate * layers
    assert weights.moved_bytes(1) == pytest.approx(2 * (other + 2 * expert))
    assert weights.moved_bytes(2) == pytest.approx(2 * (other + 8 * expert * (1 - 0.75**2)))


def test_active_bytes_of_a_dense_model_do_not_grow_with_the_batch(tmp_path):
    """What every token shares is read once a step."""
    weights = _write_config("llama", tmp_path, "float32")
    assert weights.moved_bytes(1) == weights.moved_bytes(8)


def test_moved_bytes_of_mamba_count_the_states_of_each_request_twice():
    """A step reads states and writes them; weights are read once for all."""
    weights = _Weights(expert_bytes=0, other_bytes=100, chosen_share=1.0, state_bytes=7)
    assert [weights.moved_bytes(running) for running in (1, 8)] == [114, 212]


def test_state_bytes_of_mamba_equal_those_counted_by_hand(tmp_path):
    """Ten layers of 5632 channels: three inputs of the convolution, and sixteen float32 numbers."""
    _write_config("mamba", tmp_path, "bfloat16")
    assert _state_bytes(tmp_path) == 10 * 5632 * (3 * 2 + 16 * 4)
