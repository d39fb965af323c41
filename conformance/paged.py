"""Requests whose keys and values lie in pages, for the checks of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.conformance.buffers import check_all, guard, guard_all
from quire.conformance.oracles import attention as oracle
from quire.conformance.trial import Trial
from quire.core.interface import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache

Array = npt.NDArray[Any]
Ranges = Sequence[tuple[int, int]]
"""For each request, the tokens [begin, end) that a step computes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paged:
    """All tokens of some requests, on the host, and the blocks that they own."""

    spec: AttentionSpec
    q: list[Tensor]
    """For each request [n, Hq, D]."""
    k: list[Tensor]
    v: list[Tensor]
    extras: dict[str, Tensor]
    """`sinks` and `alibi_slopes`, where the spec has them."""
    tables: list[list[int]]
    num_blocks: int
    """Block 0 and the last one belong to nobody."""

    def picked(self, index: int) -> Paged:
        """The problem with one of its requests alone."""
        return replace(
            self,
            q=[self.q[index]],
            k=[self.k[index]],
            v=[self.v[index]],
            tables=[self.tables[index]],
        )

    def renumbered(self, rng: np.random.Generator) -> Paged:
        """The same problem in other blocks."""
        order = rng.permutation(np.arange(1, self.num_blocks - 1))
        tables = [[int(order[block - 1]) for block in table] for table in self.tables]
        return replace(self, tables=tables)


def make_paged(trial: Trial, spec: AttentionSpec, lengths: Sequence[int]) -> Paged:
    """Random requests of these lengths, in blocks of a random order."""
    rng, dtype = trial.rng, getattr(torch, spec.dtype)

    def draw(heads: int, size: int) -> list[Tensor]:
        return [torch.from_numpy(rng.standard_normal((n, heads, size))).to(dtype) for n in lengths]

    counts = [math.ceil(n / spec.block_size) for n in lengths]
    num_blocks = sum(counts) + 5
    ids = [int(block) for block in rng.permutation(np.arange(1, num_blocks - 1))]
    extras = {}
    if spec.has_sinks:
        extras["sinks"] = torch.from_numpy(rng.standard_normal(spec.num_heads)).float()
    if spec.has_alibi:
        extras["alibi_slopes"] = torch.from_numpy(rng.uniform(0.05, 0.5, spec.num_heads)).float()
    return Paged(
        spec=spec,
        q=draw(spec.num_heads, spec.head_size),
        k=draw(spec.num_kv_heads, spec.head_size),
        v=draw(spec.num_kv_heads, spec.v_head_size),
        extras=extras,
        tables=[[ids.pop() for _ in range(count)] for count in counts],
        num_blocks=num_blocks,
    )


