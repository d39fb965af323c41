"""Gated delta nets and gated attention from the checkpoints of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import load_on_reference, logits_of  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_architectures import make_tiny_architecture  # noqa: E402
from tiny_image_text import make_tiny_image_text  # noqa: E402

from quire.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from quire.core.models.gated_attention import gates_last  # noqa: E402
from quire.core.models.registry import describe  # noqa: E402
from quire.core.models.state_space.delta_loading import read_projection  # noqa: E402
from quire.core.models.state_space.delta_spec import DeltaSpec  # noqa: E402

TEXT = np.random.default_rng(3).integers(4, 500, size=24).tolist()
PIECES = (9, 15)


@pytest.fixture(scope="module")
def oracle():
    """A tiny Qwen3-Next in transformers' own code."""
    return make_tiny_architecture("qwen3_next")


@pytest.fixture
def checkpoint(oracle, tmp_path):
    """The same, saved."""
    oracle.save_pretrained(tmp_path)
    return tmp_path


def change_tensors(directory, change):
    """Applies `change` to the dictionary of a checkpoint's tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(directory, **changes):
    """Sets fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("value_heads", [2, 4, 6])
def test_grouped_projection_is_reordered_as_transformers_reorders_its_results(value_heads):
    """Rows by key head become rows by kind, whatever number of value heads share a key head."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=8, linear_num_key_heads=2, linear_num_value_heads=value_heads,
        linear_key_head_dim=3, linear_value_head_dim=5, num_hidden_layers=4,
    )  # fmt: skip
    net = Qwen3NextGatedDeltaNet(config, 0)
    spec = DeltaSpec(
        hidden_size=8, num_key_heads=2, num_value_heads=value_heads, key_size=3, value_size=5,
        conv_width=4, norm_eps=1e-6, is_grouped=True,
    )  # fmt: skip
    tensors = {name: SimpleNamespace(name=name) for name in spec.tensors("")}
    stored = net.state_dict()
    rows = read_projection(spec, tensors, lambda tensor: stored[tensor.name])
    x = torch.randn(1, 7, 8)
    mixed = net.fix_query_key_value_ordering(net.in_proj_qkvz(x), net.in_proj_ba(x))
    want = torch.cat([part.flatten(2) for part in mixed], dim=-1)
    assert rows.shape[0] == spec.projected_size
    torch.testing.assert_close(x @ rows.T, want)


def test_gates_follow_queries_keys_and_values_in_the_order_of_heads():
    """Row by row: a head's queries keep their place among queries, its gates among gates."""
    decoder = SimpleNamespace(num_heads=3, num_kv_heads=1, head_size=2)
    names = [f"{kind}{head}.{i}" for head in range(3) for kind in "qg" for i in range(2)]
    names += ["k0.0", "k0.1", "v0.0", "v0.1"]
    order = gates_last(decoder, torch.arange(len(names))).tolist()
    wanted = [f"{kind}{head}.{i}" for kind in "qkvg" for head in range(3) for i in range(2)]
    assert [names[row] for row in order] == [name for name in wanted if name in names]


