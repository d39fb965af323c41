"""Llama 4: what no other family has, beside the tests that hold it with all of them."""

from __future__ import annotations

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import load_tiny, run_greedy  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import make_tiny_model, make_torch_model  # noqa: E402
from transformers import Llama4TextConfig  # noqa: E402

from quire import LLM, SamplingParams  # noqa: E402
from quire.backends.reference import TorchDevice  # noqa: E402
from quire.core.errors import CheckpointError, UnsupportedError  # noqa: E402
from quire.core.interface import DeviceInfo  # noqa: E402
from quire.core.interface.experts import ExpertWeights, RoutingSpec  # noqa: E402
from quire.core.models.decoder_spec import MixtureSpec, TemperatureSpec  # noqa: E402
from quire.core.models.description import describe_model  # noqa: E402
from quire.core.models.families.llama4 import describe  # noqa: E402
from quire.core.models.mlp import MixtureMlp, MixtureWeights  # noqa: E402
from quire.core.models.rotary import TemperatureTable  # noqa: E402

PROMPT = list(range(10, 60))
CHUNK = 24
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 70)
"""On both sides of every border between chunks."""


@pytest.fixture
def directory(tmp_path):
    return make_tiny_model("llama4", tmp_path)


def tokens_of(model) -> list[int]:
    return run_greedy(model, [PROMPT], 4, chunk=64)[0][0]


def change_weights(directory, change) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def text_config(**changes) -> Llama4TextConfig:
    return Llama4TextConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **changes)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_first_logprobs_on_both_sides_of_chunks_are_those_of_transformers(directory, quantization):
    """A chunk that begins a token too early or late shows; weights in 8 and 4 bits load and are near."""
    prompts = [[(7 * i + n) % 500 + 4 for i in range(n)] for n in LENGTHS]
    torch_model = make_torch_model("llama4")
    with torch.inference_mode():
        want = [torch_model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts]
    settings = {"quantization": quantization}
    if quantization == "int4":
        settings["options"] = {"quantization.group_size": "16"}
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
    with LLM(model=str(directory), device="cpu", dtype="float32", **settings) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    off = [
        abs(entry.logprob - float(row[token]))
        for output, row in zip(outputs, want, strict=True)
        for token, entry in output.outputs[0].logprobs[0].items()
    ]
    assert max(off) < {None: 2e-4, "int8": 0.6, "int4": 1.5}[quantization]


