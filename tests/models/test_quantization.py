"""Weights in 8 and 4 bits mean what they say, cost the quality that is promised, or are refused."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from quire.backends.reference.quantization import unpack_codes, widen  # noqa: E402
from quire.core.errors import UnsupportedError  # noqa: E402
from quire.core.models.weights.quantization import (  # noqa: E402
    quantize,
    quantize_int4,
    quantize_int8,
)
from quire.core.models.weights.quantization_spec import (  # noqa: E402
    QuantizationSpec,
    check_group_size,
    parse_quantization,
)
from quire.core.serving.cli.bench.quality import (  # noqa: E402
    Prediction,
    compare,
    divergence,
    held_out_text,
)


@pytest.fixture
def weight(torch_rng):
    return torch.randn(70, 96, generator=torch_rng) * torch.rand(70, 1, generator=torch_rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_weight_is_within_half_a_step_of_its_scale(weight, dtype):
    """The largest weight of a row sets the scale; no weight is off by more than half of it."""
    weight = weight.to(dtype)
    before = weight.clone()
    quantized = quantize_int8(weight)
    error = (widen(quantized) - weight.float()).abs()
    assert (error <= quantized.scales * 0.5001).all()
    assert torch.equal(weight, before)
    assert (quantized.bits, quantized.group_size, quantized.activations) == (8, 0, "token")


def test_int4_weight_has_no_more_error_than_the_whole_range_gives(weight):
    """Cutting the range is done only where it pays: the slow plain formula bounds every group."""
    quantized = quantize_int4(weight, 32)
    grouped = weight.view(70, 3, 32)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).bfloat16().float().unsqueeze(-1)
    zero = (-low.unsqueeze(-1) / scale).round()
    plain = ((grouped / scale).round() + zero).clamp(0, 15).sub(zero) * scale
    ours = (widen(quantized).view(70, 3, 32) - grouped).square().sum(-1)
    assert (ours <= (plain - grouped).square().sum(-1) * 1.0001).all()
    assert ours.sum() < (plain - grouped).square().sum()


def test_int4_codes_lie_two_in_a_byte_the_earlier_one_low(weight):
    """The order that the contract defines."""
    quantized = quantize_int4(weight, 32)
    codes = unpack_codes(quantized.codes, 4, 96)
    assert torch.equal(codes[:, 0], quantized.codes[:, 0] % 16)
    assert torch.equal(codes[:, 1], quantized.codes[:, 0] // 16)


def test_quantized_zeros_stay_zeros():
    """Rows without a range divide by nothing."""
    for quantized in (quantize_int8(torch.zeros(3, 64)), quantize_int4(torch.zeros(3, 64), 32)):
        assert widen(quantized).abs().sum() == 0


def test_head_and_odd_layers_are_kept_in_8_bits():
    """What 4 bits would hurt most, and what groups do not divide."""
    spec = QuantizationSpec(scheme="int4")
    assert quantize(torch.ones(4, 64), spec).bits == 4
    assert quantize(torch.ones(4, 64), spec, is_head=True).bits == 8
    assert quantize(torch.ones(4, 40), spec).bits == 8


@pytest.mark.parametrize(
    ("scheme", "options", "codes"),
    [
        ("int3", {}, ["config.quantization"]),
        ("int4", {"quantization.group_size": "48"}, ["options.quantization.group_size"]),
        ("int8", {"quantization.group_size": "x"}, ["options.quantization.group_size"] * 2),
    ],
)
def test_parse_quantization_bad_settings_are_refused_with_every_reason(scheme, options, codes):
    """One run tells all that is wrong."""
    with pytest.raises(UnsupportedError) as caught:
        parse_quantization(scheme, options)
    assert [reason.code for reason in caught.value.reasons] == codes


def test_group_size_that_does_not_divide_is_refused_by_name():
    """Each number of inputs that groups do not divide is named once, with a layer that has it."""
    spec = parse_quantization("int4", {"quantization.group_size": "128"})
    with pytest.raises(UnsupportedError) as caught:
        check_group_size(spec, [("a", 256), ("b", 192), ("c", 192), ("d", 96)])
    assert ["b" in r.have or "d" in r.have for r in caught.value.reasons] == [True, True]


def test_divergence_is_the_formula_over_tokens_and_rest():
    """Two tokens and the rest, by hand."""
    p = {1: math.log(0.5), 2: math.log(0.25)}
    q = {1: math.log(0.25), 2: math.log(0.5), 3: math.log(0.1)}
    assert divergence(p, p) == 0
    assert divergence(p, q) == pytest.approx(0.25 * math.log(2))


@pytest.mark.slow
def test_quantized_demo_model_keeps_its_perplexity():
    """On text that it was not trained on: int8 within 0.5 %, int4 within 3 % of float32."""
    from quire import LLM, SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=20)
    predictions = {}
    for quantization in (None, "int8", "int4"):
        dtype = "bfloat16" if quantization else "float32"
        llm = LLM(model="demo", dtype=dtype, quantization=quantization, max_model_len=512)
        ids = llm.get_tokenizer().encode(held_out_text())[:8176]
        windows = [ids[start : start + 511] for start in range(0, len(ids), 511)]
        found = []
        for part in windows:
            (output,) = llm.generate([{"prompt_token_ids": part}], params, use_tqdm=False)
            found += [
                Prediction(seen[token].logprob, {t: e.logprob for t, e in seen.items()})
                for token, seen in zip(part[1:], output.prompt_logprobs[1:], strict=True)
            ]
        predictions[quantization] = found
        llm.close()
    int8, int4 = (compare(predictions[None], predictions[q]) for q in ("int8", "int4"))
    assert int8["perplexity_ratio"] < 1.005, int8
    assert int4["perplexity_ratio"] < 1.03, int4
    assert int8["divergence_mean_nats"] < int4["divergence_mean_nats"] < 0.1
