"""Architectures without a native family: run right, or refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import model_matrix  # noqa: E402
from paged_runs import make_worker_config  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_architectures import make_tiny_architecture  # noqa: E402

from quire.backends.reference import TorchDevice  # noqa: E402
from quire.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from quire.core.interface import DeviceInfo  # noqa: E402
from quire.core.models.registry import describe  # noqa: E402
from quire.core.models.transformers_adapter import load_adapted  # noqa: E402
from quire.core.models.transformers_adapter import paged as adapted_paged  # noqa: E402
from quire.core.models.transformers_adapter.masks import OTHER, Visibility, recognize  # noqa: E402
from quire.core.models.transformers_adapter.routing import Watch  # noqa: E402
from quire.core.models.transformers_adapter.self_check import deviation, run_own  # noqa: E402
from quire.core.models.transformers_adapter.text_model import set_attention  # noqa: E402

REPRESENTATIVES = {
    "gpt2": "paged",  # learned positions
    "gpt_oss": "paged",  # sinks, windows, experts
    "deepseek_v3": "paged",  # keys and values of different sizes
    "cohere2": "paged",
    "bloom": "cached",  # ALiBi in its own attention
    "gptj": "cached",  # a class table of its own
    "mamba2": "cached",  # states alone
    "jamba": "cached, a token at a time",  # states that a later chunk would break, and attention
    "bart": "cached",  # positions from the length of the cache
}
SLOW = ("cohere2", "gptj", "jamba", "deepseek_v3")
"""Of them, those whose way another one takes as well."""
MORE = (
    "opt", "gemma2", "gemma3_text", "phimoe", "olmoe", "glm4_moe", "stablelm", "nemotron",
    "falcon_h1", "bamba", "qwen3_next", "lfm2", "mamba", "zamba2", "mpt", "codegen", "xglm",
    "gpt_neo", "roformer", "hrm_text",
)  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model of an architecture."""

    def save(name: str, **settings: object):
        make_tiny_architecture(name).save_pretrained(tmp_path, **settings)
        return tmp_path

    return save


def load(directory, **changes):
    """The model as the worker loads it, on the reference."""
    device = TorchDevice(info=DeviceInfo(index=0, name="host"))
    return load_adapted(make_worker_config(directory, **changes), device)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in REPRESENTATIVES
    ],
)
def test_engine_gives_the_tokens_of_generate(name):
    """Concurrent, chunked and prefix-shared requests of every way give the reference's tokens."""
    result = model_matrix.run_architecture(name)
    assert result["status"] == "exact", result
    assert result["way"] == REPRESENTATIVES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_engine_gives_the_tokens_of_generate_for_more(name):
    """The same for architectures that differ in smaller things."""
    result = model_matrix.run_architecture(name)
    assert result["status"] == "exact", result


def test_description_without_weights_names_way_and_groups(saved):
    """A plan shows windows, layers and parameters before a weight is read."""
    description = describe(saved("gpt_oss"), model_impl="transformers")
    model = make_tiny_architecture("gpt_oss")
    assert description.implementation == "transformers"
    assert description.num_parameters == sum(p.numel() for p in model.parameters())
    kinds = {(group.spec.kind, group.spec.window) for group in description.attention_groups}
    assert kinds == {("causal", None), ("sliding_window", 32)}
    assert all(group.spec.has_sinks for group in description.attention_groups)


def test_self_check_sees_a_wrong_scale(saved):
    """What a model is held against at load tells a wrong attention from rounding."""
    model = load(saved("gpt2"))
    with set_attention(model._text_model.model, "sdpa"):
        own = run_own(model._text_model, 512)
    assert deviation(model, own) < 1e-3
    for backend in model.attention_backends:
        backend.spec = replace(backend.spec, scale=backend.spec.scale * 1.5)
    assert deviation(model, own) > 0.01


def test_paged_way_that_differs_is_left_for_the_next_and_told(saved, monkeypatch):
    """A wrong way is never kept: the next one serves the model, and the user learns why."""
    directory = saved("gpt2")
    assert load(directory).way == "paged"
    attend = adapted_paged._StepAttention.attend
    wrong = lambda self, q, k, v, sinks: attend(self, q * 1.5, k, v, sinks)  # noqa: E731
    monkeypatch.setattr(adapted_paged._StepAttention, "attend", wrong)
    model = load(directory)
    assert model.way == "cached"
    assert any("paged: its logits are off by" in note for note in model.description.notes)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_model_that_chooses_what_it_sees_is_refused(name, saved):
    """A choice that matters in long texts alone would pass the check and give wrong tokens."""
    directory = saved(name)
    with pytest.raises(UnsupportedError, match="depends on their content"):
        load(directory)
    with pytest.raises(UnsupportedError, match="depends on their content"):
        describe(directory, model_impl="transformers")


