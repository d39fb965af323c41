"""A model is described from its JSON files alone, and what cannot be described is refused in words."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from tiny_models import TINY_VARIANTS, make_tiny_model, make_torch_model

from quire.backends.reference import ReferenceAttention
from quire.core.errors import CheckpointError, UnsupportedError
from quire.core.models.description import describe_model, size_of_dtype
from quire.core.models.families import known_architectures, register_family
from quire.core.models.families.llama import describe as describe_llama


def edit_config(directory, **changes) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_parameters_are_counted_as_transformers_counts_them(variant, tmp_path):
    """Every tensor of every variant is known by shape before a file is opened."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    model = make_torch_model(variant)
    expected = sum(p.numel() for p in model.parameters())
    # What corrects a router is a buffer to transformers, and a weight to whoever loads it.
    buffers = dict(model.named_buffers())
    expected += sum(b.numel() for n, b in buffers.items() if n.endswith("correction_bias"))
    (directory / "model.safetensors").unlink()
    description = describe_model(directory)
    assert description.num_parameters == expected
    assert description.weight_bytes("bfloat16") == 2 * expected
    layers = sorted(i for group in description.attention_groups for i in group.layers)
    assert layers == list(range(description.num_layers))


def test_gemma3_has_a_group_of_sliding_layers_and_one_of_full_ones(tmp_path):
    """Each kind of layer gets a block table of its own."""
    directory = make_tiny_model("gemma3-5to1", tmp_path, with_tokenizer=False)
    sliding, full = describe_model(directory, block_size=32).attention_groups
    assert (sliding.name, sliding.layers) == ("sliding_32", (0, 1, 2, 3, 4))
    assert (full.name, full.layers) == ("full", (5,))
    assert (sliding.spec.kind, sliding.spec.window) == ("sliding_window", 32)
    assert (full.spec.kind, full.spec.window) == ("causal", None)
    assert full.spec.scale == pytest.approx(40**-0.5)
    assert (full.spec.head_size, full.spec.block_size) == (24, 32)


def test_dtypes_default_to_the_checkpoints_and_the_cache_to_the_models(tmp_path):
    """`auto` follows the files; what is given wins."""
    directory = make_tiny_model("llama", tmp_path, dtype="bfloat16", with_tokenizer=False)
    description = describe_model(directory)
    assert (
        description.checkpoint_dtype == description.dtype == description.cache_dtype == "bfloat16"
    )
    description = describe_model(directory, dtype="float32")
    assert (description.checkpoint_dtype, description.dtype) == ("bfloat16", "float32")
    assert description.attention_groups[0].spec.cache_dtype == "float32"
    assert describe_model(directory, cache_dtype="float16").cache_dtype == "float16"


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("llama", 512),
        ("llama-rope-linear", 512),
        ("llama-rope-dynamic", 2048),
        ("llama-rope-yarn", 512),
        ("phi3-longrope", 512),
    ],
)
def test_max_model_len_counts_what_rope_scaling_adds(variant, expected, tmp_path):
    """A user gets the length that the model was made for."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    assert describe_model(directory).max_model_len == expected


def test_ends_of_text_come_from_the_generation_config_first(tmp_path):
    """Chat models list the end of a turn there; the config has the end of a document alone."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert describe_model(directory).eos_token_ids == (7, 8)
    path.unlink()
    assert describe_model(directory).eos_token_ids == (1,)
    edit_config(directory, eos_token_id=None)
    assert describe_model(directory).eos_token_ids == (2,)  # the default of Llama's config


def test_soft_cap_is_listed_only_where_logits_have_one(tmp_path):
    """A device without the operator still runs the models that do not need it."""
    with_cap = make_tiny_model("gemma2", tmp_path, with_tokenizer=False)
    without = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    assert "soft_cap" in describe_model(with_cap).ops
    assert "soft_cap" not in describe_model(without).ops