def test_native_family_gives_the_tokens_of_transformers_own_code_in_the_engine(directory):
    """Two ways to run a checkpoint are one model."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    rows = []
    for implementation in ("native", "transformers"):
        with LLM(
            model=str(directory), device="cpu", dtype="float32", model_impl=implementation
        ) as llm:
            (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
            rows.append(list(output.outputs[0].token_ids))
    assert rows[0] == rows[1]


def test_groups_are_chunks_and_full_attention(directory):
    """Layers that rotate see their chunk; the last of every so many sees everything."""
    groups = describe_model(directory, dtype="float32").attention_groups
    found = [(g.name, g.spec.kind, g.spec.window, g.layers) for g in groups]
    assert found == [
        ("chunked_24", "chunked", CHUNK, (0, 1)),
        ("full", "causal", None, (2,)),
    ]


def test_multimodal_checkpoint_loads_its_text_part(directory):
    """Llama 4 comes with a vision model; prompts of text need none of it."""
    expected = tokens_of(load_tiny(directory))

    def wrap(weights):
        for name in list(weights):
            weights[f"language_model.{name}"] = weights.pop(name)
        weights["vision_model.patch_embedding.linear.weight"] = torch.zeros(3)
        weights["multi_modal_projector.linear_1.weight"] = torch.zeros(3)

    change_weights(directory, wrap)
    config = {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": json.loads((directory / "config.json").read_text()),
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    }
    (directory / "config.json").write_text(json.dumps(config))
    assert tokens_of(load_tiny(directory)) == expected


def test_experts_that_do_not_fit_are_named_at_once(directory):
    """What is missing, what is not ours, and what has the shape of another layout."""

    def spoil(weights):
        del weights["model.layers.0.feed_forward.router.weight"]
        weights["model.layers.1.feed_forward.gate_proj.weight"] = torch.zeros(80, 64)
        name = "model.layers.2.feed_forward.experts.down_proj"
        weights[name] = weights[name].transpose(1, 2).contiguous()

    change_weights(directory, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_tiny(directory)
    message = str(caught.value)
    assert "model.layers.0.feed_forward.router.weight" in message
    assert "model.layers.1.feed_forward.gate_proj.weight (model.safetensors)" in message
    assert "experts.down_proj is [4, 64, 112], not [4, 112, 64]" in message


@pytest.mark.parametrize(
    ("changes", "need"),
    [
        ({"attention_chunk_size": None}, "attention_chunk_size"),
        ({"layer_types": ["sliding_attention"] * 48}, "sliding_attention"),
    ],
)
def test_layers_that_it_does_not_know_are_refused_by_name(changes, need):
    """A layer of another kind must not run as one of these."""
    with pytest.raises(UnsupportedError, match=need):
        describe(text_config(**changes))


def test_configs_of_scout_and_maverick_are_read_as_they_are_meant():
    """All layers sparse with norms, and every second one without."""
    scout = describe(text_config())
    assert scout.mixture.layers == frozenset(range(48))
    assert scout.has_rotated_norm
    assert [i for i in range(48) if scout.layer_ropes[i] is None] == list(range(3, 48, 4))
    assert [i for i in range(48) if scout.layer_windows[i] is None] == list(range(3, 48, 4))
    maverick = describe(
        text_config(interleave_moe_layer_step=2, num_local_experts=128, use_qk_norm=False)
    )
    assert maverick.mixture.layers == frozenset(range(1, 48, 2))
    assert (maverick.intermediate_size, maverick.mixture.intermediate_size) == (16384, 8192)
    assert not maverick.has_rotated_norm


def test_temperatures_are_the_formula():
    """One up to the floor, then a step for every floor of tokens."""
    table = TemperatureTable(TemperatureSpec(floor=8, scale=0.5), max_model_len=64, device="cpu")
    factors, _ = table.gather(torch.arange(64))
    want = [math.log1p((position + 1) // 8) * 0.5 + 1 for position in range(64)]
    assert factors.shape == (64, 1)
    torch.testing.assert_close(factors[:, 0].double(), torch.tensor(want).double())


def test_experts_are_chosen_by_logits_whose_sigmoids_are_equal():
    """Sigmoids of 20 and 30 are both one in float32; the larger logit is chosen all the same."""
    ops = TorchDevice(info=DeviceInfo(index=0, name="host")).ops()
    generator = torch.Generator().manual_seed(3)
    experts = ExpertWeights(
        gate_up=torch.randn(2, 8, 4, generator=generator),
        down=torch.randn(2, 4, 4, generator=generator),
    )
    weights = MixtureWeights(
        router=ops.pack_linear(torch.tensor([[20.0, 0, 0, 0], [30.0, 0, 0, 0]]), None),
        correction_bias=None,
        experts=ops.pack_experts(experts),
        shared=None,
        shared_gate=None,
    )
    routing = RoutingSpec(num_experts=2, num_chosen=1, score="sigmoid", is_renormalised=False)
    mixture = MixtureSpec(
        layers=frozenset({0}), routing=routing, intermediate_size=4, weighs_input=True
    )
    x = torch.tensor([[1.0, 0.5, -0.5, 2.0]])
    out = MixtureMlp(mixture, "silu", weights, ops)(x)
    gate, up = (x @ experts.gate_up[1].T).chunk(2, dim=-1)
    want = (torch.nn.functional.silu(gate) * up) @ experts.down[1].T
    torch.testing.assert_close(out, want)
