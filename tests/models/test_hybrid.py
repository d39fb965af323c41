"""Attention beside states by the operators: transformers' tokens, however a text is cut."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import model_matrix  # noqa: E402
from paged_runs import (  # noqa: E402
    BLOCK_SIZE,
    PagedRun,
    RunningRequest,
    hold_resuming,
    load_on_reference,
    logits_of,
)
from tiny_architectures import make_tiny_architecture  # noqa: E402
from tiny_models import make_tiny_tokenizer  # noqa: E402

from quire.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from quire.core.models.registry import describe  # noqa: E402

MULTIPLIERS = {
    "lm_head_multiplier": 0.7, "embedding_multiplier": 1.3, "mlp_multipliers": [0.8, 1.2],
    "key_multiplier": 0.6, "attention_out_multiplier": 0.9, "attention_in_multiplier": 1.1,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.75,
}  # fmt: skip
LINEAR, FULL = "linear_attention", "full_attention"
VARIANTS = {
    "bamba": ("bamba", {}),
    "falcon_h1": ("falcon_h1", MULTIPLIERS),
    "falcon_h1-norm": ("falcon_h1", {"mamba_rms_norm": True, "mamba_n_groups": 2}),
    "falcon_h1-bias": (
        "falcon_h1",
        {
            **MULTIPLIERS, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
            "projectors_bias": True, "mamba_proj_bias": True, "attention_bias": True,
            "mlp_bias": True, "tie_word_embeddings": True,
        },
    ),
    "jamba": ("jamba", {}),
    "jamba-dense": ("jamba", {"num_experts": 1}),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next-mixed": (
        "qwen3_next",
        {
            "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3],
            "layer_types": [FULL, LINEAR, LINEAR, FULL], "norm_topk_prob": False,
            "attention_bias": True, "tie_word_embeddings": True,
        },
    ),
    "qwen3_next-wide": (
        "qwen3_next",
        {
            "num_experts": 0, "linear_num_key_heads": 1, "linear_num_value_heads": 3,
            "linear_value_head_dim": 24, "linear_conv_kernel_dim": 3,
        },
    ),
    "qwen3_5": ("qwen3_5_text", {}),
    "qwen3_5-moe": ("qwen3_5_moe_text", {}),
}  # fmt: skip
ENGINE = {
    "dtype": "float32", "max_num_seqs": 4, "max_model_len": 128,
    "block_size": 16, "num_threads": 1,
}  # fmt: skip
TIGHT = {"device": "cpu", "cache_blocks": 7, "max_num_batched_tokens": 24}
WHOLE = {"device": "cpu", "cache_blocks": 64, "max_num_batched_tokens": 512}
OVERLAPPED = {
    "device": "sim", "cache_blocks": 8, "max_num_batched_tokens": 20, "overlap_scheduling": True,
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request, tmp_path_factory):
    """A saved tiny model, and the model itself."""
    name, changes = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    model = make_tiny_architecture(name, **changes)
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory, model


@pytest.fixture
def bamba(tmp_path):
    """A saved tiny Bamba."""
    make_tiny_architecture("bamba").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (7, 1, 8, 9, 15)])
def test_logits_are_those_of_transformers_however_a_text_is_cut(checkpoint, pieces):
    """Keys and states come from the same steps and end where the text does."""
    directory, oracle = checkpoint
    token_ids = np.random.default_rng(5).integers(4, 500, size=40).tolist()
    with torch.no_grad():
        want = oracle(torch.tensor([token_ids])).logits[0]
    got = logits_of(load_on_reference(directory), token_ids, pieces)
    ends = np.cumsum(pieces) - 1
    torch.testing.assert_close(torch.stack(got), want[ends], rtol=1e-4, atol=2e-4)


def test_request_resumes_from_the_blocks_of_another(checkpoint):
    """A shared prefix is keys of every token and the state at the end of its last block."""
    hold_resuming(load_on_reference(checkpoint[0]))


def test_step_that_fails_is_computed_anew_from_full_blocks(checkpoint, monkeypatch):
    """An error in the last layer has perhaps changed the block that fills, and none that is full."""
    directory, _ = checkpoint
    model = load_on_reference(directory)
    token_ids = np.random.default_rng(8).integers(4, 500, size=20).tolist()
    want = logits_of(model, token_ids, (BLOCK_SIZE, 20 - BLOCK_SIZE))[-1]
    run, request = PagedRun(model), RunningRequest(list(token_ids))
    run.step([(request, BLOCK_SIZE)])
    run.step([(request, 4)])
    with monkeypatch.context() as patch:
        patch.setattr(type(model._layers[-1].mlp), "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.step([(request, 1)])
    request.num_computed = BLOCK_SIZE
    assert torch.equal(run.step([(request, 20 - BLOCK_SIZE)])[0], want)


@pytest.mark.parametrize(
    "checkpoint", ["bamba", "falcon_h1", "jamba", "qwen3_next", "qwen3_5"], indirect=True
)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(TIGHT, id="tight"),
        pytest.param(WHOLE, id="whole", marks=pytest.mark.slow),
        pytest.param(OVERLAPPED, id="tight-overlapped", marks=pytest.mark.slow),
    ],
)
def test_engine_gives_the_tokens_of_generate(checkpoint, settings, monkeypatch):
    """Chunked, preempted, prefix-shared and overlapped requests give the reference's tokens."""
    from quire import LLM, SamplingParams

    monkeypatch.setattr(model_matrix, "NUM_TOKENS", 40)
    directory, oracle = checkpoint
    expected, margins = model_matrix.reference(oracle, use_cache=True)
    described = describe(directory)
    assert described.implementation == "native"
    per_token = sum(g.bytes_per_token({"float32": 4}.__getitem__) for g in described.attention_groups)  # fmt: skip
    changes = dict(settings)
    asked = [{"prompt_token_ids": prompt} for prompt in model_matrix.prompts()]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    memory = changes.pop("cache_blocks") * 16 * per_token
    with LLM(model=str(directory), cache_memory_bytes=memory, **ENGINE, **changes) as llm:
        runs = []
        for _ in range(2):
            outputs = llm.generate(asked, params, use_tqdm=False)
            runs.append([list(output.outputs[0].token_ids) for output in outputs])
        assert "causal_conv1d" in llm.facts.providers
    assert model_matrix.compare(runs, expected, margins) == "exact"