def test_layers_are_taken_over_without_a_second_copy(saved):
    """The device multiplies, and the weights that it packed are no longer held by the modules."""
    model = load(saved("olmo2"))
    assert {"linear", "rms_norm", "gated_activation"} <= model.providers().keys()
    linears = [m for m in model._text_model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert linears
    assert all(linear.weight.untyped_storage().nbytes() <= 4 for linear in linears)


def test_linear_layer_whose_weight_others_read_is_left_alone():
    """A weight that a model multiplies with itself must stay where it is."""
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    watch = Watch(model)
    with watch.watching():
        model[0](torch.ones(1, 4))
        model[1](torch.ones(1, 4)) + model[1].weight.sum()
    assert watch.free() == {model[0]}
    assert type(model[1]) is torch.nn.Linear


def test_model_whose_generation_adds_tokens_is_refused(saved):
    """XLM predicts in the place of a mask token that it appends: not the next token of a text."""
    with pytest.raises(UnsupportedError, match="some of them the model's"):
        load(saved("xlm"))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda b, h, q, k: k <= q, Visibility("causal")),
        (lambda b, h, q, k: (k <= q) & (k > q - 8), Visibility("sliding_window", 8)),
        (lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), Visibility("chunked", 48)),
        (lambda b, h, q, k: k >= 0, OTHER),
        (lambda b, h, q, k: (k <= q) & (k > q - 8) | (k < 2), OTHER),
        (lambda b, h, q, k: torch.ones(4, dtype=torch.bool)[k], OTHER),
    ],
)
def test_mask_is_recognized_or_called_other(function, expected):
    """No mask that sees other tokens is taken for a plain one."""
    assert recognize(function) == expected


def test_config_without_architecture_is_refused(saved):
    """An empty config names what is missing."""
    directory = saved("gpt2")
    (directory / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither architectures nor a model_type"):
        describe(directory)


def test_remote_code_without_consent_is_not_run(saved):
    """The code of a checkpoint stays unread until it is trusted."""
    directory = saved("gpt2")
    path = directory / "config.json"
    config = {"model_type": "acme", "auto_map": {"AutoConfig": "acme.Config"}}
    path.write_text(json.dumps(config))
    (directory / "acme.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        describe(directory)


def test_model_without_a_text_head_is_refused(saved):
    """A vision model is told apart from a broken one."""
    directory = saved("gpt2")
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"causal language model|model of texts"):
        describe(directory)


@pytest.mark.parametrize(
    ("architecture", "has"),
    [("ViTForMaskedImageModeling", "generates no text"), ("SomebodysForText", "no such class")],
)
def test_refusal_says_whether_the_class_is_there(architecture, has, saved):
    """A class that classifies is not called missing."""
    directory = saved("gpt2")
    config = {"model_type": "vit", "architectures": [architecture]}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=has):
        describe(directory)


def test_missing_tensor_is_named_with_the_nearest(saved):
    """A renamed tensor is found by its likeness."""
    directory = saved("gpt2")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("h.1.mlp.c_fc.weight"))
    tensors[name.replace("c_fc", "c_fd")] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight; the nearest.*c_fd"):
        load(directory)


def test_mismatched_vocabulary_is_refused(saved):
    """A config of another vocabulary is an error, never a model with new random rows."""
    directory = saved("gpt2")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 600}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(directory)


def test_dummy_weights_need_no_files(saved):
    """A shape can be measured without its weights, and the same seed makes the same model."""
    directory = saved("gpt2")
    (directory / "model.safetensors").unlink()
    first, again = (load(directory, load_format="dummy", seed=3) for _ in range(2))
    tokens = torch.arange(3, 12)
    logits = []
    for text_model in (first._text_model, again._text_model):
        with set_attention(text_model.model, "sdpa"):
            logits.append(text_model.whole_logits(tokens, tokens - 3))
    assert torch.equal(*logits)
