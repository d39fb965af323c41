"""An accelerator's other kernels as fractions of its roofline: rotation, codes, experts, scans.

Decoded batches are held against the copy bandwidth: weights, caches and states are read once.
Prompts are held against the matrix rate of bfloat16, also where the numbers are narrower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.benchmarks.accelerator_attention import paged_work
from quire.benchmarks.accelerator_kernels import Ceiling, Sizes, by_bytes, by_flops, seconds_of
from quire.benchmarks.recording import Measurement
from quire.core.interface import (
    AttentionSpec,
    Device,
    ExpertWeights,
    PackedExperts,
    PackedLinear,
    QuantizedExperts,
    QuantizedWeight,
    Sequences,
)

_DTYPE = torch.bfloat16
_FEW = 16
"""Rows of a decoded batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What no other kernel has."""

    group: int
    """Inputs that share a scale."""
    experts: tuple[int, int, int, int]
    """Experts, hidden size, inner size, how many a token chooses."""
    latent: tuple[int, int, int]
    """Heads, rank, rotated features."""
    states: tuple[int, int, int]
    """Heads, channels of a head, length of a state."""


FULL_SHAPES = Shapes(
    group=128, experts=(64, 2048, 1408, 6), latent=(16, 512, 64), states=(64, 64, 128)
)
DRY_SHAPES = Shapes(group=32, experts=(4, 64, 32, 2), latent=(4, 32, 8), states=(2, 16, 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extensions:
    """Makes the work of each kernel on one device, measures it and forgets its tensors."""

    device: Device
    sizes: Sizes
    shapes: Shapes
    ceiling: Ceiling

    def kernels(self) -> Iterator[tuple[str, Callable[[], list[Measurement]]]]:
        """Names, and what measures."""
        yield "rotary", self.rotary
        yield "logprobs", self.logprobs
        yield "copies of blocks", self.copies
        yield "linear layers of codes", self.codes
        yield "experts", self.experts
        yield "latent attention", self.latent
        yield "scans", self.scans

    def rotary(self) -> list[Measurement]:
        """Queries and keys of a prompt, in place."""
        num_heads, num_kv_heads, size = self.sizes.heads
        q, k = (self._draw(self.sizes.tokens, heads, size) for heads in (num_heads, num_kv_heads))
        cos, sin = (self._draw(self.sizes.tokens, size // 2).float() for _ in range(2))
        ops = self.device.ops()
        moved = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
        return [
            self._bytes(
                "rotary",
                ops.provider("rotary"),
                lambda: ops.rotary(q, k, cos, sin, is_interleaved=False),
                moved,
            )
        ]

    def logprobs(self) -> list[Measurement]:
        """Of the tokens of a decoded batch, with the five best."""
        rows, ops = self.sizes.decode_requests, self.device.ops()
        logits = self._draw(rows, self.sizes.vocab).float()
        chosen = torch.zeros(rows, dtype=torch.int64, device=self.device.torch_device)
        return [
            self._bytes(
                "logprobs",
                ops.provider("logprobs"),
                lambda: ops.logprobs(logits, chosen, 5),
                logits.nbytes,
            )
        ]

    def copies(self) -> list[Measurement]:
        """Blocks of a cache to others."""
        num_heads, num_kv_heads, size = self.sizes.heads
        spec = _spec(num_heads, num_kv_heads, size, size)
        attention, count = self.device.attention(spec), self.sizes.decode_context
        cache = attention.allocate(2 * count)
        source, target = range(count), range(count, 2 * count)
        moved = sum(tensor.nbytes for tensor in cache.tensors.values())
        return [
            self._bytes(
                f"copies of {count} blocks",
                attention.provider(),
                lambda: attention.copy_blocks(cache, source, target),
                moved,
            )
        ]

    def codes(self) -> list[Measurement]:
        """Square layers in 8 and 4 bits and in 8-bit floats, beside the same in bfloat16."""
        n, ops, measured = self.sizes.hidden, self.device.ops(), []
        plain = ops.pack_linear(self._draw(n, n), None)
        layers: dict[str, tuple[PackedLinear, int]] = {"bfloat16": (plain, 2 * n * n)}
        for name, weight in self._quantized().items():
            packed = ops.pack_quantized_linear(weight, None, "bfloat16")
            layers[name] = (packed, weight.codes.nbytes + weight.scales.nbytes)
        few, many = self._draw(_FEW, n), self._draw(self.sizes.tokens, n)
        for name, (packed, moved) in layers.items():
            subject = "torch" if name == "bfloat16" else "quire"
            work = self._call(ops.linear, few, packed)
            measured.append(self._bytes(f"linear in {name}, {_FEW} rows", subject, work, moved))
            seconds = self._seconds(self._call(ops.linear, many, packed))
            flops, label = 2.0 * len(many) * n * n, f"linear in {name}, {len(many)} rows"
            measured.append(by_flops(label, subject, seconds, flops, self.ceiling))
        return measured

    def _quantized(self) -> dict[str, QuantizedWeight]:
        """The same number of weights in each form that the device claims."""
        n = self.sizes.hidden
        return {name: self._weight(name, n, n) for name in self._forms()}

    def _forms(self) -> dict[str, dict[str, Any]]:
        group, claimed = self.shapes.group, self.device.capabilities.quantizations
        made: dict[str, dict[str, Any]] = {
            "int8": {"bits": 8, "group_size": 0, "activations": "token"},
            "int4": {"bits": 4, "group_size": group},
            "fp8": {
                "bits": 8,
                "group_size": group,
                "activations": "group",
                "encoding": "float8_e4m3fn",
            },
        }
        return {name: form for name, form in made.items() if name in claimed}

    def _weight(self, name: str, num_outputs: int, num_inputs: int) -> QuantizedWeight:
        """Of random codes; those below 0x70 are numbers in every form."""
        form, where = self._forms()[name], self.device.torch_device
        columns = num_inputs * form["bits"] // 8
        codes = torch.randint(0, 0x70, (num_outputs, columns), dtype=torch.uint8, device=where)
        groups = num_inputs // (form["group_size"] or num_inputs)
        scales = torch.full((num_outputs, groups), 1e-3, device=where)
        return QuantizedWeight(num_inputs=num_inputs, codes=codes, scales=scales, **form)

    def experts(self) -> list[Measurement]:
        """A decoded batch reads the experts that it chose; a prompt multiplies by all of them."""
        count, hidden, inner, chosen = self.shapes.experts
        forms, measured = self._packed_experts(), []
        for rows, is_few in ((_FEW, True), (self.sizes.tokens, False)):
            x = self._draw(rows, hidden)
            scores, ids = self._draw(rows, count).float().topk(chosen, dim=1)
            shares, ids = scores.softmax(1).contiguous(), ids.contiguous()
            for name, (packed, num_bytes) in forms.items():
                call = self._call(self.device.ops().experts, x, packed, shares, ids)
                seconds, label = self._seconds(call), f"experts{name}, {rows} tokens"
                if is_few:
                    moved = num_bytes * len(ids.unique()) // count
                    measured.append(by_bytes(label, "quire", seconds, moved, self.ceiling))
                else:
                    flops = 6.0 * rows * chosen * inner * hidden
                    measured.append(by_flops(label, "quire", seconds, flops, self.ceiling))
        return measured

    def _packed_experts(self) -> dict[str, tuple[PackedExperts, int]]:
        """All experts in bfloat16 and in each form of codes, and the bytes of their weights."""
        count, hidden, inner, _ = self.shapes.experts
        ops, claims = self.device.ops(), self.device.capabilities
        wide = ExpertWeights(
            gate_up=self._draw(count, 2 * inner, hidden), down=self._draw(count, hidden, inner)
        )
        forms = {"": (ops.pack_experts(wide), wide.gate_up.nbytes + wide.down.nbytes)}
        if "quantized_experts" not in claims.features:
            return forms
        for name in self._forms():
            up, down = (
                [self._weight(name, n, k) for _ in range(count)]
                for n, k in ((2 * inner, hidden), (hidden, inner))
            )
            size = sum(w.codes.nbytes + w.scales.nbytes for w in (*up, *down))
            codes = QuantizedExperts(gate_up=up, down=down)
            forms[f" in {name}"] = (ops.pack_quantized_experts(codes, "bfloat16"), size)
        return forms

    def latent(self) -> list[Measurement]:
        """Decoding over a latent cache, which is read once for all heads."""
        heads, rank, rotated = self.shapes.latent
        requests, context = self.sizes.decode_requests, self.sizes.decode_context
        spec = _spec(heads, 1, rank + rotated, rank, kind="mla")
        work = paged_work(self.device, spec, [1] * requests, context)
        moved = 2 * requests * context * (rank + rotated)
        return [self._bytes(f"latent decode, {requests} of {context}", "quire", work, moved)]

    def scans(self) -> list[Measurement]:
        """A token for each of many sequences: their states are read and written."""
        requests, where = self.sizes.decode_requests, self.device.torch_device
        num_heads, channels, length = self.shapes.states
        width, ops = num_heads * channels, self.device.ops()
        starts = list(range(requests + 1))
        sequences = Sequences(
            starts=torch.tensor(starts, dtype=torch.int32, device=where), starts_host=starts
        )
        x, dt = self._draw(requests, width), torch.ones(requests, width, device=where)
        heads, head_dt = x.view(requests, num_heads, channels), dt[:, :num_heads].contiguous()
        b = self._draw(requests, 1, length)
        narrow = self._draw(requests, 16)
        a, head_a = -torch.ones(width, 16, device=where), -torch.ones(num_heads, device=where)
        wide = torch.zeros(requests, width, 16, device=where)
        square = torch.zeros(requests, num_heads, channels, length, device=where)
        flipped = square.transpose(2, 3).contiguous()
        past = torch.zeros(requests, width, 3, device=where, dtype=_DTYPE)
        kernel = self._draw(width, 4)
        works: dict[str, tuple[Callable[[], Any], int]] = {
            "causal_conv1d": (
                self._call(ops.causal_conv1d, x, kernel, None, past, sequences),
                2 * (past.nbytes + x.nbytes),
            ),
            "selective_scan": (
                self._call(ops.selective_scan, x, dt, a, narrow, narrow, None, wide, sequences),
                2 * wide.nbytes,
            ),
            "ssd_scan": (
                self._call(ops.ssd_scan, heads, head_dt, head_a, b, b, None, square, sequences),
                2 * square.nbytes,
            ),
            "gated_delta_rule": (
                self._call(
                    ops.gated_delta_rule, b, b, heads, -head_dt, head_dt, flipped, sequences
                ),
                2 * flipped.nbytes,
            ),
        }
        return [
            self._bytes(f"{name}, {requests} sequences", ops.provider(name), work, moved)
            for name, (work, moved) in works.items()
        ]

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device.torch_device, dtype=_DTYPE)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return lambda: function(*arguments)

    def _seconds(self, work: Callable[[], Any]) -> tuple[float, ...]:
        return seconds_of(self.device, work, self.sizes.rounds)

    def _bytes(
        self, name: str, subject: str, work: Callable[[], Any], num_bytes: int
    ) -> Measurement:
        return by_bytes(name, subject, self._seconds(work), num_bytes, self.ceiling)


def _spec(
    num_heads: int, num_kv_heads: int, size: int, v_size: int, kind: str = "causal"
) -> AttentionSpec:
    return AttentionSpec(
        kind=kind,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=size,
        v_head_size=v_size,
        scale=size**-0.5,
        dtype="bfloat16",
        cache_dtype="bfloat16",
        block_size=16,
    )
