"""Runs a loaded model by hand: a block table a request, any cut of the prompts, all in one flat batch.

The obvious model of what the worker does, with blocks handed out in a shuffled order and caches
filled with NaN, so that a read outside a request's own slots is seen at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quire.backends.reference import TorchDevice
from quire.core.interface import AttentionBatch, DeviceInfo, WorkerConfig
from quire.core.models.decoder import CausalLM
from quire.core.models.loading import load_model
from quire.core.models.registry import load_language_model
from quire.core.models.step_context import StepContext

BLOCK_SIZE = 8


def make_worker_config(directory: Path, **changes: object) -> WorkerConfig:
    """A complete config of a worker for a tiny model."""
    settings = {
        "model": str(directory),
        "dtype": "float32",
        "cache_dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "device_memory_fraction": 0.5,
    }
    return WorkerConfig(**{**settings, **changes})


def load_tiny(directory: Path, **changes: object) -> CausalLM:
    """The model in `directory`, through `load_model`, on the reference."""
    device = TorchDevice(info=DeviceInfo(index=0, name="host"))
    return load_model(make_worker_config(directory, **changes), device)


@dataclass
class RunningRequest:
    """Tokens so far, how many of them are in the cache, and the blocks that hold them."""

    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedRun:
    """Steps of a model over requests that the test holds."""

    def __init__(self, model: CausalLM, num_blocks: int = 128) -> None:
        self.model = model
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(7)) + 1
        self._free = order.tolist()
        self._caches: list[object] = [None] * sum(
            len(group.layers) for group in model.attention_groups
        )
        for group, backend in zip(model.attention_groups, model.attention_backends, strict=True):
            for layer in group.layers:
                cache = backend.allocate(num_blocks)
                for tensor in cache.tensors.values():
                    tensor.fill_(float("nan"))
                self._caches[layer] = cache

    def step(self, work: Sequence[tuple[RunningRequest, int]]) -> Tensor:
        """Computes the next `n` tokens of each (request, n); logits [R, V] after each request's last one."""
        batch, token_ids, positions = self._batch(work)
        step = StepContext(
            token_ids=token_ids,
            positions=positions,
            caches=self._caches,
            plans=[backend.plan(batch) for backend in self.model.attention_backends],
        )
        hidden = self.model.forward(step)
        return self.model.logits(hidden[batch.query_start_loc[1:].long() - 1])

    def _batch(self, work: Sequence[tuple[RunningRequest, int]]) -> tuple:
        starts, lengths, slots, ids, positions = [0], [], [], [], []
        for request, num_new in work:
            end = request.num_computed + num_new
            while len(request.blocks) * BLOCK_SIZE < end:
                request.blocks.append(self._free.pop())
            for position in range(request.num_computed, end):
                block = request.blocks[position // BLOCK_SIZE]
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
                ids.append(request.token_ids[position])
                positions.append(position)
            request.num_computed = end
            starts.append(starts[-1] + num_new)
            lengths.append(end)
        width = max(len(request.blocks) for request, _ in work)
        table = [request.blocks + [0] * (width - len(request.blocks)) for request, _ in work]
        batch = AttentionBatch(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            query_start_loc_host=starts,
            seq_lens_host=lengths,
            num_requests=len(work),
            num_tokens=starts[-1],
            max_query_len=max(num_new for _, num_new in work),
            max_seq_len=max(lengths),
        )
        return batch, torch.tensor(ids), torch.tensor(positions)


def run_greedy(
    model: CausalLM, prompts: Sequence[list[int]], num_tokens: int, *, chunk: int
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens of each prompt, and the logits [num_tokens, V] they were taken from.

    Request i starts at step i, prompts are computed `chunk` tokens at a time, so that steps mix whole
    prompts, later chunks and single tokens.
    """
    run = PagedRun(model)
    requests = [RunningRequest(list(prompt)) for prompt in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    step = 0
    while any(len(rows) < num_tokens for rows in logits):
        active = [i for i in range(min(step + 1, len(prompts))) if len(logits[i]) < num_tokens]
        work = [
            (requests[i], min(chunk, len(requests[i].token_ids) - requests[i].num_computed))
            for i in active
        ]
        for i, row in zip(active, run.step(work) if work else (), strict=True):
            request = requests[i]
            if request.num_computed == len(request.token_ids):
                logits[i].append(row)
                request.token_ids.append(int(row.argmax()))
        step += 1
    outputs = [r.token_ids[len(p) :] for r, p in zip(requests, prompts, strict=True)]
    return outputs, [torch.stack(rows) for rows in logits]


def load_on_reference(directory, **changes):
    """The model as the worker loads it, on the reference."""
    device = TorchDevice(info=DeviceInfo(index=0, name="host"))
    return load_language_model(make_worker_config(directory, **changes), device)


def logits_of(model, token_ids, pieces):
    """Logits after each piece of a text."""
    run, request = PagedRun(model), RunningRequest(list(token_ids))
    return [run.step([(request, n)])[0] for n in pieces]


def hold_resuming(model) -> None:
    """A request that begins behind another's full blocks goes on as that one did."""
    text = np.random.default_rng(9).integers(4, 500, size=30).tolist()
    run, first = PagedRun(model), RunningRequest(list(text))
    run.step([(first, 11)])
    want = run.step([(first, 19)])[0]
    second = RunningRequest(list(text), num_computed=16, blocks=first.blocks[:2])
    torch.testing.assert_close(run.step([(second, 14)])[0], want, rtol=1e-4, atol=1e-4)
