"""A GGUF file gives the tokens of the checkpoint that it was made from, or is refused with the reason."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from paged_runs import load_tiny, make_worker_config, run_greedy  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from quire.backends.cpu import CpuBackend  # noqa: E402
from quire.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from quire.core.models.loading import load_model  # noqa: E402
from quire.core.models.weights.source import resolve_model_directory  # noqa: E402

PROMPT = list(range(10, 50))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What is made of a file goes where the test ends with it."""
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))


ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
"""What GGUF calls a model type, where it is another name."""
OWN_KEYS = {
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def write(directory, kind="F32", *, arch=None, extra=None):
    """The checkpoint as GGUF, through the package's own writer and names."""
    config = transformers.AutoConfig.from_pretrained(directory)
    arch = arch or ARCHITECTURES.get(config.model_type, config.model_type)
    path = directory.parent / f"{directory.name}-{kind}.gguf"
    writer = gguf.GGUFWriter(str(path), arch)
    add_sizes(writer, config)
    add_own(writer, arch, config)
    add_tokenizer(writer, directory, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, tensor in stacked(load_file(directory / "model.safetensors")).items():
        numbers = turned(name, tensor.float(), config) if arch == "llama" else tensor.float()
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            numbers = numbers + 1
        if name.endswith("shared_expert_gate.weight"):
            numbers = numbers[0]
        add_tensor(writer, names.get_name(name, (".weight", ".bias")), numbers, quantization)
    for name, numbers in (extra or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sizes(writer, config):
    """What every architecture has."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_own(writer, arch, config):
    """What the architecture has of its own."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if arch == "phi3":
        head_size = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1) * head_size))
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for kind in ("long", "short"):
            factors = np.array(rope[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    for ours, theirs in OWN_KEYS.items():
        value = getattr(config, ours, None)
        if value:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{arch}.{theirs}", value)


def stacked(tensors):
    """Experts of a layer in one tensor, as GGUF has them; all else as it is."""
    experts, others = {}, {}
    for name, tensor in tensors.items():
        before, mark, after = name.partition(".experts.")
        if mark:
            index, _, part = after.partition(".")
            experts.setdefault(f"{before}.experts.{part}", {})[int(index)] = tensor
        else:
            others[name] = tensor
    return others | {
        name: torch.stack([found[index] for index in range(len(found))])
        for name, found in experts.items()
    }


def add_tensor(writer, name, tensor, quantization):
    numbers = tensor.numpy()
    if numbers.ndim == 1:
        writer.add_tensor(name, numbers)
    else:
        coded = gguf.quants.quantize(numbers, quantization)
        writer.add_tensor(name, coded, raw_dtype=quantization)


def turned(name, tensor, config):
    """A Llama's queries and keys, with the two halves of each head in turn."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if part in name), None)
    if count is None:
        return tensor
    size = len(tensor) // count
    order = [
        h * size + i + half
        for h in range(count)
        for i in range(size // 2)
        for half in (0, size // 2)
    ]
    return tensor[order].contiguous()


def add_tokenizer(writer, directory, config):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def mean_quantized(directory, quantization):
    """Has the checkpoint's matrices hold what the codes mean."""
    meant = load_file(directory / "model.safetensors")
    for name, tensor in meant.items():
        if tensor.dim() == 2:
            coded = gguf.quants.quantize(tensor.numpy(), quantization)
            meant[name] = torch.from_numpy(np.array(gguf.dequantize(coded, quantization)))
    save_file(meant, directory / "model.safetensors", metadata={"format": "pt"})


def tokens_of(model):
    return run_greedy(model, [PROMPT], 6, chunk=64)[0][0]


VARIANTS = {
    "llama": {}, "llama-tied": {}, "llama-headdim32": {}, "qwen2": {}, "qwen3": {},
    "mixtral": {}, "qwen2-moe": {"mlp_only_layers": []}, "qwen3-moe": {},
    "gemma2": {"query_pre_attn_scalar": 24}, "gemma3-5to1": {"query_pre_attn_scalar": 24},
    "phi3": {}, "phi3-swa": {}, "phi3-partial": {}, "phi3-longrope": {},
}  # fmt: skip
"""What a GGUF file does not say is as its readers take it."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_gguf_in_float32_gives_the_tokens_of_its_checkpoint(variant, tmp_path):
    """Names, shapes, the order of heads, experts and the config all come out of one file."""
    directory = make_tiny_model(variant, tmp_path, **VARIANTS[variant])
    made = resolve_model_directory(str(write(directory)))
    assert tokens_of(load_tiny(made)) == tokens_of(load_tiny(directory))


def test_gguf_of_quantized_experts_gives_the_tokens_of_what_it_means(tmp_path):
    """Each expert is widened from its part of the stacked tensor."""
    directory = make_tiny_model("qwen3-moe", tmp_path, moe_intermediate_size=64)
    made = resolve_model_directory(str(write(directory, "Q8_0")))
    mean_quantized(directory, gguf.GGMLQuantizationType.Q8_0)
    assert tokens_of(load_tiny(made)) == tokens_of(load_tiny(directory))


# Blocks are of 32 inputs.
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_gguf_of_narrow_types_gives_the_tokens_of_what_it_means(kind, tmp_path):
    """Widened by the reference, multiplied by codes on the CPU, beside the numbers as safetensors."""
    directory = make_tiny_model("llama", tmp_path, intermediate_size=128)
    made = resolve_model_directory(str(write(directory, kind)))
    quantization = gguf.GGMLQuantizationType[kind]
    mean_quantized(directory, quantization)
    expected = tokens_of(load_tiny(directory))
    assert tokens_of(load_tiny(made)) == expected
    device = CpuBackend().open(0)
    try:
        assert tokens_of(load_model(make_worker_config(made), device)) == expected
    finally:
        device.close()


def test_gguf_brings_its_tokenizer(tmp_path):
    """Text in, the same ids as from the checkpoint's own files."""
    directory = make_tiny_model("qwen2", tmp_path)
    made = resolve_model_directory(str(write(directory)))
    ours = transformers.AutoTokenizer.from_pretrained(made)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Once upon a time"
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(
        text, add_special_tokens=False
    )


def test_gguf_directory_is_made_once(tmp_path):
    """A second start finds the first one's."""
    path = write(make_tiny_model("llama", tmp_path))
    first, second = (resolve_model_directory(str(path)) for _ in range(2))
    assert first == second
    assert len(list(first.parent.iterdir())) == 1


def test_gguf_frequencies_of_llama3_are_found_and_others_refused(tmp_path):
    """The file keeps what follows from the settings; ignoring it would give other tokens."""
    directory = make_tiny_model("llama", tmp_path, head_dim=64)
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, 64, 2) / 64)
    divisors = []
    for wavelength in wavelengths:
        smooth = (8192 / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / 8 + smooth)
        divisors.append(1 if wavelength < 2048 else 8 if wavelength > 8192 else between)
    assert all(a <= b for a, b in pairwise(divisors))
    stored = np.array(divisors, dtype=np.float32)
    path = write(directory, extra={"rope_freqs.weight": stored})
    rope = json.loads((resolve_model_directory(str(path)) / "config.json").read_text())
    assert (rope["rope_parameters"]["rope_type"], rope["rope_parameters"]["factor"]) == (
        "llama3",
        8.0,
    )
    path = write(directory, "F16", extra={"rope_freqs.weight": stored * 3})
    with pytest.raises(UnsupportedError, match="frequencies of its own"):
        resolve_model_directory(str(path))


def test_gguf_of_another_architecture_is_refused(tmp_path):
    """The message says which there are."""
    path = write(make_tiny_model("llama", tmp_path), arch="minicpm")
    with pytest.raises(UnsupportedError, match="architecture minicpm"):
        resolve_model_directory(str(path))


def test_broken_gguf_is_named(tmp_path):
    """A download that broke off."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(CheckpointError, match="download it again"):
        resolve_model_directory(str(path))
