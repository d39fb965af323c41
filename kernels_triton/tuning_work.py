"""What the rows of a launch table are timed on: the shapes of today's models, or tiny ones.

Tensors are made when a row's turn comes, so that no more than one row's lie on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quire.kernels_triton import elementwise, experts, float8, norms, quantized
from quire.kernels_triton.attention import (
    AttentionShape,
    PagedCache,
    PagedStep,
    choose_splits,
    make_partials,
    paged_attention,
)
from quire.kernels_triton.latent import latent_attention, latent_tiles
from quire.kernels_triton.launch import DeviceLauncher, ceil_div, power_of_two

Run = Callable[[DeviceLauncher], None]
_PAGE = 16
_LATENT, _ROTATED = 512, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one row of a table is timed on."""

    label: str
    kernel: str
    facts: Mapping[str, Any]
    """With which the row is found."""
    make: Callable[[], Sequence[Run]]
    """Makes the tensors, and one call of the host function a shape."""


def works(device: str, *, is_dry: bool, fp8_units: str = "") -> Iterator[Work]:
    """All of them, in the order in which they are tuned. A dry run's are tiny and in float32.

    `fp8_units`: the 8-bit float that the device's matrix units multiply; empty: none.
    """
    maker = _Maker(device, torch.float32 if is_dry else torch.bfloat16)
    yield from _attention_works(maker, is_dry=is_dry)
    yield from _latent_works(maker, is_dry=is_dry)
    yield from _expert_works(maker, is_dry=is_dry)
    yield from _layer_works(maker, is_dry=is_dry)
    yield from _float8_works(maker, fp8_units, is_dry=is_dry)


def _attention_works(maker: _Maker, *, is_dry: bool) -> Iterator[Work]:
    """Decoding reads long contexts, alone and in a batch; prompts are long, or short and many."""
    alone, batch = ((1, 40), (3, 20)) if is_dry else ((1, 32768), (32, 4096))
    prompt, prompts = ((1, 20), (2, 9)) if is_dry else ((1, 8192), (8, 512))
    for size in (16,) if is_dry else (128, 256):
        shape = _heads(4, 2, size) if is_dry else _heads(32, 8, size)
        facts = {"head_size": size, "item_size": maker.item_size}
        yield Work(
            label=f"decode, heads of {size}",
            kernel="decode",
            facts=facts,
            make=partial(_each, maker.decode, (shape, *alone), (shape, *batch)),
        )
        yield Work(
            label=f"prefill, heads of {size}",
            kernel="prefill",
            facts=facts,
            make=partial(_each, maker.prefill, (shape, *prompt), (shape, *prompts)),
        )
    shape = _heads(4, 2, 16) if is_dry else _heads(32, 8, 128)
    yield Work(
        label="splits of decoded contexts",
        kernel="splits",
        facts={},
        make=partial(_each, maker.decode, (shape, *alone), (shape, *batch)),
    )


def _latent_works(maker: _Maker, *, is_dry: bool) -> Iterator[Work]:
    rank, rotated, heads = (32, 8, 4) if is_dry else (_LATENT, _ROTATED, 16)
    shape = AttentionShape(
        num_heads=heads,
        num_kv_heads=1,
        head_size=rank + rotated,
        v_head_size=rank,
        block_size=_PAGE,
        scale=0.1,
    )
    facts = {"head_size": rank, "item_size": maker.item_size}
    decodes = ((1, 40), (2, 20)) if is_dry else ((1, 32768), (32, 4096))
    prompts = ((1, 9),) if is_dry else ((1, 2048), (8, 256))
    yield Work(
        label=f"latent decode, rank {rank}",
        kernel="latent_decode",
        facts=facts,
        make=partial(_each, maker.decode, *((shape, *numbers) for numbers in decodes)),
    )
    yield Work(
        label=f"latent prefill, rank {rank}",
        kernel="latent_prefill",
        facts=facts,
        make=partial(_each, maker.prefill, *((shape, *numbers) for numbers in prompts)),
    )