def test_tensors_of_guessing_heads_are_left_out_and_said(checkpoint, oracle, caplog):
    """Qwen's checkpoints bring layers that guess tokens ahead; no token depends on them."""
    extra = {"mtp.fc.weight": torch.ones(64, 128), "mtp.norm.weight": torch.ones(64)}
    change_tensors(checkpoint, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.WARNING):
        model = load_on_reference(checkpoint)
    assert "2 tensors under mtp." in caplog.text
    with torch.no_grad():
        want = oracle(torch.tensor([TEXT])).logits[0, -1]
    torch.testing.assert_close(logits_of(model, TEXT, PIECES)[-1], want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("end", ["in_proj_ba.weight", "dt_bias", "norm.weight"])
def test_checkpoint_without_a_tensor_of_a_delta_net_is_refused_by_name(checkpoint, end):
    """A missing tensor is named before anything is packed."""
    name = f"model.layers.0.linear_attn.{end}"
    change_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_on_reference(checkpoint)


def test_projection_of_queries_without_gates_is_refused_by_shape(checkpoint):
    """A checkpoint whose queries have no gates is not one of this family."""
    name = "model.layers.1.self_attn.q_proj.weight"
    change_tensors(checkpoint, lambda tensors: tensors.update({name: torch.ones(64, 64)}))
    with pytest.raises(CheckpointError, match=r"\[64, 64\], not \[128, 64\]"):
        load_on_reference(checkpoint)


def test_model_impl_chooses_who_runs_it(checkpoint):
    """Natively unless asked otherwise; a config of one kind of layer goes the other way."""
    assert describe(checkpoint).implementation == "native"
    assert describe(checkpoint, model_impl="transformers").implementation == "transformers"
    change_config(checkpoint, layer_types=["full_attention", "full_attention"])
    assert describe(checkpoint).implementation == "transformers"
    with pytest.raises(UnsupportedError, match="layers of one kind"):
        describe(checkpoint, model_impl="native")


def test_weights_made_up_pass_through_every_mixer(checkpoint):
    """Norms that add one and norms that do not are both ones: no layer answers zeros."""
    model = load_on_reference(checkpoint, load_format="dummy")
    mixer = model._layers[0].mixer
    assert torch.equal(mixer._weights.norm, torch.ones(16))
    assert torch.equal(model._weights.final_norm, torch.ones(64))
    logits = logits_of(model, TEXT, PIECES)[-1]
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe_text"])
def test_experts_are_found_apart_and_merged(tmp_path, name, is_merged):
    """Some checkpoints have a tensor for each expert, others one for all experts of a layer."""
    model = make_tiny_architecture(name)
    model.save_pretrained(tmp_path)
    if is_merged:
        change_tensors(tmp_path, lambda tensors: merge_experts(tensors, model.state_dict()))
    with torch.no_grad():
        want = model(torch.tensor([TEXT])).logits[0, -1]
    got = logits_of(load_on_reference(tmp_path), TEXT, PIECES)[-1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


def merge_experts(tensors, state):
    """The experts as the modules of transformers have them, in place of a tensor for each."""
    for name in [name for name in tensors if ".mlp.experts." in name]:
        del tensors[name]
    tensors |= {name: tensor for name, tensor in state.items() if ".mlp.experts." in name}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_texts_of_a_checkpoint_with_a_tower_are_those_of_transformers(tmp_path, name, is_tied):
    """The names of the text model are found behind the tower's, and the outer config ties."""
    model = make_tiny_image_text(name, tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path)
    description = describe(tmp_path)
    assert (description.implementation, description.accepts) == ("native", ())
    assert description.architecture == type(model).__name__
    with torch.no_grad():
        want = model(torch.tensor([TEXT])).logits[0, -1]
    got = logits_of(load_on_reference(tmp_path), TEXT, PIECES)[-1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("seed", range(3))
def test_logits_in_bfloat16_are_as_near_to_float32_as_transformers_own(tmp_path, seed):
    """Nothing is lost beside transformers' bfloat16; without experts, whose choice may tip over."""
    oracle = make_tiny_architecture("qwen3_next", seed, num_experts=0)
    oracle.save_pretrained(tmp_path)
    texts = np.random.default_rng(seed).integers(4, 500, size=(24, 24)).tolist()
    with torch.no_grad():
        want = oracle(torch.tensor(texts)).logits[:, -1]
        theirs = oracle.bfloat16()(torch.tensor(texts)).logits[:, -1].float()
    model = load_on_reference(tmp_path, dtype="bfloat16", cache_dtype="bfloat16")
    ours = torch.stack([logits_of(model, text, PIECES)[-1] for text in texts])
    ours, theirs = ((logits - want).norm(dim=1).median() for logits in (ours, theirs))
    assert ours <= 1.2 * theirs