class PagedRun:
    """One problem on the device: its cache, and the steps that fill it."""

    def __init__(self, trial: Trial, paged: Paged, *, poison: float = float("nan")) -> None:
        self._trial = trial
        self._where = str(trial.device.torch_device)
        self.paged = paged
        self.attention: AttentionBackend = trial.device.attention(paged.spec)
        self.cache: LayerCache = self.attention.allocate(paged.num_blocks)
        for tensor in self.cache.tensors.values():
            if tensor.is_floating_point():
                tensor.fill_(poison)
        trial.provider = self.attention.provider()

    def step(self, ranges: Ranges) -> list[Tensor]:
        """Computes `ranges`; the outputs [end - begin, Hq, Dv] of each request, on the host.

        An empty range leaves a request out. Checks inputs and canaries.
        """
        spec = self.paged.spec
        active = [r for r, (begin, end) in enumerate(ranges) if end > begin]
        inputs = {
            name: torch.cat([getattr(self.paged, name)[r][slice(*ranges[r])] for r in active])
            for name in ("q", "k", "v")
        }
        guarded = guard_all({**inputs, **self.paged.extras}, self._where)
        shape = (len(inputs["q"]), spec.num_heads, spec.v_head_size)
        out = guard(torch.full(shape, float("nan"), dtype=inputs["q"].dtype), self._where)
        plan = self.attention.plan(self._batch(ranges, active))
        extras = {name: guarded[name].view for name in self.paged.extras}
        q, k, v = (guarded[name].view for name in ("q", "k", "v"))
        result = self.attention.forward(
            q,
            k,
            v,
            self.cache,
            plan,
            out.view,
            sinks=extras.get("sinks"),
            alibi_slopes=extras.get("alibi_slopes"),
        )
        self._trial.device.synchronize()
        check_all({**guarded, "out": out}, writes={"out"})
        counts = [ranges[r][1] - ranges[r][0] for r in active]
        outputs = iter(torch.split(result.cpu(), counts))
        empty = inputs["q"].new_empty((0, *shape[1:]))
        return [next(outputs) if r in active else empty for r in range(len(ranges))]

    def write(self, ranges: Ranges) -> list[int]:
        """Writes the keys and values of `ranges` apart from attention. Returns their slots."""
        slots = [slot for r, span in enumerate(ranges) for slot in self._slots(r, *span)]
        new = {
            name: torch.cat(
                [getattr(self.paged, name)[r][slice(*ranges[r])] for r in range(len(ranges))]
            )
            for name in ("k", "v")
        }
        guarded = guard_all(new, self._where)
        where = torch.tensor(slots, dtype=torch.int64).to(self._where)
        self.attention.write(guarded["k"].view, guarded["v"].view, self.cache, where)
        self._trial.device.synchronize()
        check_all(guarded, writes=set())
        return slots

    def read_keys(self, slots: Sequence[int]) -> Tensor:
        """The keys in these slots, on the host: [n, Hk, D]."""
        where = torch.tensor(slots, dtype=torch.int64).to(self._where)
        return self.attention.read_keys(self.cache, where).cpu()

    def _slots(self, request: int, begin: int, end: int) -> list[int]:
        blocks, size = self.paged.tables[request], self.paged.spec.block_size
        return [blocks[t // size] * size + t % size for t in range(begin, end)]

    def _batch(self, ranges: Ranges, active: Sequence[int]) -> AttentionBatch:
        size = self.paged.spec.block_size
        counts = [ranges[r][1] - ranges[r][0] for r in active]
        starts = [0, *np.cumsum(counts).tolist()]
        ends = [ranges[r][1] for r in active]
        width = max(len(self.paged.tables[r]) for r in active) + 2
        # What is undefined points at the last block, which nobody owns and which is poison.
        table = torch.full((len(active), width), self.paged.num_blocks - 1)
        slots: list[int] = []
        for row, r in enumerate(active):
            blocks = self.paged.tables[r]
            used = math.ceil(ranges[r][1] / size)
            gone = self._blocks_before_window(ranges[r][0])
            table[row, gone:used] = torch.tensor(blocks[gone:used])
            slots += self._slots(r, *ranges[r])
        index_dtype = getattr(torch, self._trial.capabilities.index_dtype)
        return AttentionBatch(
            query_start_loc=torch.tensor(starts, dtype=torch.int32).to(self._where),
            seq_lens=torch.tensor(ends, dtype=torch.int32).to(self._where),
            block_table=table.to(index_dtype).to(self._where),
            slot_mapping=torch.tensor(slots, dtype=torch.int64).to(self._where),
            query_start_loc_host=starts,
            seq_lens_host=ends,
            num_requests=len(active),
            num_tokens=starts[-1],
            max_query_len=max(counts),
            max_seq_len=max(ends),
        )

    def _blocks_before_window(self, first_query: int) -> int:
        """Blocks that no query of the step sees; the engine may have given them away."""
        spec = self.paged.spec
        if spec.kind != "sliding_window" or spec.window is None:
            return 0
        return max(0, first_query - spec.window + 1) // spec.block_size

    def measure(self, ranges: Ranges, outputs: Sequence[Tensor], what: str, hint: str = "") -> None:
        """Holds the outputs of a step against the oracle."""
        for request, ((begin, end), out) in enumerate(zip(ranges, outputs, strict=True)):
            if end == begin:
                continue
            self._trial.measure(
                f"attention: {what}, request {request}, tokens {begin} to {end - 1}",
                out,
                self.expected(request, begin, end, np.float64),
                self.expected(request, begin, end, np.float32),
                tolerance="attention",
                hint=hint,
            )

    def expected(self, request: int, begin: int, end: int, width: type[np.floating[Any]]) -> Array:
        """The oracle's outputs of tokens [begin, end) of one request."""
        paged = self.paged
        q, k, v = (
            tensors[request][:end].double().numpy().astype(width)
            for tensors in (paged.q, paged.k, paged.v)
        )
        extras = {name: t.double().numpy().astype(width) for name, t in paged.extras.items()}
        return oracle.paged(paged.spec, q, k, v, first=begin, **extras)
