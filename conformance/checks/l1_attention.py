"""Level 1: attention over a paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quire.conformance.buffers import same_bits
from quire.conformance.cases import check, dtypes, product
from quire.conformance.paged import Paged, PagedRun, Ranges, make_paged
from quire.conformance.trial import Trial
from quire.core.interface import AttentionSpec, Capabilities

_SHAPES: dict[str, dict[str, Any]] = {
    "mha-d64": {"shape": (4, 4, 64)},
    "gqa4-d64": {"shape": (8, 2, 64)},
    "mqa-d32": {"shape": (4, 1, 32)},
    "gqa2-d128": {"shape": (4, 2, 128)},
}
_BLOCKS = {"b16": {"block": 16}, "b32": {"block": 32}}
_ONE = {"gqa2": {"shape": (4, 2, 0)}}
"""Head size 0: `Trial.head_size`."""
_KINDS: dict[str, dict[str, Any]] = {
    "window20": {"claims": {"kind": "sliding_window", "window": 20}},
    "window1": {"claims": {"kind": "sliding_window", "window": 1}},
    "chunked24": {"claims": {"kind": "chunked", "window": 24}},
    "softcap": {"claims": {"soft_cap": 0.8}},
    "sinks": {"claims": {"has_sinks": True}},
    "alibi": {"claims": {"has_alibi": True}},
    "window20-softcap": {"claims": {"kind": "sliding_window", "window": 20, "soft_cap": 0.8}},
}
_FEATURES = {"soft_cap": "soft_cap", "has_sinks": "sinks", "has_alibi": "alibi"}
_LENGTHS = (49, 33, 17, 2, 70)


def _needs(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    """Why a device is excused: its claims about head sizes, blocks, kinds and features."""
    size, block = arguments.get("shape", (4, 2, 0))[2], arguments.get("block")
    asked: Mapping[str, Any] = arguments.get("claims", {})
    if size and claims.head_sizes is not None and size not in claims.head_sizes:
        return f"head size {size} is not among the claimed {claims.head_sizes}"
    if block is not None and block not in claims.block_sizes:
        return f"block size {block} is not among the claimed {claims.block_sizes}"
    if arguments.get("dtype") not in (None, *claims.cache_dtypes):
        return f"cache dtype {arguments['dtype']} is not claimed"
    if asked.get("kind", "causal") not in claims.attention_kinds:
        return f"attention kind {asked['kind']!r} is not claimed"
    missing = [
        f for key, f in _FEATURES.items() if key in asked and f not in claims.attention_features
    ]
    return f"attention feature {missing[0]!r} is not claimed" if missing else ""


def _spec(trial: Trial, shape: tuple[int, int, int], dtype: str, **more: Any) -> AttentionSpec:
    num_heads, num_kv_heads, size = *shape[:2], shape[2] or trial.head_size
    block = more.pop("block", None) or trial.block_size
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=size,
        v_head_size=size,
        scale=size**-0.5,
        dtype=dtype,
        cache_dtype=dtype,
        block_size=block,
        **more,
    )


def _mixed(run: PagedRun, *, measured: str = "", hint: str = "") -> list[list[Tensor]]:
    """Three steps in which chunks of prompts and single tokens stand side by side."""
    steps: tuple[Ranges, ...] = (
        ((0, 48), (0, 20), (0, 0), (0, 1), (0, 40)),
        ((48, 49), (20, 32), (0, 16), (1, 2), (40, 69)),
        ((0, 0), (32, 33), (16, 17), (0, 0), (69, 70)),
    )
    outputs = []
    for number, ranges in enumerate(steps):
        outputs.append(run.step(ranges))
        if measured:
            run.measure(ranges, outputs[-1], f"{measured}, step {number + 1}", hint)
    return outputs


@check(level=1, op="paged_attention", over=product(_SHAPES, _BLOCKS, dtypes()), needs=_needs)
def prefill(trial: Trial, *, shape: tuple[int, int, int], block: int, dtype: str) -> None:
    """A whole prompt at once, whose length is no multiple of anything."""
    run = PagedRun(trial, make_paged(trial, _spec(trial, shape, dtype, block=block), [45]))
    run.measure([(0, 45)], run.step([(0, 45)]), "a prompt of 45 tokens", "Is the mask causal?")


@check(level=1, op="paged_attention", over=product(_SHAPES, _BLOCKS, dtypes()), needs=_needs)
def decode(trial: Trial, *, shape: tuple[int, int, int], block: int, dtype: str) -> None:
    """One new token each, on contexts around the edges of a block."""
    lengths = (2, block, block + 1, 2 * block + 7)
    run = PagedRun(trial, make_paged(trial, _spec(trial, shape, dtype, block=block), lengths))
    run.step([(0, n - 1) for n in lengths])
    last = [(n - 1, n) for n in lengths]
    hint = (
        "A decoded token sees all tokens before it and itself, through its own block table, with "
        "query head h reading key head h // (heads / key heads), accumulated in float32."
    )
    run.measure(last, run.step(last), "decoding", hint)


@check(level=1, op="paged_attention", over=product(_SHAPES, _BLOCKS, dtypes()), needs=_needs)
def mixed_batch(trial: Trial, *, shape: tuple[int, int, int], block: int, dtype: str) -> None:
    """Chunks of prompts and decoded tokens of several requests in one step."""
    run = PagedRun(trial, make_paged(trial, _spec(trial, shape, dtype, block=block), _LENGTHS))
    _mixed(run, measured="a mixed batch", hint="Do rows find their own request?")


@check(level=1, op="paged_attention", over=product(_KINDS, dtypes()), needs=_needs)
def kinds(trial: Trial, *, claims: Mapping[str, Any], dtype: str) -> None:
    """Windows, chunks, soft caps, sinks and ALiBi, each as `AttentionSpec` says."""
    run = PagedRun(trial, make_paged(trial, _spec(trial, (4, 2, 0), dtype, **claims), _LENGTHS))
    wanted = ", ".join(f"{key}={value}" for key, value in claims.items())
    hint = (
        "With a window position p sees j where p - window < j <= p, and blocks wholly before it "
        "may belong to others; a cap is cap * tanh(score / cap) after the scale."
    )
    _mixed(run, measured=f"attention with {wanted}", hint=hint)


@check(
    level=1,
    op="paged_attention",
    over=product({f"at{n}": {"at": n} for n in (1, 15, 16, 17, 31, 44)}, dtypes()),
    needs=_needs,
)
def split_prefill(trial: Trial, *, at: int, dtype: str) -> None:
    """A prompt cut anywhere gives what the whole prompt gives."""
    run = PagedRun(trial, make_paged(trial, _spec(trial, (4, 2, 0), dtype), [45]))
    run.step([(0, at)])
    hint = "Does the second part see what the first wrote to the cache?"
    run.measure([(at, 45)], run.step([(at, 45)]), f"a prompt cut after {at} tokens", hint)


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def unused_slots(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """Whatever lies in slots that hold no token of a request, NaN included, changes nothing."""
    paged = make_paged(trial, _spec(trial, shape, dtype), _LENGTHS)
    clean = _mixed(PagedRun(trial, paged, poison=0.0))
    poisoned = _mixed(PagedRun(trial, paged, poison=float("nan")))
    for before, after in zip(_flat(clean), _flat(poisoned), strict=True):
        trial.require(
            not after.isnan().any(),
            "NaN in unused slots of the cache reached the output: blocks or slots past a request's "
            "last token are read; multiplying them by 0 does not help, 0 * NaN is NaN",
        )
        _hold_same(
            trial, before, after, "what lies in unused slots of the cache changed the output"
        )


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def block_renumbering(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """In which physical blocks a request lies does not matter."""
    paged = make_paged(trial, _spec(trial, shape, dtype), _LENGTHS)
    first = _mixed(PagedRun(trial, paged))
    second = _mixed(PagedRun(trial, paged.renumbered(trial.rng)))
    for before, after in zip(_flat(first), _flat(second), strict=True):
        message = "other physical blocks gave another output; is the block table followed?"
        _hold_same(trial, before, after, message)


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def causality(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """Changing later tokens of a prompt changes nothing before them."""
    paged = make_paged(trial, _spec(trial, shape, dtype), [45])
    other = make_paged(trial, paged.spec, [45])
    changed = replace(
        paged,
        q=[torch.cat((paged.q[0][:30], other.q[0][30:]))],
        k=[torch.cat((paged.k[0][:30], other.k[0][30:]))],
        v=[torch.cat((paged.v[0][:30], other.v[0][30:]))],
    )
    first = PagedRun(trial, paged).step([(0, 45)])[0]
    second = PagedRun(trial, changed).step([(0, 45)])[0]
    message = (
        "changing tokens 30 to 44 changed the output of tokens before them: the future is seen"
    )
    _hold_same(trial, first[:30], second[:30], message)


@check(
    level=1,
    op="paged_attention",
    over=product(
        {
            f"{where}-{n}": {"where": where, "length": n}
            for n in (257, 2048)
            for where in ("first", "middle", "last")
        },
        dtypes(),
    ),
    needs=_needs,
)
def needle(trial: Trial, *, where: str, length: int, dtype: str) -> None:
    """One token alone has a value; whoever drops it from a long context answers zero."""
    paged = make_paged(trial, _spec(trial, (2, 1, 0), dtype), [length])
    at = {"first": 0, "middle": length // 2, "last": length - 1}[where]
    values = torch.zeros_like(paged.v[0])
    values[at] = paged.v[0][at] * 8
    run = PagedRun(trial, replace(paged, v=[values]))
    run.step([(0, length - 1)])
    last = [(length - 1, length)]
    outputs = run.step(last)
    trial.require(
        bool((outputs[0] != 0).any()),
        f"the {where} of {length} tokens is the only one with a value and was not attended: the "
        "output is zero",
    )
    run.measure(last, outputs, f"one value among {length} tokens, the {where}")


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def gqa_equals_mha(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """Grouped heads give what repeated key heads give."""
    grouped = make_paged(trial, _spec(trial, shape, dtype), [45, 20])
    times = shape[0] // shape[1]
    repeated = Paged(
        spec=_spec(trial, (shape[0], shape[0], shape[2]), dtype),
        q=grouped.q,
        k=[k.repeat_interleave(times, dim=1) for k in grouped.k],
        v=[v.repeat_interleave(times, dim=1) for v in grouped.v],
        extras={},
        tables=grouped.tables,
        num_blocks=grouped.num_blocks,
    )
    ranges: Ranges = [(0, 45), (0, 20)]
    hint = "Query head h reads key head h // (heads / key heads)."
    for paged, name in ((grouped, "grouped heads"), (repeated, "repeated key heads")):
        run = PagedRun(trial, paged)
        run.measure(ranges, run.step(ranges), name, hint)


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def alone_equals_batch(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """A request alone gets what it gets among others: bit for bit where that is claimed."""
    paged = make_paged(trial, _spec(trial, shape, dtype), [30, 17, 64])
    prompts, last = [(0, 29), (0, 16), (0, 63)], [(29, 30), (16, 17), (63, 64)]
    run = PagedRun(trial, paged)
    run.step(prompts)
    together = run.step(last)
    is_claimed = trial.capabilities.determinism in {"batch_invariant", "invariant"}
    for index in range(3):
        single = PagedRun(trial, paged.picked(index))
        single.step([prompts[index]])
        alone = single.step([last[index]])
        single.measure([last[index]], alone, "a request alone")
        trial.require(
            not is_claimed or same_bits(alone[0], together[index]),
            f"request {index} has other bits alone than in a batch of 3; the device claims "
            f"determinism {trial.capabilities.determinism!r}",
        )
    run.measure(last, together, "requests together")


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def new_data(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """The same shapes with new data give the new answer."""
    lengths = [33, 18]
    ranges: Ranges = [(0, 33), (0, 18)]
    for number in range(3):
        run = PagedRun(trial, make_paged(trial, _spec(trial, shape, dtype), lengths))
        what = (
            f"call number {number + 1} with the same shapes and new data; is a result, a plan or a "
            "graph of an earlier call used again?"
        )
        run.measure(ranges, run.step(ranges), what)


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def repeats(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """The same work twice: the same bits where determinism is claimed, else within the rule."""
    paged = make_paged(trial, _spec(trial, shape, dtype), _LENGTHS)
    first = _mixed(PagedRun(trial, paged), measured="a first run")
    second = _mixed(PagedRun(trial, paged), measured="a second run")
    for before, after in zip(_flat(first), _flat(second), strict=True):
        _hold_same(trial, before, after, "the same work gave other bits the second time")


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def cache_writes(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """A step writes its own slots, bit for bit, and no other."""
    paged = make_paged(trial, _spec(trial, shape, dtype), [20, 35])
    run = PagedRun(trial, paged)
    every = list(range(paged.num_blocks))
    steps: tuple[Ranges, ...] = (((0, 20), (0, 0)), ((0, 0), (0, 35)))
    for owner, ranges in enumerate(steps):
        before = run.attention.export_blocks(run.cache, every)
        run.step(ranges)
        after = run.attention.export_blocks(run.cache, every)
        others = [block for block in every if block not in paged.tables[owner]]
        trial.require(
            same_bits(before[others], after[others]),
            "a step changed blocks of the cache that belong to another request or to nobody",
        )
    written = after[paged.tables[1]].flatten(0, 1)[:35]
    wanted = torch.cat((paged.k[1], paged.v[1]), dim=-1).float()
    trial.require(
        same_bits(written, wanted),
        "keys and values in the cache are not those that forward was given: slot_mapping says "
        "where each new token goes, and the canonical layout has keys before values",
    )


@check(level=1, op="paged_attention", over=product(_ONE, dtypes()), needs=_needs)
def block_moves(trial: Trial, *, shape: tuple[int, int, int], dtype: str) -> None:
    """Blocks are copied, exported and imported bit for bit."""
    paged = make_paged(trial, _spec(trial, shape, dtype), [3 * trial.block_size])
    run = PagedRun(trial, paged)
    run.step([(0, 3 * trial.block_size)])
    source = paged.tables[0]
    free = [b for b in range(paged.num_blocks) if b not in source]
    exported = run.attention.export_blocks(run.cache, source)
    run.attention.copy_blocks(run.cache, source[:2], free[:2])
    run.attention.import_blocks(run.cache, free[2:3], exported[2:])
    trial.device.synchronize()
    again = run.attention.export_blocks(run.cache, [*free[:3], *source])
    trial.require(exported.device.type == "cpu", "export_blocks must return a host tensor")
    trial.require(same_bits(again[:2], exported[:2]), "copy_blocks did not copy bit for bit")
    trial.require(same_bits(again[2:3], exported[2:]), "what was exported does not import again")
    trial.require(same_bits(again[3:], exported), "moving blocks changed those that were read")


def _flat(outputs: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for step in outputs for tensor in step]


def _hold_same(trial: Trial, before: Tensor, after: Tensor, message: str) -> None:
    """Bit for bit where determinism is claimed, else within a wide multiple of rounding."""
    if trial.capabilities.determinism != "none":
        trial.require(same_bits(before, after), message)
    elif before.numel():
        size = before.float().abs().max().item()
        limit = 16 * torch.finfo(before.dtype).eps * size
        off = (before.float() - after.float()).abs().max().item()
        trial.require(off <= limit, f"{message} (off by {off:.3g}, allowed {limit:.3g})")