def test_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    """The message says what there is."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    edit_config(directory, architectures=["NoSuchForCausalLM"])
    with pytest.raises(CheckpointError, match="NoSuchForCausalLM") as caught:
        describe_model(directory)
    for architecture in known_architectures():
        assert architecture in str(caught.value)


def test_config_without_architectures_is_known_by_its_model_type(tmp_path):
    """Configs saved on their own have none."""
    directory = make_tiny_model("qwen3", tmp_path, with_tokenizer=False)
    edit_config(directory, architectures=None)
    assert describe_model(directory).architecture == "Qwen3ForCausalLM"


def test_registered_family_is_described(tmp_path):
    """The table is open."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    edit_config(directory, architectures=["OutOfTreeForCausalLM"])
    register_family("OutOfTreeForCausalLM", describe=describe_llama)
    try:
        assert describe_model(directory).architecture == "OutOfTreeForCausalLM"
    finally:
        from quire.core.models.families.registry import _FAMILIES

        del _FAMILIES["OutOfTreeForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized by bitsandbytes"),
        ({"hidden_act": "relu2"}, "activation 'relu2'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
    ],
)
def test_feature_that_no_family_has_is_refused_with_a_reason(changes, message, tmp_path):
    """A model that would give other tokens does not load."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    edit_config(directory, **changes)
    with pytest.raises(UnsupportedError, match=message):
        describe_model(directory)


def test_bidirectional_gemma_is_refused(tmp_path):
    """An encoder must not be run as a decoder."""
    directory = make_tiny_model("gemma3", tmp_path, with_tokenizer=False)
    edit_config(directory, use_bidirectional_attention=True)
    with pytest.raises(UnsupportedError, match="bidirectional"):
        describe_model(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"architectures": ["LlamaForCausalLM"]}'])
def test_broken_config_is_named(content, tmp_path):
    """Any broken config.json is a CheckpointError that names the file."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe_model(tmp_path)


def test_directory_without_a_config_is_named(tmp_path):
    """The message says what a model's directory holds."""
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        describe_model(tmp_path)


def test_description_imports_no_torch():
    """`quire plan` and device-free tools import it in a moment."""
    code = "import sys, quire.core.models.description, quire.core.models.weights.source; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def describe_raw(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return describe_model(directory)


def test_config_of_llama_3_1_in_its_old_format_is_understood(tmp_path):
    """Files on the hub state RoPE as `rope_theta` and `rope_scaling`, and the dtype as `torch_dtype`."""
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": [128001, 128008, 128009],
    }
    description = describe_raw(tmp_path, config)
    assert description.num_parameters == 8_030_261_248
    assert (description.max_model_len, description.dtype) == (131072, "bfloat16")
    assert description.eos_token_ids == (128001, 128008, 128009)
    (rope,) = description.decoder.ropes
    assert (rope.rope_type, rope.parameters["rope_theta"]) == ("llama3", 500000.0)


def test_config_of_qwen2_that_does_not_slide_has_one_group(tmp_path):
    """`sliding_window` is set in these files although `use_sliding_window` is off."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 21,
    }
    description = describe_raw(tmp_path, config)
    assert description.num_parameters == 494_032_768
    assert [group.name for group in description.attention_groups] == ["full"]


def test_config_of_gemma3_in_its_old_format_is_understood(tmp_path):
    """The pattern of sliding layers was a number, and the local base a field of its own."""
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32768,
    }
    description = describe_raw(tmp_path, config)
    assert description.num_parameters == 268_098_176
    decoder = description.decoder
    assert [i for i, window in enumerate(decoder.layer_windows) if window is None] == [5, 11, 17]
    thetas = [decoder.ropes[i].parameters["rope_theta"] for i in decoder.layer_ropes[:6]]
    assert thetas == [1e4] * 5 + [1e6]


def test_config_of_phi3_with_code_of_its_own_runs_ours(tmp_path):
    """Files that point to remote code are read by their fields; the code is never run."""
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "sliding_window": 262144,
    }
    description = describe_raw(tmp_path, config)
    assert description.num_parameters == 3_821_079_552
    (rope,) = description.decoder.ropes
    assert rope.rope_type == "longrope"
    assert rope.parameters["original_max_position_embeddings"] == 4096


def test_latent_cache_holds_the_latent_and_nothing_else(tmp_path):
    """What it is for: a token costs rank + rotated numbers a layer, whatever the heads."""
    directory = make_tiny_model("deepseek-v3", tmp_path, with_tokenizer=False)
    (group,) = describe_model(directory, dtype="float32").attention_groups
    assert group.spec.kind == "mla"
    assert group.bytes_per_token(size_of_dtype) == 3 * (32 + 8) * 4
    layout = ReferenceAttention(group.spec).cache_layout()
    assert layout.bytes_per_block == group.spec.block_size * (32 + 8) * 4
