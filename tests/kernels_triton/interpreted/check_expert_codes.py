"""Experts whose weights are codes: every form gives the numbers of the formula, whoever is chosen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from paged_runs import make_worker_config, run_greedy
from quantized_checkpoints import as_float8, quantize_checkpoint
from tiny_models import make_tiny_model

from quire.backends.cuda.backend import CudaBackend
from quire.backends.reference import ReferenceOps, TorchDevice
from quire.backends.reference.quantization import round_activations, widen
from quire.backends.rocm.backend import RocmBackend
from quire.backends.torch_accelerator.ops import TritonOps
from quire.backends.xpu.backend import XpuBackend
from quire.core.interface import Capabilities, DeviceInfo, QuantizedExperts, QuantizedWeight
from quire.core.models.loading import load_model
from quire.kernels_triton.expert_codes import ExpertCodes
from quire.kernels_triton.float8 import UNITS

HIDDEN, INNER, COUNT = 96, 64, 5
FORMS = {
    "int8": {"bits": 8, "group_size": 0, "activations": "token"},
    "int8 alone": {"bits": 8, "group_size": 0, "activations": "none"},
    "int8 zeros": {"bits": 8, "group_size": 32, "activations": "token", "has_zeros": True},
    "int4": {"bits": 4, "group_size": 32, "activations": "group"},
    "int4 alone": {"bits": 4, "group_size": 16, "activations": "none", "has_zeros": True},
    "fp8": {"bits": 8, "group_size": 0, "activations": "token", "encoding": "float8_e4m3fn"},
    "fp8 groups": {
        "bits": 8,
        "group_size": 32,
        "activations": "group",
        "encoding": "float8_e4m3fn",
    },
    "fp8 alone": {"bits": 8, "group_size": 32, "activations": "none", "encoding": "float8_e4m3fn"},
}
CHOICES = {
    "one token": [[4, 1]],
    "ragged": [[3, 0]] * 17 + [[3, 1]] * 3 + [[0, 3]],
    "one expert has all": [[2, 2]] * 20,
    "no token": [],
}
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""An inner activation may move to the next code."""


