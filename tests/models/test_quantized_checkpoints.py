"""Checkpoints of GPTQ, AWQ, compressed-tensors and FP8 mean what their layouts say, or are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from paged_runs import load_tiny, make_worker_config, run_greedy  # noqa: E402
from quantized_checkpoints import (  # noqa: E402
    GROUP,
    as_awq,
    as_float8,
    as_gptq,
    as_integers,
    as_packed,
    quantize_checkpoint,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from quire.backends.cpu import CpuBackend  # noqa: E402
from quire.backends.reference import ReferenceOps, TorchDevice  # noqa: E402
from quire.backends.reference.quantization import widen  # noqa: E402
from quire.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from quire.core.interface import Capabilities, DeviceInfo  # noqa: E402
from quire.core.models.description import describe_model  # noqa: E402
from quire.core.models.loading import load_model  # noqa: E402
from quire.core.models.weights.checkpoint_quantization import parse_checkpoint_quantization  # noqa: E402
from quire.core.models.weights.quantized_files import QuantizedFiles  # noqa: E402
from quire.core.models.weights.weight_layout import TensorShape, standard_name  # noqa: E402

PROMPT = list(range(10, 50))
NUM_TOKENS = 6


def compressed(layout, bits, strategy, **others):
    weights = {"num_bits": bits, "strategy": strategy, "symmetric": True, **others}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
PACKED = compressed("pack-quantized", 4, "group", group_size=GROUP)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FORMATS = {
    "gptq": (GPTQ, partial(as_gptq, bits=4, version=1)),
    "gptq-8-bits": ({**GPTQ, "bits": 8}, partial(as_gptq, bits=8, version=1)),
    "gptq-v2-asymmetric": (
        {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False},
        partial(as_gptq, bits=4, version=2),
    ),
    "gptq-by-activation": (
        {**GPTQ, "desc_act": True},
        partial(as_gptq, bits=4, version=1, order=True),
    ),
    "awq": (AWQ, as_awq),
    "packed": (PACKED, partial(as_packed, symmetric=True)),
    "packed-asymmetric": (
        compressed("pack-quantized", 4, "group", group_size=GROUP, symmetric=False),
        partial(as_packed, symmetric=False),
    ),
    "integers": (compressed("int-quantized", 8, "channel"), as_integers),
    "float8-rows": (
        compressed("float-quantized", 8, "channel", type="float"),
        partial(as_float8, block=None, suffix="weight_scale"),
    ),
    "float8-blocks": (
        {"quant_method": "fp8", "weight_block_size": [24, 24]},
        partial(as_float8, block=24, suffix="weight_scale_inv"),
    ),
}


def make(tmp_path, name, variant="llama"):
    """A quantized checkpoint, and a plain one of the numbers that it means."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    plain = tmp_path / "plain"
    shutil.copytree(directory, plain)
    settings, encode = FORMATS[name]
    quantize_checkpoint(directory, plain, settings, encode)
    return directory, plain


def expected_tokens(plain):
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    return ids[0, len(PROMPT) :].tolist()


def tokens_of(model):
    return run_greedy(model, [PROMPT], NUM_TOKENS, chunk=64)[0][0]


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_checkpoint_gives_the_tokens_of_what_it_means(name, tmp_path):
    """Every layout, widened by the reference and multiplied by codes on the CPU, beside transformers."""
    directory, plain = make(tmp_path, name)
    expected = expected_tokens(plain)
    assert tokens_of(load_tiny(directory)) == expected
    device = CpuBackend().open(0)
    try:
        assert tokens_of(load_model(make_worker_config(directory), device)) == expected
    finally:
        device.close()


@pytest.mark.parametrize("name", ["gptq", "float8-blocks"])
def test_quantized_experts_give_the_tokens_of_what_they_mean(name, tmp_path):
    """Experts are widened, or multiplied by codes; a router that is stored plainly stays plain."""
    directory, plain = make(tmp_path, name, "qwen3-moe")
    expected = expected_tokens(plain)
    assert tokens_of(load_tiny(directory)) == expected
    device = CpuBackend().open(0)
    try:
        assert tokens_of(load_model(make_worker_config(directory), device)) == expected
    finally:
        device.close()


@pytest.mark.parametrize("variant", ["llama", "qwen3-moe"])
def test_codes_stay_codes_where_the_device_multiplies_by_them(variant, tmp_path):
    """A model in 4 bits must not take the memory of 32, its experts neither."""
    directory, plain = make(tmp_path, "gptq", variant)
    device = CpuBackend().open(0)
    try:
        packed = load_model(make_worker_config(directory), device)
        wide = load_model(make_worker_config(plain), device)
        assert packed.weight_bytes < 0.65 * wide.weight_bytes
    finally:
        device.close()


def test_dynamic_activations_are_rounded_as_the_checkpoint_was_made_for(tmp_path):
    """W8A8: the contract's rounding by the token, exactly as the record says it."""
    directory, plain = make(tmp_path, "integers")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    path.write_text(json.dumps(config))
    stored = parse_checkpoint_quantization(config, directory)
    files = QuantizedFiles(directory, standard_name, stored)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = files.read_quantized(TensorShape(name=name, shape=(64, 112)), {"int8"})
    assert (weight.activations, weight.group_size, weight.bits) == ("token", 0, 8)
    meant = load_file(plain / "model.safetensors")[name]
    assert torch.equal(widen(weight), meant)