def _expert_works(maker: _Maker, *, is_dry: bool) -> Iterator[Work]:
    """A decoded batch gives an expert a row or none; a prompt gives it tiles."""
    count, hidden, inner = (4, 32, 16) if is_dry else (64, 2048, 1408)
    chosen = 2 if is_dry else 6
    for name, num_tokens in (("few", 2), ("many", 24)) if is_dry else (("few", 16), ("many", 4096)):
        mean = ceil_div(num_tokens * chosen, count)
        facts = {"item_size": maker.item_size, "tile": max(_PAGE, power_of_two(mean))}
        for kernel in ("experts_up", "experts_down"):
            yield Work(
                label=f"{kernel}, {name} tokens",
                kernel=kernel,
                facts=facts,
                make=partial(_each, maker.experts, (num_tokens, count, hidden, inner, chosen)),
            )


def _layer_works(maker: _Maker, *, is_dry: bool) -> Iterator[Work]:
    """Decoded batches and prompts of a layer of 8B parameters."""
    counts = (1, 3) if is_dry else (16, 4096)
    for width in (48,) if is_dry else (1024, 4096, 16384):
        yield Work(
            label=f"rms_norm, width {width}",
            kernel="rms_norm",
            facts={"width": width},
            make=partial(_each, maker.norm, *((n, width) for n in counts)),
        )
    gate, width = (48, 48) if is_dry else (14336, 4096)
    yield Work(
        label=f"gated_activation, width {gate}",
        kernel="gated_activation",
        facts={},
        make=partial(_each, maker.gate, *((n, gate) for n in counts)),
    )
    for n in counts:
        yield Work(
            label=f"quantized_linear, {n} rows",
            kernel="quantized_linear",
            facts={"item_size": maker.item_size, "rows": n},
            make=partial(_each, maker.multiply, *((n, width, bits) for bits in (8, 4))),
        )


def _float8_works(maker: _Maker, units: str, *, is_dry: bool) -> Iterator[Work]:
    """Weights in 8-bit floats, by one scale a row and by one for each group of inputs.

    With units inputs are rounded too; without them they stay as they are. Few rows share a row of
    the table whatever their inputs are, so they are timed together.
    """
    few, many = (1, 20) if is_dry else (16, 4096)
    width, size = (64, 32) if is_dry else (4096, 128)
    kept = [(width, 0, ""), (width, size, "")]
    rounded = [(width, 0, units), (width, size, units)] if units else []
    cases = [("kept", maker.item_size, kept), ("rounded", 1, rounded)]
    if not is_dry:
        few_cases = partial(_each, maker.multiply_float8, *((few, *c) for c in kept + rounded))
        facts = {"item_size": 1 if units else maker.item_size, "rows": few}
        yield Work(
            label=f"float8_linear, {few} rows",
            kernel="float8_linear",
            facts=facts,
            make=few_cases,
        )
    for inputs, item_size, shapes in cases:
        if shapes:
            yield Work(
                label=f"float8_linear, {many} rows, inputs {inputs}",
                kernel="float8_linear",
                facts={"item_size": item_size, "rows": many},
                make=partial(_each, maker.multiply_float8, *((many, *c) for c in shapes)),
            )


def _each(make: Callable[..., Run], *cases: Sequence[Any]) -> list[Run]:
    return [make(*case) for case in cases]


def _heads(num_heads: int, num_kv_heads: int, size: int) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=size,
        v_head_size=size,
        block_size=_PAGE,
        scale=size**-0.5,
    )


