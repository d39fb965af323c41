"""Experts are quantized at load like all other layers, where a device multiplies by such codes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import make_worker_config, run_greedy  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from quire.backends.cpu import CpuBackend  # noqa: E402
from quire.backends.reference import TorchDevice  # noqa: E402
from quire.core.errors import UnsupportedError  # noqa: E402
from quire.core.interface import Capabilities, DeviceInfo  # noqa: E402
from quire.core.models.loading import load_model  # noqa: E402

PROMPTS = [[7, 90, 11, 300, 45], list(range(20, 60))]


def reference(*features):
    """The reference's arithmetic, with these claims."""
    claims = Capabilities(
        attention_kinds=frozenset({"causal", "chunked", "mla", "sliding_window"}),
        attention_features=frozenset({"sinks"}),
        features=frozenset({"moe", *features}),
        quantizations=frozenset({"int8", "int4"}),
    )
    return TorchDevice(info=DeviceInfo(index=0, name="host"), capabilities=claims)


@pytest.fixture
def cpu():
    device = CpuBackend().open(0)
    yield device
    device.close()


def load(directory, device, scheme):
    return load_model(make_worker_config(directory, quantization=scheme), device)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["qwen3-moe", "gpt-oss", "llama4", "deepseek-v3"])
def test_quantized_experts_give_the_same_tokens_on_every_device(variant, scheme, cpu, tmp_path):
    """Merged, transposed and interleaved ones, with biases, shared ones and weighed inputs."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    ours, plain = (load(directory, d, scheme) for d in (cpu, reference("quantized_experts")))
    wide = load(directory, cpu, None)
    assert ours.weight_bytes < (0.45 if scheme == "int8" else 0.36) * wide.weight_bytes
    got, wanted = (run_greedy(model, PROMPTS, 5, chunk=16)[0] for model in (ours, plain))
    assert got == wanted


def test_experts_that_a_device_takes_wide_alone_stay_so_and_it_is_said(tmp_path, caplog):
    """A model that is larger than was asked for must not come unannounced."""
    directory = make_tiny_model("qwen3-moe", tmp_path, with_tokenizer=False)
    wide = load(directory, reference(), "int8")
    assert "experts stay in float32" in caplog.text
    assert wide.weight_bytes > load(directory, reference(), None).weight_bytes / 2


def test_group_size_that_does_not_divide_the_experts_is_refused(cpu, tmp_path):
    """All layers in one message, experts too."""
    changes = {"moe_intermediate_size": 48}
    directory = make_tiny_model("qwen3-moe", tmp_path, with_tokenizer=False, **changes)
    config = make_worker_config(
        directory, quantization="int4", options={"quantization.group_size": "32"}
    )
    with pytest.raises(UnsupportedError, match=r"48 inputs of .*experts.*down_proj"):
        load_model(config, cpu)
