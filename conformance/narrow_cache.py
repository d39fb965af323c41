"""Checks of attention over a cache that is narrower than its inputs, for several extensions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.conformance.paged import Paged, PagedRun, Ranges, make_paged
from quire.conformance.trial import Trial
from quire.core.interface import AttentionSpec

Array = npt.NDArray[Any]
_HINT = (
    "Attention sees what the cache stores, this step's tokens included: round to nearest, "
    "saturate, and read back with the token's own scale."
)
_STEPS: tuple[Ranges, ...] = (
    ((0, 48), (0, 20), (0, 16)),
    ((48, 49), (20, 33), (16, 17)),
)


def stored(x: Tensor, cache_dtype: str) -> Tensor:
    """What comes back of x [n, H, D] from a cache, by `AttentionSpec.cache_dtype`."""
    if cache_dtype == "int8":
        # In float32, as the formula says: the half of a step falls the same way everywhere.
        wide = x.float().numpy()
        scale = np.abs(wide).max(-1, keepdims=True) / np.float32(127)
        steps = np.rint(wide / np.where(scale > 0, scale, np.float32(1))).clip(-127, 127)
        return torch.from_numpy(steps.astype(np.float64) * scale.astype(np.float64))
    dtype = getattr(torch, cache_dtype)
    limit = torch.finfo(dtype).max
    return x.double().clamp(-limit, limit).to(dtype).double()


def mixed_batch(trial: Trial, cache_dtype: str, dtype: str, *, scale: float = 1.0) -> None:
    """Chunks of prompts and decoded tokens, against the oracle over what was stored."""
    paged, truth = _problem(trial, cache_dtype, dtype, scale)
    run, judge = PagedRun(trial, paged), PagedRun(trial, truth)
    for ranges in _STEPS:
        judge.measure(ranges, run.step(ranges), f"attention over {cache_dtype}", _HINT)


def moves_blocks(trial: Trial, cache_dtype: str, dtype: str) -> None:
    """Blocks go out and come back with every number as it was."""
    paged, truth = _problem(trial, cache_dtype, dtype, 1.0)
    run, other = PagedRun(trial, paged), PagedRun(trial, paged)
    run.step([(0, 48), (0, 20), (0, 16)])
    blocks = paged.tables[0]
    exported = run.attention.export_blocks(run.cache, blocks)
    size = paged.spec.head_size
    keys = exported.flatten(0, 1)[:48, :, :size].double()
    worst = float((keys - truth.k[0][:48].double()).abs().max())
    trial.require(
        worst <= 1e-6 * float(truth.k[0].abs().max()),
        f"export_blocks is off by {worst:.3g} from what the cache stores in {cache_dtype}",
    )
    other.attention.import_blocks(other.cache, blocks, exported)
    again = other.attention.export_blocks(other.cache, blocks).flatten(0, 1)[:48]
    written = exported.flatten(0, 1)[:48]
    trial.require(
        torch.allclose(again, written, rtol=1e-6, atol=0),
        f"blocks in {cache_dtype} that were exported and imported are not what they were",
    )


def _problem(trial: Trial, cache_dtype: str, dtype: str, scale: float) -> tuple[Paged, Paged]:
    """Requests, and the same with keys and values as a cache gives them back."""
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_size=trial.head_size,
        v_head_size=trial.head_size,
        scale=trial.head_size**-0.5 / scale,
        dtype=dtype,
        cache_dtype=cache_dtype,
        block_size=trial.block_size,
    )
    paged = make_paged(trial, spec, (49, 33, 17))
    paged = replace(paged, k=[k * scale for k in paged.k], v=[v * scale for v in paged.v])
    kept = replace(
        paged,
        k=[stored(k, cache_dtype) for k in paged.k],
        v=[stored(v, cache_dtype) for v in paged.v],
    )
    return paged, kept
