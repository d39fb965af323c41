"""Weights come in whole or not at all, and every refusal names the file and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import load_tiny, make_worker_config, run_greedy  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import FAMILIES, make_tiny_model, make_torch_model  # noqa: E402

from quire.backends.reference import ReferenceOps, TorchDevice  # noqa: E402
from quire.core.errors import CheckpointError, DeviceOutOfMemory, UnsupportedError  # noqa: E402
from quire.core.interface import DeviceInfo  # noqa: E402
from quire.core.models.description import describe_model  # noqa: E402
from quire.core.models.loading import load_model  # noqa: E402
from quire.core.models.weights.checkpoint_files import CheckpointFiles  # noqa: E402
from quire.core.models.weights.weight_layout import TensorShape  # noqa: E402

PROMPT = list(range(10, 60))


class _Caller:
    """Unpickled, it would touch a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return (Path.touch, (self._path,))


@pytest.fixture
def llama(tmp_path):
    return make_tiny_model("llama", tmp_path, with_tokenizer=False)


def tokens_of(model) -> list[int]:
    return run_greedy(model, [PROMPT], 4, chunk=64)[0][0]


def change_weights(directory, change) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_sharded_checkpoint_loads_as_the_single_file_does(llama, tmp_path):
    """Large models come in several files with an index."""
    sharded = tmp_path / "sharded"
    make_torch_model("llama").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert tokens_of(load_tiny(sharded)) == tokens_of(load_tiny(llama))


def test_checkpoint_of_a_bare_model_loads_without_its_prefix(llama):
    """Checkpoints saved from the base model lack `model.`; old ones carry computed frequencies."""
    expected = tokens_of(load_tiny(llama))

    def strip(weights):
        for name in [n for n in weights if n.startswith("model.")]:
            weights[name.removeprefix("model.")] = weights.pop(name)
        weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    change_weights(llama, strip)
    assert tokens_of(load_tiny(llama)) == expected


def test_tied_checkpoint_with_a_stored_head_loads(tmp_path):
    """Some tied checkpoints hold the head as well; the embedding is what counts."""
    directory = make_tiny_model("llama-tied", tmp_path, with_tokenizer=False)
    expected = tokens_of(load_tiny(directory))
    change_weights(directory, lambda w: w.update({"lm_head.weight": torch.zeros(512, 64)}))
    assert tokens_of(load_tiny(directory)) == expected


def test_multimodal_gemma3_loads_its_text_part(tmp_path):
    """Gemma 3 comes with a vision tower; prompts of text need none of it."""
    directory = make_tiny_model("gemma3", tmp_path, with_tokenizer=False)
    expected = tokens_of(load_tiny(directory))

    def wrap(weights):
        for name in list(weights):
            weights[f"language_model.{name}"] = weights.pop(name)
        weights["vision_tower.vision_model.embeddings.patch.weight"] = torch.zeros(3)
        weights["multi_modal_projector.mm_input_projection_weight"] = torch.zeros(3)

    change_weights(directory, wrap)
    text = json.loads((directory / "config.json").read_text())
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    }
    (directory / "config.json").write_text(json.dumps(config))
    assert tokens_of(load_tiny(directory)) == expected


