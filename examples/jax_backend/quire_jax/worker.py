"""The worker: takes a StepBatch, runs it in XLA, gives a StepResult. Synchronous, one thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quire.core.interface import (
    CacheGroup,
    CachePlan,
    Device,
    DeviceLost,
    DeviceOutOfMemory,
    ModelInfo,
    PositionLogprobs,
    QuireError,
    StepBatch,
    StepResult,
    Worker,
    WorkerConfig,
)
from quire_jax import pool as pools
from quire_jax.checkpoint import (
    CheckpointReader,
    make_dummy_reader,
    make_weights,
    num_parameters,
)
from quire_jax.decoder import Decoder, read_decoder
from quire_jax.errors import jax_errors, out_of_memory
from quire_jax.model import Weights, forward, logits_of, take_rows
from quire_jax.pool import Pool
from quire_jax.requests import RequestBook, ScheduledRequest, StagedStep
from quire_jax.sampling import most_likely
from quire_jax.sampling_step import BROKEN, Sampled, make_logprobs, run_sampling
from quire_jax.step_arrays import Buckets, StepShape, empty_step_arrays, make_step_arrays

_SAMPLING_COPIES = 8
"""Arrays of [requests, vocabulary] float32 that sampling holds at once, sorting counted in."""


class JaxWorker(Worker):
    """Runs a decoder on one device of XLA's."""

    def __init__(self, device: Device, xla_device: jax.Device, config: WorkerConfig) -> None:
        claims = device.capabilities
        self._config = config
        self._memory = device.memory
        self._xla_device = xla_device
        self._free_at_start = device.memory().free_bytes
        self._buckets = Buckets(
            claims.token_buckets,
            claims.request_buckets,
            max_tokens=config.max_num_batched_tokens,
            max_requests=config.max_num_seqs,
        )
        self._decoder: Decoder | None = None
        self._weights: Weights | None = None
        self._pool: Pool | None = None
        self._bases: list[int] = []
        """For each layer, where its blocks begin in the pool."""
        self._num_blocks: list[int] = []
        """Of each cache group."""
        self._book = RequestBook(vocab_size=0, num_groups=0)
        self._activation_bytes = 0
        self._lost: DeviceLost | None = None

    # --- from loading to the first step ---------------------------------------------------------

    def load_model(self) -> ModelInfo:
        """Loads the weights and says what the layers need of the cache."""
        config = self._config
        decoder = self._decoder = read_decoder(Path(config.model))
        self._weights = self._read_weights(decoder)
        self._book = RequestBook(vocab_size=decoder.vocab_size, num_groups=len(decoder.groups))
        return ModelInfo(
            architecture=decoder.architecture,
            vocab_size=decoder.vocab_size,
            max_model_len=config.max_model_len,
            cache_groups=[
                CacheGroup(
                    name="full" if window is None else f"sliding_{window}",
                    kind="causal" if window is None else "sliding_window",
                    window=window,
                    block_size=config.block_size,
                    num_layers=len(layers),
                    bytes_per_block=self._block_bytes(decoder) * len(layers),
                )
                for window, layers in decoder.groups.items()
            ],
            num_parameters=num_parameters(decoder),
            weight_bytes=self._weight_bytes(),
            dtype=config.dtype,
            providers={"step": "xla", "paged_attention": "xla"},
        )

    def cache_budget_bytes(self) -> int:
        """What may be used, less the weights and what XLA says that the largest step takes."""
        config = self._config
        if config.cache_memory_bytes is not None:
            return config.cache_memory_bytes
        self._activation_bytes = self._largest_step_bytes()
        allowed = int(config.device_memory_fraction * self._free_at_start)
        return max(0, allowed - self._weight_bytes() - self._activation_bytes)

    def allocate_cache(self, plan: CachePlan) -> None:
        """Allocates one pool for the blocks of all layers."""
        decoder = self._loaded()[0]
        layers = list(decoder.groups.values())
        wanted = sum(count * len(part) for count, part in zip(plan.num_blocks, layers, strict=True))
        num_bytes = wanted * self._block_bytes(decoder)
        self._pool = None
        free = self._memory().free_bytes
        # A host promises more memory than it has, and takes it back by ending the process.
        if num_bytes > free:
            why = f"{num_bytes} bytes were asked for and {free} are free"
            raise out_of_memory("cache", why, num_bytes)
        with jax_errors("cache"):
            pool = self._empty_pool(wanted)
            jax.block_until_ready(pool)
        self._pool, self._num_blocks = pool, list(plan.num_blocks)
        self._bases = _bases(decoder, plan.num_blocks)

    def warm_up(self) -> None:
        """Compiles every shape of a step.

        What few requests ask for (filters, penalties, ...) is compiled when the first one does.
        """
        with jax_errors("activations"):
            for shape in self._buckets.all_shapes():
                hidden, self._pool = self._forward(self._empty_step(shape))
                for count in self._buckets.row_counts:
                    jax.block_until_ready(most_likely(self._logits(hidden, [0] * count)))

    # --- steps ----------------------------------------------------------------------------------

    def execute(self, batch: StepBatch) -> StepResult:
        """Runs one step and waits for it. If it fails, no request has changed."""
        if self._lost is not None:
            raise self._lost
        staged = self._book.stage(batch)
        try:
            with jax_errors("activations"):
                sampled, prompts = self._run(staged)
        except DeviceLost as error:
            self._lost = error
            raise
        except DeviceOutOfMemory as error:
            self._check_pool(error)
            raise
        result = _make_result(staged, sampled, prompts)
        self._book.commit(staged, sampled.tokens)
        return result

    def _run(self, staged: StagedStep) -> tuple[Sampled, dict[str, list[PositionLogprobs]]]:
        if not staged.scheduled:
            return Sampled(tokens=[]), {}
        hidden, self._pool = self._forward(self._step_arrays(staged.scheduled))
        ends = np.cumsum([part.num_new for part in staged.scheduled])
        samples = [index for index, part in enumerate(staged.scheduled) if part.samples]
        sampled = Sampled(tokens=[])
        if samples:
            logits = self._logits(hidden, (ends[samples] - 1).tolist())
            states = [staged.scheduled[index].state for index in samples]
            sampled = run_sampling(logits, states, staged.batch.token_masks, self._put)
        starts = ends - [part.num_new for part in staged.scheduled]
        prompts = {
            part.state.request_id: self._prompt_logprobs(hidden, part, int(start))
            for part, start in zip(staged.scheduled, starts, strict=True)
            if part.state.sampling.num_prompt_logprobs is not None
        }
        jax.block_until_ready(self._pool)
        return sampled, {name: entries for name, entries in prompts.items() if entries}

    def _prompt_logprobs(
        self, hidden: jax.Array, part: ScheduledRequest, start: int
    ) -> list[PositionLogprobs]:
        """Of the prompt tokens after the positions that the step computes; `start`: its first."""
        # Position p tells of token p + 1, so the prompt's last position tells of the output.
        end = min(part.num_computed + part.num_new, part.state.num_prompt_tokens - 1)
        count, size = end - part.num_computed, self._buckets.row_counts[-1]
        entries: list[PositionLogprobs] = []
        for done in range(0, count, size):
            here = min(size, count - done)
            rows = list(range(start + done, start + done + here))
            first = part.num_computed + done + 1
            tokens = part.state.tokens[first : first + here]
            logits = self._logits(hidden, rows)
            num_tops = [part.state.sampling.num_prompt_logprobs] * here
            entries += make_logprobs(logits, tokens, num_tops, self._put)
        return entries

    # --- blocks ---------------------------------------------------------------------------------

    def copy_blocks(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies blocks of one cache group, in all its layers."""
        with jax_errors("cache"):
            pool = pools.copy_blocks(
                self._cache(), self._places(group, source), self._places(group, target)
            )
            jax.block_until_ready(pool)
        self._pool = pool

    def export_blocks(self, group: int, block_ids: Sequence[int]) -> bytes:
        """Blocks in the canonical layout."""
        with jax_errors("workspace"):
            found = pools.export_blocks(self._cache(), self._places(group, block_ids))
        return found.astype("<f4").tobytes()

    def import_blocks(self, group: int, block_ids: Sequence[int], blocks: bytes) -> None:
        """Writes blocks in the canonical layout.

        Raises: QuireError if the number of bytes is not that of the blocks.
        """
        keys, _ = self._cache()
        places = self._places(group, block_ids)
        num_layers = len(places) // max(len(block_ids), 1)
        shape = (num_layers, len(block_ids), *keys.shape[1:-1], 2 * keys.shape[-1])
        numbers = np.frombuffer(blocks, "<f4")
        if numbers.size != np.prod(shape):
            raise QuireError(
                f"import_blocks got {len(blocks)} bytes for {len(block_ids)} blocks of group "
                f"{group}; the canonical layout float32 {shape} has {4 * int(np.prod(shape))}"
            )
        whole = numbers.reshape(len(places), *shape[2:]).astype(np.float32)
        with jax_errors("workspace"):
            pool = pools.import_blocks(self._cache(), places, whole)
            jax.block_until_ready(pool)
        self._pool = pool

    # --- state ----------------------------------------------------------------------------------

    def health(self) -> None:
        """Returns if the device answers and no step has lost it."""
        if self._lost is not None:
            raise self._lost
        self._memory()

    def memory_by_tag(self) -> dict[str, int]:
        """Weights and cache as allocated; activations as XLA planned them, where it was asked."""
        cache = sum(part.nbytes for part in self._pool or ())
        return {
            "weights": self._weight_bytes(),
            "cache": cache,
            "activations": self._activation_bytes,
        }

    def close(self) -> None:
        """Drops everything."""
        self._pool, self._weights = None, None
        self._book = RequestBook(vocab_size=0, num_groups=0)

    # --- parts ----------------------------------------------------------------------------------

    def _loaded(self) -> tuple[Decoder, Weights]:
        if self._decoder is None or self._weights is None:
            raise QuireError("the worker has no model; call load_model first")
        return self._decoder, self._weights

    def _cache(self) -> Pool:
        if self._pool is None:
            raise QuireError("the worker has no cache; call allocate_cache first")
        return self._pool

    def _put(self, arrays: Any) -> Any:
        return jax.device_put(arrays, self._xla_device)

    def _read_weights(self, decoder: Decoder) -> Weights:
        config = self._config
        is_dummy = config.load_format == "dummy"
        reader = None if is_dummy else CheckpointReader(Path(config.model))
        try:
            with jax_errors("weights"):
                return make_weights(
                    decoder,
                    reader or make_dummy_reader(decoder, config.seed),
                    dtype=config.dtype,
                    max_model_len=config.max_model_len,
                    device=self._xla_device,
                )
        finally:
            if reader is not None:
                reader.close()

    def _weight_bytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self._weights or {}))

    def _block_bytes(self, decoder: Decoder) -> int:
        """Of one block of one layer."""
        size = 2 if self._config.cache_dtype == "bfloat16" else 4
        heads = 2 * decoder.num_kv_heads * decoder.head_size
        return self._config.block_size * heads * size

    def _empty_pool(self, num_blocks: int) -> Pool:
        decoder = self._loaded()[0]
        shape = (num_blocks, self._config.block_size, decoder.num_kv_heads, decoder.head_size)
        return pools.make_pool(shape, self._config.cache_dtype, self._xla_device)

    def _forward(self, arrays: dict[str, Any]) -> tuple[jax.Array, Pool]:
        decoder, weights = self._loaded()
        arrays["bases"] = np.asarray(self._bases, np.int32)
        return forward(decoder, weights, self._cache(), self._put(arrays))

    def _logits(self, hidden: jax.Array, rows: Sequence[int]) -> jax.Array:
        """Logits float32 after `rows` of hidden states, padded to the next bucket."""
        decoder, weights = self._loaded()
        padded = np.zeros(self._buckets.rows(len(rows)), np.int32)
        padded[: len(rows)] = rows
        return logits_of(decoder, weights, take_rows(hidden, self._put(padded)))

    def _step_arrays(self, scheduled: Sequence[ScheduledRequest]) -> dict[str, Any]:
        shape = self._buckets.shape_of([part.num_new for part in scheduled])
        return make_step_arrays(scheduled, shape, **self._sizes())

    def _empty_step(self, shape: StepShape) -> dict[str, Any]:
        return empty_step_arrays(shape, **self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {
            "num_groups": len(self._loaded()[0].groups),
            "block_size": self._config.block_size,
            "max_model_len": self._config.max_model_len,
        }

    def _largest_step_bytes(self) -> int:
        """What the largest step takes beside weights and cache, by XLA's own plan of it."""
        decoder, weights = self._loaded()
        shape = self._buckets.all_shapes()[-1]
        arrays = self._empty_step(shape) | {"bases": np.zeros(decoder.num_layers, np.int32)}
        with jax_errors("activations"):
            pool = self._empty_pool(decoder.num_layers)
            compiled = forward.lower(decoder, weights, pool, self._put(arrays)).compile()
        planned = compiled.memory_analysis()
        logits = self._buckets.row_counts[-1] * decoder.vocab_size * 4 * _SAMPLING_COPIES
        hidden = shape.num_tokens * decoder.hidden_size * 4
        return logits + hidden + (int(planned.temp_size_in_bytes) if planned else 0)

    def _places(self, group: int, block_ids: Sequence[int]) -> list[int]:
        """Where blocks of a group lie in the pool, layer by layer."""
        layers = list(self._loaded()[0].groups.values())[group]
        return [self._bases[layer] + block for layer in layers for block in block_ids]

    def _check_pool(self, error: DeviceOutOfMemory) -> None:
        """After a refused allocation: the worker lives on if the cache does."""
        try:
            # Raises for what was donated to a step that never ran, and for what a failed one left.
            jax.block_until_ready(self._cache())
        except RuntimeError as gone:
            self._lost = DeviceLost(
                f"the step that ran out of memory took the cache with it ({error}); "
                "restart the worker"
            )
            raise self._lost from gone


def _bases(decoder: Decoder, num_blocks: Sequence[int]) -> list[int]:
    """For each layer, its first block in the pool."""
    counts = [0] * decoder.num_layers
    for count, layers in zip(num_blocks, decoder.groups.values(), strict=True):
        for layer in layers:
            counts[layer] = count
    return [sum(counts[:layer]) for layer in range(decoder.num_layers)]


def _make_result(
    staged: StagedStep, sampled: Sampled, prompts: Mapping[str, list[PositionLogprobs]]
) -> StepResult:
    parts = staged.scheduled
    row_of = {i: row for row, i in enumerate(i for i, part in enumerate(parts) if part.samples)}
    errors = {p.state.request_id: p.state.problem for p in parts if p.state.problem}
    for index, row in row_of.items():
        if row in sampled.problems:
            errors.setdefault(parts[index].state.request_id, sampled.problems[row])
    for name, entries in prompts.items():
        if any(entry.logprob != entry.logprob for entry in entries):  # NaN
            errors.setdefault(name, BROKEN)
    is_fine = [part.state.request_id not in errors for part in parts]
    # A request's row among those sampled; nothing comes of one that failed.
    rows = [row_of.get(i) if is_fine[i] else None for i in range(len(parts))]
    tokens = [[] if row is None else [sampled.tokens[row]] for row in rows]
    logprobs: list[list[PositionLogprobs] | None] = [
        None
        if part.state.sampling.num_logprobs is None
        else ([] if row is None else [sampled.logprobs[row]])
        for row, part in zip(rows, parts, strict=True)
    ]
    return StepResult(
        step_id=staged.batch.step_id,
        sampled_token_ids=tokens,
        logprobs=logprobs if any(entry is not None for entry in logprobs) else None,
        prompt_logprobs={k: v for k, v in prompts.items() if k not in errors},
        errors=errors,
    )
