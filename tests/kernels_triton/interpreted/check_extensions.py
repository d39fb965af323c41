"""Kernels of extensions where the suite does not reach: splits, absent experts, short sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.backends.reference import ReferenceOps
from quire.backends.torch_accelerator.ops import TritonOps
from quire.core.interface import ExpertWeights, Sequences
from quire.kernels_triton.attention import AttentionShape, PagedCache, PagedStep, make_partials
from quire.kernels_triton.cache import write_cache
from quire.kernels_triton.latent import latent_attention
from quire.kernels_triton.launch import DeviceLauncher

SHAPE = AttentionShape(
    num_heads=20, num_kv_heads=1, head_size=40, v_head_size=32, block_size=16, scale=0.2
)


def sliced(table, cut):
    """The table, with rows for latents that multiply so many features at a time."""
    rows = [
        replace(row, constants={**row.constants, "SLICE": cut})
        if row.kernel.startswith("latent")
        else row
        for row in table.entries
    ]
    return replace(table, entries=tuple(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(("splits", "cut"), [(1, 0), (4, 0), (4, 16)])
def test_latent_step_equals_formula_however_contexts_are_split(launcher, splits, cut, dtype):
    """Heads that fill no tile, parts without a token, prompts beside single tokens, scales.

    `cut`: features that are multiplied at a time; 0: all.
    """
    launcher = DeviceLauncher(sliced(launcher.table, cut))
    torch.manual_seed(0)
    mix, width = [(1, 130), (3, 20), (1, 1)], 9
    cache = torch.full((30, 16, 1, 40), 100).to(dtype)
    scale = torch.full((30, 16, 1), float("nan")) if dtype == torch.int8 else None
    table = torch.arange(27, dtype=torch.int32).view(3, width)
    latents = torch.randn(sum(length for _, length in mix), 1, 40)
    slots = [r * width * 16 + t for r, (_, length) in enumerate(mix) for t in range(length)]
    paged = PagedCache(k=cache, v=cache, k_scale=scale, v_scale=scale)
    write_cache(launcher, latents, latents, paged, torch.tensor(slots))
    q = torch.randn(5, 20, 40)
    device = torch.device("cpu")
    partial, partial_log = make_partials(SHAPE, num_requests=3, num_splits=splits, device=device)
    step = PagedStep(
        query_start_loc=torch.tensor([0, 1, 4, 5], dtype=torch.int32),
        seq_lens=torch.tensor([length for _, length in mix], dtype=torch.int32),
        block_table=table,
        num_tokens=5,
        has_decodes=True,
        has_prefills=True,
        num_splits=splits,
        partial=partial,
        partial_log=partial_log,
    )
    out = torch.full((5, 20, 32), float("nan"))
    latent_attention(launcher, SHAPE, step, q, paged, out)
    at, row = 0, 0
    for num_new, length in mix:
        keys = latents[at : at + length, 0].double()
        for t in range(num_new):
            seen = keys[: length - num_new + t + 1]
            want = ((q[row].double() @ seen.T) * 0.2).softmax(-1) @ seen[:, :32]
            limit = 2e-5 if dtype == torch.float32 else 0.1
            assert (out[row] - want).abs().max() < limit
            row += 1
        at += length


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_experts_without_tokens_and_with_all_of_them(launcher, num_tokens):
    """One expert gets every token, most get none; the sums are the reference's."""
    torch.manual_seed(1)
    weights = ExpertWeights(gate_up=torch.randn(9, 48, 20), down=torch.randn(9, 20, 24))
    x, ids = torch.randn(num_tokens, 20), torch.tensor([[8, 3]]).repeat(num_tokens, 1)
    shares = torch.rand(num_tokens, 2)
    ours, plain = TritonOps(launcher), ReferenceOps()
    got = ours.experts(x, ours.pack_experts(weights), shares, ids)
    want = plain.experts(x, plain.pack_experts(weights), shares, ids)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_convolution_keeps_what_a_short_sequence_leaves_of_its_state(launcher, width):
    """Sequences shorter than the window move the state by what they are."""
    torch.manual_seed(2)
    starts = [0, 1, 3, 12]
    sequences = Sequences(starts=torch.tensor(starts, dtype=torch.int32), starts_host=starts)
    x, weight, states = torch.randn(12, 5), torch.randn(5, width), torch.randn(3, 5, width - 1)
    other = states.clone()
    got = TritonOps(launcher).causal_conv1d(x, weight, None, states, sequences, activation="silu")
    want = ReferenceOps().causal_conv1d(x, weight, None, other, sequences, activation="silu")
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(states, other)