FLOAT8_DYNAMIC = compressed("float-quantized", 8, "channel", type="float")
FLOAT8_DYNAMIC["config_groups"]["group_0"]["input_activations"] = {
    "num_bits": 8, "type": "float", "dynamic": True, "strategy": "token",
}  # fmt: skip
FLOAT8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [24, 16]}
ROWS = partial(as_float8, block=None, suffix="weight_scale")


class Codes(TorchDevice):
    """The reference, claiming formats of weights; `packed` has the records that it was given."""

    def __init__(self, *formats):
        self.packed = []
        super().__init__(
            info=DeviceInfo(index=0, name="codes"),
            capabilities=Capabilities(quantizations=frozenset(formats)),
        )

    def _make_ops(self):
        packed = self.packed

        class RecordingOps(ReferenceOps):
            def pack_quantized_linear(self, weight, bias, dtype):
                packed.append(weight)
                return super().pack_quantized_linear(weight, bias, dtype)

        return RecordingOps()


@pytest.mark.parametrize(
    ("settings", "encode", "activations", "group_size"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, ROWS, "none", 0),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ROWS, "token", 0),
        (FLOAT8_DYNAMIC, ROWS, "token", 0),
        (
            FLOAT8_BLOCKS,
            partial(as_float8, block=(24, 16), suffix="weight_scale_inv"),
            "group",
            16,
        ),
    ],
)
def test_float8_codes_stay_codes_where_the_device_claims_them(
    settings, encode, activations, group_size, tmp_path
):
    """By the record, not by a name: weights as stored, activations as the checkpoint was made for."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    plain = tmp_path / "plain"
    shutil.copytree(directory, plain)
    quantize_checkpoint(directory, plain, settings, encode)
    config = json.loads((directory / "config.json").read_text())
    files = QuantizedFiles(
        directory, standard_name, parse_checkpoint_quantization(config, directory)
    )
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = TensorShape(name=name, shape=(64, 112))
    weight = files.read_quantized(tensor, {"int8", "fp8"})
    assert (weight.format_name, weight.activations, weight.group_size) == (
        "fp8", activations, group_size,
    )  # fmt: skip
    assert torch.equal(widen(weight), load_file(plain / "model.safetensors")[name])
    assert files.read_quantized(tensor, {"int8", "int4"}) is None
    device, other = Codes("fp8"), Codes("int8", "int4")
    by_codes = load_model(make_worker_config(directory), device)
    assert {w.encoding for w in device.packed} == {"float8_e4m3fn"}
    assert {w.activations for w in device.packed} == {activations}
    if activations == "none":
        assert tokens_of(by_codes) == expected_tokens(plain)
    assert tokens_of(load_model(make_worker_config(directory), other)) == expected_tokens(plain)
    assert not other.packed


def test_float8_codes_without_a_number_or_with_a_short_group_are_widened(tmp_path):
    """What the record cannot say is not said: NaN shows in the numbers, a short group keeps its scale."""
    directory, _ = make(tmp_path, "float8-blocks")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.gate_proj.weight"
    config = json.loads((directory / "config.json").read_text())
    stored = parse_checkpoint_quantization(config, directory)
    shape = TensorShape(name=name, shape=tuple(tensors[name].shape))
    # 64 inputs are no multiple of 24.
    assert QuantizedFiles(directory, standard_name, stored).read_quantized(shape, {"fp8"}) is None
    tensors[name].view(torch.uint8)[0, 0] = 0xFF
    save_file(tensors, path, metadata={"format": "pt"})
    rows = replace(stored, block=(24, 16))
    assert QuantizedFiles(directory, standard_name, rows).read_quantized(shape, {"fp8"}) is None
    assert QuantizedFiles(directory, standard_name, stored).read(shape).isnan().sum() == 1


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes"]),
        ({**GPTQ, "bits": 3, "checkpoint_format": "marlin"}, ["bits 3", "marlin"]),
        ({**AWQ, "bits": 8, "version": "gemv", "zero_point": False}, ["bits 8", "gemv", "zero"]),
        (compressed("marlin-24", 4, "group"), ["marlin-24"]),
        (compressed("pack-quantized", 3, "tensor"), ["num_bits 3", "strategy tensor"]),
        ({**PACKED, "kv_cache_scheme": {"num_bits": 8}}, ["cache"]),
    ],
)
def test_quantization_that_cannot_be_read_is_refused_with_all_reasons(settings, needs, tmp_path):
    """Planning says what is wrong before any weight is read."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(UnsupportedError) as caught:
        describe_model(directory)
    assert len(caught.value.reasons) == len(needs)
    for reason, need in zip(caught.value.reasons, needs, strict=True):
        assert need in reason.need


def test_part_of_a_quantized_layer_that_is_missing_is_named(tmp_path):
    """Codes without their scales, and scales of another shape."""
    directory, _ = make(tmp_path, "gptq")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    tensors["model.layers.1.mlp.up_proj.scales"] = torch.zeros(3, 3)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load_tiny(directory)
    assert "model.layers.0.mlp.up_proj.scales" in str(caught.value)
    assert "up_proj.scales is [3, 3], not [4, 112]" in str(caught.value)


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path):
    """A config of another model."""
    directory, _ = make(tmp_path, "awq")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["group_size"] = 48
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="groups of 48 do not"):
        load_tiny(directory)