def make_weights(form, num_outputs, num_inputs):
    how = {name: value for name, value in FORMS[form].items() if name != "has_zeros"}
    groups = num_inputs // how["group_size"] if how["group_size"] else 1

    def one():
        codes = torch.randint(0, 256, (num_outputs, num_inputs * how["bits"] // 8))
        codes[codes & 0x7F == 0x7F] = 0x80
        zeros = torch.randint(1, 1 << how["bits"], (num_outputs, groups), dtype=torch.uint8)
        return QuantizedWeight(
            **how,
            num_inputs=num_inputs,
            codes=codes.to(torch.uint8),
            scales=torch.rand(num_outputs, groups) * (0.05 if how["bits"] == 4 else 0.003),
            zeros=zeros if FORMS[form].get("has_zeros") else None,
        )

    return [one() for _ in range(COUNT)]


def make_experts(up, down, activation="silu", *, has_bias=False):
    return QuantizedExperts(
        gate_up=make_weights(up, 2 * INNER, HIDDEN),
        down=make_weights(down, HIDDEN, INNER),
        gate_up_bias=torch.randn(COUNT, 2 * INNER) if has_bias else None,
        down_bias=torch.randn(COUNT, HIDDEN) if has_bias else None,
        activation=activation,
    )


def product(x, weight):
    """x' @ weight.T in float64, x' rounded as the weight says."""
    layer = ReferenceOps().pack_quantized_linear(weight, None, "float32").payload
    return round_activations(x.float(), layer).double() @ widen(weight).double().T


def formula(x, experts, shares, ids):
    """Pair by pair in float64; activations between the products are rounded to x's dtype."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for share, expert in zip(shares[token].double(), chosen, strict=True):
            gate, up = product(x[token : token + 1], experts.gate_up[expert]).chunk(2, -1)
            inner = (torch.nn.functional.silu(gate) * up).to(x.dtype)
            out[token] += share * product(inner, experts.down[expert])[0]
    return out


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
def test_experts_in_codes_equal_float64_however_tokens_choose(launcher, form, dtype, choice):
    """Ragged loads, experts without a token, one with all, a lone token and none."""
    torch.manual_seed(0)
    experts = make_experts(form, form)
    ids = torch.tensor(CHOICES[choice], dtype=torch.int64).view(-1, 2)
    x, shares = torch.randn(len(ids), HIDDEN).to(dtype), torch.rand(len(ids), 2)
    ours = TritonOps(launcher)
    packed = ours.pack_quantized_experts(experts, str(dtype).removeprefix("torch."))
    assert isinstance(packed.payload, ExpertCodes)
    codes = sum(w.codes.nbytes for w in (*experts.gate_up, *experts.down))
    assert codes < packed.size_bytes < 2 * codes
    got = ours.experts(x, packed, shares, ids)
    assert got.dtype == dtype
    assert got.shape == x.shape
    want = formula(x, experts, shares, ids)
    if len(ids):
        assert (got.double() - want).abs().max() < TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("form", ["fp8", "fp8 groups"])
def test_flavour_of_matrix_units_changes_no_number(launcher, form, units):
    """OCP's bits, AMD's own, and devices that have neither."""
    torch.manual_seed(1)
    experts = make_experts(form, form)
    ids, shares = torch.tensor([[0, 4], [4, 2], [4, 0]]), torch.rand(3, 2)
    x = torch.randn(3, HIDDEN)
    ours = TritonOps(launcher, units)
    packed = ours.pack_quantized_experts(experts, "float32")
    assert packed.payload.down.units == units
    want = formula(x, experts, shares, ids)
    got = ours.experts(x, packed, shares, ids)
    assert (got.double() - want).abs().max() < 2e-3 * want.abs().max()


@pytest.mark.parametrize("weighs_input", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize(("up", "down"), [("int4", "int8"), ("int8 alone", "fp8 alone")])
def test_sides_of_two_forms_with_biases_equal_the_reference(
    launcher, up, down, activation, weighs_input
):
    """Inputs that are weighed are rounded afterwards; the two products may differ in form."""
    torch.manual_seed(2)
    experts = make_experts(up, down, activation, has_bias=True)
    ids, shares = torch.tensor([[0, 1], [1, 3], [1, 4]]), torch.rand(3, 2)
    x, plain, ours = torch.randn(3, HIDDEN), ReferenceOps(), TritonOps(launcher)
    want, got = (
        ops.experts(
            x,
            ops.pack_quantized_experts(experts, "float32"),
            shares,
            ids,
            weighs_input=weighs_input,
        )
        for ops in (plain, ours)
    )
    assert (got - want).abs().max() < 2e-3 * want.abs().max()


@pytest.mark.parametrize("block", [None, (32, 16)])
@pytest.mark.parametrize("backend", [CudaBackend, RocmBackend, XpuBackend])
def test_checkpoint_with_fp8_experts_keeps_them_in_8_bits(backend, block, tmp_path):
    """From the files through the loader to the kernel; the tokens are those of the reference."""
    directory = make_tiny_model("qwen3-moe", tmp_path, with_tokenizer=False)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if block:
        settings["weight_block_size"] = list(block)
    suffix = "weight_scale_inv" if block else "weight_scale"
    (tmp_path / "plain").mkdir()
    quantize_checkpoint(
        directory, tmp_path / "plain", settings, partial(as_float8, block=block, suffix=suffix)
    )
    claims = Capabilities(
        features=frozenset({"moe", "quantized_experts"}), quantizations=frozenset({"fp8"})
    )
    reference = TorchDevice(info=DeviceInfo(index=0, name="codes"), capabilities=claims)
    tokens = []
    for device in (reference, backend().open(0)):
        packed, pack = [], device.ops().pack_quantized_experts

        def note(weights, dtype, pack=pack, packed=packed):
            packed.append(pack(weights, dtype))
            return packed[-1]

        device.ops().pack_quantized_experts = note
        model = load_model(make_worker_config(directory), device)
        tokens.append(run_greedy(model, [list(range(10, 30))], 3, chunk=64)[0][0])
        assert packed
    for layer in packed:
        assert layer.payload.gate_up.is_float8
        assert layer.payload.down.codes.dtype == torch.uint8
    assert tokens[0] == tokens[1]