def test_description_counts_every_parameter_and_both_groups(checkpoint):
    """A plan knows the weights and the caches before a tensor is read."""
    directory, oracle = checkpoint
    description = describe(directory)
    assert description.num_parameters == sum(p.numel() for p in oracle.parameters())
    keys, states = description.attention_groups
    assert (keys.spec.kind, states.spec.kind) == ("causal", "recurrent")
    kinds = getattr(oracle.config, "layers_block_type", None) or oracle.config.layer_types
    assert len(keys.layers) == sum(kind in ("full_attention", "attention", "hybrid") for kind in kinds)  # fmt: skip
    assert sorted(keys.layers + states.layers) == list(range(len(keys.layers + states.layers)))


def test_checkpoint_without_a_tensor_is_refused_by_name(bamba):
    """A missing tensor is named before anything is packed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(bamba / "model.safetensors")
    name = "model.layers.0.mamba.A_log"
    tensors[name + "s"] = tensors.pop(name)
    save_file(tensors, bamba / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_on_reference(bamba)


def test_limited_time_steps_are_left_to_the_adapter(bamba):
    """A config that the operators do not compute is refused natively, and runs in other code."""
    path = bamba / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_step_limit": [0.0, 0.1]}))
    with pytest.raises(UnsupportedError, match="time steps limited"):
        describe(bamba, model_impl="native")
    assert describe(bamba).implementation == "transformers"


def test_page_of_models_lists_the_native_families():
    """The table in the documentation is the registry's."""
    page = (model_matrix.ROOT / "docs" / "models.md").read_text()
    assert "\n".join(model_matrix.render_native()) in page
