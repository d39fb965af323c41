"""RoPE whose frequencies depend on length: one choice a model, by the length it is loaded with."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import PagedRun, RunningRequest, load_tiny  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from quire.core.models.decoder_spec import RopeSpec  # noqa: E402
from quire.core.models.rotary import RotaryTable, compute_frequencies  # noqa: E402

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}


@torch.no_grad()
def last_logits_of_transformers(directory, prompt):
    """Uncached: the whole sequence with the frequencies of its own length, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    )
    return model(torch.tensor([prompt])).logits[0, -1]


def last_logits(directory, prompt, max_model_len, chunk):
    run = PagedRun(load_tiny(directory, max_model_len=max_model_len))
    request = RunningRequest(list(prompt))
    while request.num_computed < len(prompt):
        logits = run.step([(request, min(chunk, len(prompt) - request.num_computed))])
    return logits[0].double()


@pytest.mark.parametrize("chunk", [200, 37])
def test_longrope_past_the_original_length_uses_the_long_factors(chunk, tmp_path):
    """A model loaded for long texts gives transformers' logits for a long text, however it is cut."""
    directory = make_tiny_model("phi3-longrope", tmp_path, with_tokenizer=False)
    prompt = [4 + (i * i) % 500 for i in range(150)]
    expected = last_logits_of_transformers(directory, prompt)
    assert torch.allclose(last_logits(directory, prompt, 256, chunk), expected, atol=1e-4)


def test_longrope_within_the_original_length_uses_the_short_factors(tmp_path):
    """A model loaded for short texts gives transformers' logits for a short text."""
    directory = make_tiny_model("phi3-longrope", tmp_path, with_tokenizer=False)
    prompt = [4 + (i * i) % 500 for i in range(100)]
    expected = last_logits_of_transformers(directory, prompt)
    assert torch.allclose(last_logits(directory, prompt, 128, 200), expected, atol=1e-4)
    assert not torch.allclose(last_logits(directory, prompt, 256, 200), expected, atol=1e-4)


def test_dynamic_rope_past_the_original_length_scales_by_the_loaded_length(tmp_path):
    """Dynamic NTK at full length is transformers' own on a sequence of that length."""
    directory = make_tiny_model(
        "llama-rope-dynamic", tmp_path, with_tokenizer=False, max_position_embeddings=64, **DYNAMIC
    )
    prompt = [4 + (i * i) % 500 for i in range(150)]
    expected = last_logits_of_transformers(directory, prompt)
    assert torch.allclose(last_logits(directory, prompt, 150, 40), expected, atol=1e-4)
    assert not torch.allclose(last_logits(directory, prompt, 64 * 4, 40), expected, atol=1e-4)


def test_rotary_table_gathers_the_angles_of_positions(torch_rng):
    """Rows are looked up by position, in any order and with repeats."""
    rope = RopeSpec(
        rope_type="default",
        parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5},
        head_size=16,
        max_position_embeddings=32,
    )
    table = RotaryTable(rope, max_model_len=32, device="cpu")
    positions = torch.randint(0, 32, (9,), generator=torch_rng)
    cos, sin = table.gather(positions)
    angles = positions.double()[:, None] * 100.0 ** -(torch.arange(4).double() / 4)
    torch.testing.assert_close(cos.double(), angles.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin(), atol=1e-5, rtol=0)
    assert table.size_bytes == 2 * 32 * 4 * 4


def test_unscaled_frequencies_are_those_of_linear_scaling_by_one():
    """Our one own formula agrees with transformers' where both apply."""
    rope = {"head_size": 20, "max_position_embeddings": 64}
    parameters = {"rope_theta": 10000.0, "factor": 1.0}
    own, _ = compute_frequencies(RopeSpec(rope_type="default", parameters=parameters, **rope), 64)
    linear, _ = compute_frequencies(RopeSpec(rope_type="linear", parameters=parameters, **rope), 64)
    torch.testing.assert_close(own, linear, atol=0, rtol=1e-6)
