"""Extension `mla`: attention over a latent cache: the values are the first features of the keys."""

from __future__ import annotations

from dataclasses import replace

import torch

from quire.conformance.cases import check, dtypes, needs_claim, product
from quire.conformance.checks import l1_ops
from quire.conformance.paged import Paged, PagedRun, Ranges, make_paged
from quire.conformance.trial import Trial
from quire.core.interface import AttentionSpec

_NEEDS = needs_claim("attention_kinds", "mla")

_SHAPES = {
    "r32-p16": {"shape": (4, 32, 16)},
    "r64-p32": {"shape": (16, 64, 32)},
    "r40-p8": {"shape": (2, 40, 8)},
}
"""(query heads, latent rank, rotated features)."""
_HINT = (
    "The one key head is shared by all query heads; its first v_head_size features are the values, "
    "and all of it is multiplied by the query."
)


def _paged(trial: Trial, shape: tuple[int, int, int], dtype: str, lengths: list[int]) -> Paged:
    heads, rank, rotated = shape
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=1,
        head_size=rank + rotated,
        v_head_size=rank,
        scale=(rank + rotated) ** -0.5,
        dtype=dtype,
        cache_dtype=dtype,
        block_size=trial.block_size,
        kind="mla",
    )
    paged = make_paged(trial, spec, lengths)
    return replace(paged, v=[k[..., :rank].contiguous() for k in paged.k])


@check(level=1, op="paged_attention", over=product(_SHAPES, dtypes()), on_torch=True, needs=_NEEDS)
def mixed_batch(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """Chunks of prompts and decoded tokens in one step, from the latent alone."""
    run = PagedRun(trial, _paged(trial, shape, dtype, [49, 33, 17, 70]))
    steps: tuple[Ranges, ...] = (
        ((0, 48), (0, 20), (0, 16), (0, 40)),
        ((48, 49), (20, 32), (16, 17), (40, 69)),
        ((0, 0), (32, 33), (0, 0), (69, 70)),
    )
    for ranges in steps:
        run.measure(ranges, run.step(ranges), "latent attention", _HINT)


@check(level=1, op="paged_attention", over=product(_SHAPES, dtypes()), on_torch=True, needs=_NEEDS)
def reads_no_values(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """What is passed as values changes nothing: the cache has them already."""
    paged = _paged(trial, shape, dtype, [40])
    poisoned = replace(paged, v=[torch.full_like(v, float("nan")) for v in paged.v])
    run = PagedRun(trial, poisoned)
    out = run.step([(0, 40)])
    PagedRun(trial, paged).measure([(0, 40)], out, "latent attention with NaN as values", _HINT)


@check(level=1, op="paged_attention", over=product(_SHAPES, dtypes()), on_torch=True, needs=_NEEDS)
def keeps_the_latent_alone(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """A block holds head_size numbers for each token, and blocks move whole."""
    paged = _paged(trial, shape, dtype, [45])
    run = PagedRun(trial, paged)
    run.step([(0, 45)])
    layout = run.attention.cache_layout()
    size = paged.spec.block_size * paged.spec.head_size * getattr(torch, dtype).itemsize
    trial.require(
        layout.bytes_per_block < 2 * size,
        f"a block takes {layout.bytes_per_block} bytes; the latent of {paged.spec.block_size} "
        f"tokens takes {size}: the cache must not hold keys or values of every head",
    )
    exported = run.attention.export_blocks(run.cache, paged.tables[0][:2])
    wanted = (2, paged.spec.block_size, 1, paged.spec.head_size)
    trial.require(
        tuple(exported.shape) == wanted,
        f"export_blocks gave shape {tuple(exported.shape)}; the canonical layout is {wanted}",
    )
    kept = exported.flatten(0, 1)[: 2 * paged.spec.block_size].to(paged.k[0].dtype)
    trial.require(
        torch.equal(kept, paged.k[0][: len(kept)]),
        "export_blocks does not give the keys that were written, in the order of their tokens",
    )


@check(
    level=1,
    op="paged_attention",
    over=product(_SHAPES, dtypes()),
    on_torch=True,
    needs=needs_claim("features", "cache_rows"),
)
def rows_without_attention(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """Keys that are written apart from attention count in later steps, and can be read back."""
    paged = _paged(trial, shape, dtype, [49, 33, 70])
    run = PagedRun(trial, paged)
    ends = (48, 17, 40)
    slots = run.write([(0, end) for end in ends])
    wanted = torch.cat([k[:end] for k, end in zip(paged.k, ends, strict=True)])
    order = torch.from_numpy(trial.rng.permutation(len(slots)))
    trial.require(
        torch.equal(run.read_keys([slots[i] for i in order]), wanted[order]),
        "read_keys does not give the keys that were written to these slots, in the order asked",
    )
    nobody = run.attention.export_blocks(run.cache, [0, paged.num_blocks - 1])
    trial.require(
        bool(nobody.isnan().all()),
        "write changed slots that were not in slot_mapping: blocks of nobody hold numbers now",
    )
    ranges = [(end, len(k)) for k, end in zip(paged.k, ends, strict=True)]
    run.measure(ranges, run.step(ranges), "latent attention after rows were written", _HINT)


@check(level=1, op="", over=l1_ops.numeric_cases("mla"), needs=_NEEDS)
def numerics(trial: Trial, *, op: str, variant: str, dtype: str, scale: str) -> None:
    """Projections of single heads are the formula's, as near as honest rounding allows."""
    l1_ops.numerics(trial, op=op, variant=variant, dtype=dtype, scale=scale)


@check(level=1, op="", over=l1_ops.op_cases("mla"), needs=_NEEDS)
def purity(trial: Trial, *, op: str, dtype: str) -> None:
    """Nothing but the result is written."""
    l1_ops.purity(trial, op=op, dtype=dtype)
