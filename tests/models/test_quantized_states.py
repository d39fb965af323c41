"""Models with recurrent states, quantized at load: the large products of their mixers, and the rest."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import make_worker_config, run_greedy  # noqa: E402
from tiny_architectures import make_tiny_architecture  # noqa: E402

from quire.backends.cpu import CpuBackend  # noqa: E402
from quire.backends.reference import TorchDevice  # noqa: E402
from quire.core.errors import UnsupportedError  # noqa: E402
from quire.core.interface import Capabilities, DeviceInfo  # noqa: E402
from quire.core.models.registry import load_language_model  # noqa: E402

PROMPTS = [[7, 90, 11, 300, 45], list(range(20, 60))]
FAMILIES = ("mamba", "mamba2", "jamba", "falcon_h1", "bamba", "qwen3_next", "qwen3_5_text")


def reference():
    claims = Capabilities(
        attention_kinds=frozenset({"causal", "recurrent"}),
        features=frozenset({"moe", "quantized_experts", "recurrent", "state_slots"}),
        quantizations=frozenset({"int8", "int4"}),
    )
    return TorchDevice(info=DeviceInfo(index=0, name="host"), capabilities=claims)


@pytest.fixture
def cpu():
    device = CpuBackend().open(0)
    yield device
    device.close()


@pytest.fixture(params=FAMILIES)
def directory(request, tmp_path):
    make_tiny_architecture(request.param).save_pretrained(tmp_path)
    return tmp_path


def load(directory, device, scheme, **changes):
    return load_language_model(
        make_worker_config(directory, quantization=scheme, **changes), device
    )


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_states_give_the_same_tokens_on_every_device(directory, scheme, cpu):
    """In chunks and alone; smaller than the wide model, and near it in what is likely."""
    ours, plain = (load(directory, device, scheme) for device in (cpu, reference()))
    wide = load(directory, cpu, None)
    assert ours.weight_bytes < 0.8 * wide.weight_bytes
    (got, rows), (wanted, _), (_, exact) = (
        run_greedy(model, PROMPTS, 5, chunk=16) for model in (ours, plain, wide)
    )
    assert got == wanted
    for row, want in zip(rows, exact, strict=True):  # the first token's; later ones may differ
        likeness = torch.cosine_similarity(row[0].float(), want[0].float(), dim=0)
        assert likeness > (0.99 if scheme == "int8" else 0.5)


def test_group_size_that_does_not_divide_a_mixer_is_refused(cpu, tmp_path):
    """By the name of its product."""
    make_tiny_architecture("mamba2", hidden_size=48, head_dim=12).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"48 inputs of .*mixer\.in_proj"):
        load(tmp_path, cpu, "int4", options={"quantization.group_size": "32"})


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_quantized_mixers_in_half_precision_are_still_one_call(name, cpu, tmp_path):
    """The fused mixers multiply by codes too."""
    make_tiny_architecture(name).save_pretrained(tmp_path)
    model = load(tmp_path, cpu, "int8", dtype="bfloat16", cache_dtype="bfloat16")
    mixers = getattr(model, "_mixers", None) or [
        layer.mixer for layer in model._layers if getattr(layer, "mixer", None) is not None
    ]
    assert mixers
    assert all(mixer._fused is not None for mixer in mixers)