def test_tensors_that_do_not_fit_are_all_named_at_once(llama):
    """One message lists what is missing, what is unexpected and what has another shape, with its file."""

    def spoil(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        del weights["model.norm.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 64)

    change_weights(llama, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_tiny(llama)
    message = str(caught.value)
    assert "missing (2)" in message
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "model.norm.weight" in message
    assert "unexpected (1)" in message
    assert "model.layers.0.self_attn.q_proj.bias (model.safetensors)" in message
    assert "k_proj.weight is [16, 64], not [32, 64] (model.safetensors)" in message


def test_hundreds_of_wrong_tensors_are_counted_and_cut(llama):
    """A config of another model must not print thousands of lines."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 30}))
    with pytest.raises(CheckpointError, match=r"missing \(252\)") as caught:
        load_tiny(llama)
    assert len(str(caught.value).splitlines()) < 60


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -10])
def test_truncated_file_is_named_with_the_remedy(llama, num_bytes):
    """A broken download is said to be one, wherever it broke off."""
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*download it again"):
        load_tiny(llama)


def test_missing_shard_is_named(tmp_path):
    """An index that names a file which is not there."""
    make_torch_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        load_tiny(tmp_path)


def test_index_without_a_map_is_refused(llama):
    """A broken index is said to be broken."""
    (llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        load_tiny(llama)


def test_pytorch_file_gives_the_tokens_of_safetensors(llama):
    """A checkpoint from before safetensors loads as it is."""
    expected = tokens_of(load_tiny(llama))
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert tokens_of(load_tiny(llama)) == expected


def test_pytorch_file_with_code_in_it_is_refused_and_not_run(llama, tmp_path):
    """A pickle that would call something is an error; nothing is called."""
    (llama / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Caller(tmp_path / "called")}, llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_tiny(llama)
    assert not (tmp_path / "called").exists()


def test_other_formats_are_refused_with_the_way_out(llama):
    """The message names the files and how to convert them."""
    shutil.move(llama / "model.safetensors", llama / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt.*save_pretrained"):
        load_tiny(llama)


def test_missing_tensor_is_listed_with_the_nearest_name(llama):
    """A renamed tensor is found by its likeness."""

    def rename(weights):
        weights["model.layers.1.mlp.upper_proj.weight"] = weights.pop(
            "model.layers.1.mlp.up_proj.weight"
        )

    change_weights(llama, rename)
    with pytest.raises(CheckpointError, match=r"nearest there is: .*upper_proj"):
        load_tiny(llama)


def test_directory_without_weights_is_refused(llama):
    """No weights at all, and dummy ones as the way out."""
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="--load-format dummy"):
        load_tiny(llama)


@pytest.mark.parametrize("variant", FAMILIES)
def test_dummy_weights_need_no_files_and_repeat(variant, tmp_path):
    """Random weights come from the config and the seed alone."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    (directory / "model.safetensors").unlink()
    first = tokens_of(load_tiny(directory, load_format="dummy", seed=1))
    assert tokens_of(load_tiny(directory, load_format="dummy", seed=1)) == first
    assert tokens_of(load_tiny(directory, load_format="dummy", seed=2)) != first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_weights_are_converted_to_the_dtype_asked_for(variant, dtype, tmp_path):
    """Logits in half precision stay as near to float32 as transformers' own do."""
    from transformers import AutoModelForCausalLM

    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    half = load_tiny(directory, dtype=dtype, cache_dtype=dtype)
    full = load_tiny(directory)
    assert half.weight_bytes < full.weight_bytes
    _, logits = run_greedy(half, [PROMPT], 1, chunk=64)
    _, exact = run_greedy(full, [PROMPT], 1, chunk=64)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    with torch.no_grad():
        reference = theirs(torch.tensor([PROMPT])).logits[0, -1].float()
    error = (logits[0][0] - exact[0][0]).norm()
    assert error < 2 * (reference - exact[0][0]).norm()


@pytest.mark.parametrize("variant", FAMILIES)
def test_weight_bytes_are_those_of_the_parameters(variant, tmp_path):
    """What a model says it holds is its parameters once, and its rotary tables."""
    directory = make_tiny_model(variant, tmp_path, with_tokenizer=False)
    model = load_tiny(directory)
    tables = sum(rope.size_bytes for rope in model._ropes)
    assert model.weight_bytes == 4 * model.num_parameters + tables
    assert describe_model(directory).weight_bytes() == 4 * model.num_parameters


def test_refused_allocation_becomes_out_of_memory_of_the_device(llama):
    """torch's own error never reaches the engine."""

    class FullOps(ReferenceOps):
        def pack_linear(self, weight, bias):
            raise torch.OutOfMemoryError("no room")

    class FullDevice(TorchDevice):
        def _make_ops(self):
            return FullOps()

    device = FullDevice(info=DeviceInfo(index=0, name="full"))
    with pytest.raises(DeviceOutOfMemory, match="no room") as caught:
        load_model(make_worker_config(llama), device)
    assert caught.value.tag == "weights"


def test_attention_that_the_device_lacks_is_refused_before_weights_are_read(tmp_path):
    """Every group's reasons come together, and no file was opened."""
    directory = make_tiny_model("gemma3", tmp_path, with_tokenizer=False)
    (directory / "model.safetensors").unlink()

    class NoAttention(TorchDevice):
        def attention(self, spec):
            from quire.core.interface import Reason

            reason = Reason(code=f"attention.{spec.kind}", need="n", have="h", remedy="r")
            raise UnsupportedError([reason])

    with pytest.raises(UnsupportedError) as caught:
        load_model(
            make_worker_config(directory), NoAttention(info=DeviceInfo(index=0, name="none"))
        )
    codes = {reason.code for reason in caught.value.reasons}
    assert codes == {"attention.sliding_window", "attention.causal"}


def test_quantization_is_refused_with_a_reason(llama):
    """Nothing is dropped silently."""
    with pytest.raises(UnsupportedError, match="quantization int3"):
        load_tiny(llama, quantization="int3")


def test_providers_name_who_serves_each_operator(llama):
    """`quire plan` prints this."""
    providers = load_tiny(llama).providers()
    assert providers["paged_attention"] == "reference"
    assert providers["linear"] == "reference"
    assert "soft_cap" not in providers


def test_large_model_shows_its_progress_on_a_terminal_alone(llama, monkeypatch, capsys):
    """Logs of a server stay clean; a person at a terminal sees that something happens."""
    from quire.core.models import loading

    shown = []
    monkeypatch.setattr(loading, "_SHOW_PROGRESS_FROM_BYTES", 0)
    load_tiny(llama)
    assert capsys.readouterr().err == ""

    real = loading._progress_bar
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(loading, "_progress_bar", lambda *a: shown.append(a) or real(*a))
    load_tiny(llama)
    assert shown == [("LlamaForCausalLM", 2)]


def opened(directory):
    """The files of a checkpoint and the tensors in them."""
    files = CheckpointFiles(directory, lambda name: name)
    content = load_file(directory / "model.safetensors")
    return files, {
        name: (TensorShape(name=name, shape=tuple(tensor.shape)), tensor)
        for name, tensor in content.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_read_into_place_is_the_tensor_of_the_library(llama, dtype):
    """Bytes are read without a mapping, from offsets: each must be the tensor asked for."""
    files, tensors = opened(llama)
    for shape, tensor in tensors.values():
        place = torch.empty(tensor.shape, dtype=dtype)
        files.read_into(shape, place)
        assert torch.equal(place, tensor.to(dtype))


def test_tensor_read_into_columns_leaves_the_others_alone(llama):
    """A place whose rows are apart cannot take the file's bytes as they lie."""
    files, tensors = opened(llama)
    shape, tensor = next(pair for pair in tensors.values() if pair[1].dim() == 2)
    around = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], dtype=tensor.dtype)
    files.read_into(shape, around[:, : tensor.shape[1]])
    assert torch.equal(around[:, : tensor.shape[1]], tensor)
    assert not around[:, tensor.shape[1] :].any()


def test_file_cut_after_it_was_checked_is_refused_by_name(llama):
    """A download that is replaced while it is read must not leave weights unset."""
    files, tensors = opened(llama)
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])

    def read_all() -> None:
        for shape, tensor in tensors.values():
            files.read_into(shape, torch.empty_like(tensor))

    with pytest.raises(CheckpointError, match=r"model\.safetensors .*truncated"):
        read_all()
