"""Weights in 8-bit floats: every flavour of matrix units gives the numbers of the formula."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from paged_runs import make_worker_config, run_greedy
from quantized_checkpoints import as_float8, quantize_checkpoint
from tiny_models import make_tiny_model

from quire.backends.cuda.backend import CudaBackend
from quire.backends.reference import TorchDevice
from quire.backends.xpu.backend import XpuBackend
from quire.conformance.oracles import layers
from quire.core.interface import Capabilities, DeviceInfo
from quire.core.models.loading import load_model
from quire.kernels_triton.float8 import UNITS, float8_linear, pack_float8, round_rows_float8

_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def make_codes(num_outputs, num_inputs):
    codes = torch.randint(0, 256, (num_outputs, num_inputs), dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80
    return codes


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("activations", "group_size"), [("token", 0), ("group", 32), ("token", 32), ("none", 48)]
)
def test_layer_equals_float64_on_every_kind_of_unit(
    launcher, units, dtype, activations, group_size
):
    """A row of zeros, tiles that are not full, biases; the flavour changes no number."""
    torch.manual_seed(0)
    codes, x = make_codes(37, 96), torch.randn(5, 96)
    x[3] = 0
    x, bias = x.to(dtype), torch.randn(37).to(dtype)
    scales = torch.rand(37, 96 // group_size if group_size else 1) * 0.01
    layer = pack_float8(
        codes, scales, bias, group_size=group_size, activations=activations, units=units
    )
    got = float8_linear(launcher, x, layer)
    assert got.dtype == dtype
    arrays = [t.double().numpy() for t in (x, scales, bias)]
    want = layers.float8_linear(
        arrays[0],
        codes.numpy(),
        arrays[1],
        arrays[2],
        group_size=group_size,
        activations=activations,
    )
    rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert np.abs(got.double().numpy() - want).max() < rounding * np.abs(want).max()


@pytest.mark.parametrize("units", UNITS)
def test_rounding_is_to_the_nearest_number_and_ties_to_even(launcher, units):
    """All numbers of e4m3, halfway between any two, and just beside: as torch rounds them."""
    numbers = _NUMBERS[~_NUMBERS.isnan()].unique()
    halves = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([halves * (1 + 2**-20), halves * (1 - 2**-20)])
    row = torch.cat([numbers, halves, beside, torch.tensor([1e-30, -1e-30])])[None]
    got, scale = round_rows_float8(launcher, row, 1, units)
    if units:
        got = got.view(getattr(torch, units)).float()
    want = row.to(torch.float8_e4m3fn).float()
    assert torch.equal(got * scale, want)
    assert not torch.signbit(got[want == 0]).any()


def test_what_is_no_number_stays_none(launcher):
    """A broken activation must not come out as a large one."""
    x = torch.tensor([[1.0, float("nan"), 2.0, 0.0]])
    got, scale = round_rows_float8(launcher, x, 1, "")
    assert (got * scale).isnan().any()


@pytest.mark.parametrize(("backend", "units"), [(CudaBackend, "float8_e4m3fn"), (XpuBackend, "")])
def test_checkpoint_in_8_bit_floats_is_run_by_the_kernel(backend, units, tmp_path):
    """From the files through the loader to the kernel: the tokens are those of the reference."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    encode = partial(as_float8, block=None, suffix="weight_scale")
    (tmp_path / "plain").mkdir()
    quantize_checkpoint(directory, tmp_path / "plain", settings, encode)
    tokens = []
    claims = Capabilities(quantizations=frozenset({"fp8"}))
    reference = TorchDevice(info=DeviceInfo(index=0, name="codes"), capabilities=claims)
    for device in (reference, backend().open(0)):
        packed, pack = [], device.ops().pack_quantized_linear

        def note(weight, bias, dtype, pack=pack, packed=packed):
            packed.append(pack(weight, bias, dtype))
            return packed[-1]

        device.ops().pack_quantized_linear = note
        model = load_model(make_worker_config(directory), device)
        tokens.append(run_greedy(model, [list(range(10, 30))], 3, chunk=64)[0][0])
        assert packed
    assert {layer.payload.units for layer in packed} == {units}
    assert tokens[0] == tokens[1]