class _Maker:
    """Makes tensors and calls on one device, in one dtype."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = torch.device(device), dtype

    @property
    def item_size(self) -> int:
        """Bytes of a number."""
        return self._dtype.itemsize

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype)

    def decode(self, shape: AttentionShape, num_requests: int, context: int) -> Run:
        """One new token a request, behind a context."""
        return self._attend(shape, num_requests, 1, context)

    def prefill(self, shape: AttentionShape, num_requests: int, length: int) -> Run:
        """Whole prompts."""
        return self._attend(shape, num_requests, length, length)

    def _attend(self, shape: AttentionShape, num_requests: int, new: int, context: int) -> Run:
        q = self._draw(num_requests * new, shape.num_heads, shape.head_size)
        out = self._draw(num_requests * new, shape.num_heads, shape.v_head_size)
        width = ceil_div(context, shape.block_size)
        paged = self._cache(shape, num_requests * width)
        order = torch.randperm(num_requests * width, device=self._device, dtype=torch.int32)
        starts = torch.arange(num_requests + 1, device=self._device, dtype=torch.int32) * new
        lengths = torch.full_like(starts[1:], context)
        is_latent = paged.k is paged.v

        def run(launcher: DeviceLauncher) -> None:
            splits = _splits(launcher, shape, num_requests, context) if new == 1 else 1
            parts, parts_log = make_partials(
                shape, num_requests=num_requests, num_splits=splits, device=self._device
            )
            step = PagedStep(
                query_start_loc=starts,
                seq_lens=lengths,
                block_table=order.view(num_requests, width),
                num_tokens=num_requests * new,
                has_decodes=new == 1,
                has_prefills=new > 1,
                num_splits=splits,
                partial=parts,
                partial_log=parts_log,
            )
            attend = latent_attention if is_latent else paged_attention
            attend(launcher, shape, step, q, paged, out)

        return run

    def _cache(self, shape: AttentionShape, num_blocks: int) -> PagedCache:
        place = (num_blocks, shape.block_size, shape.num_kv_heads)
        k = self._draw(*place, shape.head_size)
        is_latent = shape.v_head_size < shape.head_size
        return PagedCache(k=k, v=k if is_latent else self._draw(*place, shape.v_head_size))

    def experts(self, num_tokens: int, count: int, hidden: int, inner: int, chosen: int) -> Run:
        """Tokens that choose experts at random."""
        layer = experts.Experts(
            gate_up=self._draw(count, 2 * inner, hidden),
            down=self._draw(count, hidden, inner),
            gate_up_bias=None,
            down_bias=None,
            activation="silu",
            alpha=1.702,
            limit=7.0,
        )
        x = self._draw(num_tokens, hidden)
        scores = torch.rand(num_tokens, count, device=self._device)
        weights, ids = (t.contiguous() for t in scores.topk(chosen, dim=1))

        def run(launcher: DeviceLauncher) -> None:
            experts.run_experts(launcher, x, layer, weights, ids, weighs_input=False)

        return run

    def norm(self, num_tokens: int, width: int) -> Run:
        """An RMS norm of rows."""
        x, weight = self._draw(num_tokens, width), self._draw(width)
        out = torch.empty_like(x)
        return lambda launcher: norms.rms_norm(launcher, x, weight, 1e-6, out)

    def gate(self, num_tokens: int, width: int) -> Run:
        """The gate of an MLP."""
        gates, out = self._draw(num_tokens, 2 * width), self._draw(num_tokens, width)
        return lambda launcher: elementwise.gated_activation(launcher, gates, "silu", out)

    def multiply(self, num_tokens: int, width: int, bits: int) -> Run:
        """A square layer of `bits`: 8 with rounded inputs, 4 in groups."""
        x = self._draw(num_tokens, width)
        groups = 1 if bits == 8 else ceil_div(width, 128)
        layer = quantized.QuantizedLayer(
            bits=bits,
            group_size=width // groups,
            num_groups=groups,
            num_inputs=width,
            codes=torch.randint(
                0, 256, (width, width * bits // 8), dtype=torch.uint8, device=self._device
            ),
            scales=torch.ones(width, groups, device=self._device, dtype=self._dtype),
            zeros=None,
            bias=None,
            activations="token" if bits == 8 else "none",
        )

        def run(launcher: DeviceLauncher) -> None:
            quantized.quantized_linear(launcher, x, layer)

        return run

    def multiply_float8(self, num_tokens: int, width: int, size: int, units: str) -> Run:
        """A square layer of 8-bit floats, a scale for each `size` inputs, 0: for all of them.

        With `units` inputs are rounded as weights are.
        """
        x = self._draw(num_tokens, width)
        groups = width // size if size else 1
        rounding = "group" if size else "token"
        # Codes below 0x70 are numbers in every flavour.
        codes = torch.randint(0, 0x70, (width, width), dtype=torch.uint8, device=self._device)
        scales = torch.ones(width, groups, device=self._device, dtype=torch.float32)
        layer = float8.pack_float8(
            codes,
            scales,
            None,
            group_size=size,
            activations=rounding if units else "none",
            units=units,
        )

        def run(launcher: DeviceLauncher) -> None:
            float8.float8_linear(launcher, x, layer)

        return run


def _splits(
    launcher: DeviceLauncher, shape: AttentionShape, num_requests: int, context: int
) -> int:
    is_latent = shape.v_head_size < shape.head_size
    return choose_splits(
        launcher,
        num_requests=num_requests,
        num_kv_heads=latent_tiles(launcher, shape) if is_latent else shape.num_kv_heads,
        max_seq_len=context,
    )
