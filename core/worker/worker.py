"""The worker of every device that torch knows; what differs is in their capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple

import numpy as np
import torch

from quire.core.errors import DeviceLost, QuireError, Reason, UnsupportedError
from quire.core.interface import (
    CacheGroup,
    CachePlan,
    Device,
    LayerCache,
    ModelInfo,
    PendingStep,
    SamplingSpec,
    StepBatch,
    StepResult,
    Worker,
    WorkerConfig,
)
from quire.core.models.language_model import LanguageModel
from quire.core.models.pooling.model import PoolingModel
from quire.core.models.registry import load_any_model
from quire.core.worker.cache_budget import (
    cache_bytes_per_block,
    estimate_step_bytes,
    make_dummy_batch,
)
from quire.core.worker.device_errors import device_errors
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.model_runner import ModelRunner
from quire.core.worker.pooling_runner import PoolingRunner

_PROBE_TOKENS = 16
_PROBE_REQUESTS = 16
"""Of the steps from which the memory of the largest is reckoned: few, since they are computed."""


class DefaultWorker(Worker):
    """Runs a model of ours on a device that torch knows.

    `logits_processors` takes further functions at any time (`register`). The device is the
    caller's: `close` gives back what the worker holds of it and leaves it open.
    """

    def __init__(self, device: Device, config: WorkerConfig) -> None:
        """Raises: UnsupportedError, ConfigError for logits processors that cannot be imported."""
        reasons = _reasons_against(device, config)
        if reasons:
            raise UnsupportedError(reasons, what=f"the default worker on {device.info.name}")
        self.logits_processors = LogitsProcessors(config.logits_processors)
        self._device = device
        self._config = config
        self._free_at_start = device.memory().free_bytes
        self._model: LanguageModel | PoolingModel | None = None
        self._runner: ModelRunner | PoolingRunner | None = None
        self._caches: list[LayerCache] = []
        self._activation_bytes = 0

    # --- from loading to the first step ---------------------------------------------------------

    def load_model(self) -> ModelInfo:
        """Loads the weights and says what the layers need of the cache."""
        with device_errors("weights"):
            model = self._model = load_any_model(self._config, self._device)
        for name, function in getattr(model, "logits_processors", {}).items():
            self.logits_processors.register(name, function)
        description = model.description
        pooling, steps = description.pooling, description.source_steps
        return ModelInfo(
            architecture=description.architecture,
            vocab_size=description.vocab_size,
            max_model_len=model.max_model_len,
            cache_groups=_cache_groups(model),
            num_parameters=model.num_parameters,
            weight_bytes=model.weight_bytes,
            dtype=description.dtype,
            implementation=description.implementation,
            tasks=list(description.tasks),
            labels=list(pooling.labels) if pooling else [],
            vector_size=pooling.vector_size if pooling else 0,
            encoder_input=description.encoder_input,
            accepts=list(description.accepts),
            source_steps=list(astuple(steps)) if steps else [],
            providers=model.providers(),
        )

    def cache_budget_bytes(self) -> int:
        """What may be used, less the weights and the peak of the largest step; never negative."""
        if self._config.cache_memory_bytes is not None:
            return self._config.cache_memory_bytes
        model, config = self._loaded(), self._config
        if isinstance(model, PoolingModel):
            # Its steps run one after the other and keep nothing: there is nothing to divide.
            row_bytes = 4 * model.description.row_elements
            self._activation_bytes = config.max_num_batched_tokens * row_bytes
            return 0
        if self._device.capabilities.copy_mode == "unified":
            # An allocator may serve the steps from memory that it kept: then shapes tell more.
            estimated = estimate_step_bytes(model.description, config)
            self._activation_bytes = max(estimated, self._scaled_step_bytes())
        else:
            self._activation_bytes = self._measured_step_bytes(
                config.max_num_batched_tokens, config.max_num_seqs
            )
        allowed = int(self._config.device_memory_fraction * self._free_at_start)
        return max(0, allowed - model.weight_bytes - self._activation_bytes)

    def allocate_cache(self, plan: CachePlan) -> None:
        """Allocates the blocks of each group, of all its layers."""
        self._runner, self._caches = None, []
        caches = self._make_caches(plan.num_blocks)
        self._runner = self._make_runner(caches)
        self._caches = caches

    def warm_up(self) -> None:
        """Runs a step of every bucket, or a small one where the device names none."""
        claims, runner = self._device.capabilities, self._running()
        is_deferred = isinstance(runner, ModelRunner) and runner.defer_recordings()
        limit = self._config.max_num_batched_tokens
        sizes = [size for size in claims.token_buckets if size <= limit]
        for num_tokens in sizes or [min(2, limit)]:
            for num_requests in claims.request_buckets or (1,):
                if num_requests <= min(num_tokens, self._config.max_num_seqs):
                    self._run_dummy(runner, num_tokens, num_requests)
        if isinstance(runner, ModelRunner) and is_deferred:
            # Eagerly: its kernels are compiled, and requests are served before the first recording.
            self._run_dummy(runner, 1, 1)
            runner.defer_recordings()  # what ran so far was nobody's

    def warm_up_more(self) -> bool:
        """Records decode steps of one more size."""
        runner = self._running()
        return isinstance(runner, ModelRunner) and runner.record_next()

    # --- steps ----------------------------------------------------------------------------------

    def execute(self, batch: StepBatch) -> StepResult:
        """Runs one step and waits for it."""
        return self.submit(batch).result()

    def submit(self, batch: StepBatch) -> PendingStep:
        """Starts one step; on an asynchronous device it is not done on return."""
        return self._running().submit(batch)

    # --- blocks ---------------------------------------------------------------------------------

    def copy_blocks(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies blocks in the order of the device's queue."""
        backend = self._loaded().attention_backends[group]
        caches = self._caches_of(group)

        def copy() -> None:
            with torch.inference_mode(), device_errors("cache"):
                for cache in caches:
                    backend.copy_blocks(cache, source, target)

        self._device.queue().run(copy)

    def export_blocks(self, group: int, block_ids: Sequence[int]) -> bytes:
        """Blocks in the canonical layout; waits for the steps in flight."""
        self._running().finish_steps(0)
        self._device.queue().record().wait()
        backend = self._loaded().attention_backends[group]
        with torch.inference_mode(), device_errors("workspace"):
            layers = [backend.export_blocks(cache, block_ids) for cache in self._caches_of(group)]
        stacked: bytes = torch.stack(layers).float().cpu().numpy().astype("<f4").tobytes()
        return stacked

    def import_blocks(self, group: int, block_ids: Sequence[int], blocks: bytes) -> None:
        """Writes blocks in the canonical layout; waits for the steps in flight.

        Raises: QuireError if the number of bytes is not that of the blocks.
        """
        model, caches = self._loaded(), self._caches_of(group)
        spec = model.attention_groups[group].spec
        shape = (
            len(caches),
            len(block_ids),
            spec.block_size,
            spec.num_kv_heads,
            spec.head_size + spec.v_head_size,
        )
        numbers = np.frombuffer(blocks, "<f4")
        if numbers.size != np.prod(shape):
            raise QuireError(
                f"import_blocks got {len(blocks)} bytes for {len(block_ids)} blocks of group "
                f"{group}; "
                f"the canonical layout float32 {shape} has {4 * int(np.prod(shape))}"
            )
        self._running().finish_steps(0)
        self._device.queue().record().wait()
        host = torch.from_numpy(numbers.astype(np.float32).reshape(shape))
        with torch.inference_mode(), device_errors("workspace"):
            for cache, layer in zip(caches, host, strict=True):
                model.attention_backends[group].import_blocks(cache, block_ids, layer)

    # --- state ----------------------------------------------------------------------------------

    def health(self) -> None:
        """Returns if the device answers and no step has lost it."""
        if self._runner is not None:
            self._runner.check_alive()
        with device_errors("health"):
            self._device.memory()

    def memory_by_tag(self) -> dict[str, int]:
        """Weights and cache as allocated; activations as measured or estimated."""
        runner = self._runner
        tensors = [tensor for cache in self._caches for tensor in cache.tensors.values()]
        return {
            "weights": 0 if self._model is None else self._model.weight_bytes,
            "cache": sum(tensor.nbytes for tensor in tensors),
            "activations": self._activation_bytes,
            "workspace": 0 if runner is None else runner.workspace_bytes,
            "graphs": runner.graph_bytes if isinstance(runner, ModelRunner) else 0,
        }

    def close(self) -> None:
        """Waits for the device, unless it is lost, and drops everything."""
        if self._runner is not None:
            with suppress(DeviceLost), device_errors("step"):
                self._device.synchronize()
            self._runner.release()
        self._runner, self._model, self._caches = None, None, []

    # --- parts ----------------------------------------------------------------------------------

    def _loaded(self) -> LanguageModel | PoolingModel:
        if self._model is None:
            raise QuireError("the worker has no model; call load_model first")
        return self._model

    def _running(self) -> ModelRunner | PoolingRunner:
        if self._runner is None:
            raise QuireError("the worker has no cache; call allocate_cache first")
        return self._runner

    def _make_runner(self, caches: list[LayerCache]) -> ModelRunner | PoolingRunner:
        model = self._loaded()
        if isinstance(model, PoolingModel):
            return PoolingRunner(model, self._device)
        with device_errors("workspace"):
            return ModelRunner(model, self._device, caches, self._config, self.logits_processors)

    def _make_caches(self, num_blocks: Sequence[int]) -> list[LayerCache]:
        """The cache of each layer, `num_blocks` for each group."""
        model = self._loaded()
        by_layer: dict[int, LayerCache] = {}
        with device_errors("cache"):
            for group, backend, count in zip(
                model.attention_groups, model.attention_backends, num_blocks, strict=True
            ):
                by_layer |= {layer: backend.allocate(count) for layer in group.layers}
        return [by_layer[layer] for layer in sorted(by_layer)]

    def _caches_of(self, group: int) -> list[LayerCache]:
        return [self._caches[layer] for layer in self._loaded().attention_groups[group].layers]

    def _scaled_step_bytes(self) -> int:
        """The peak of the largest step where that one would take seconds, from two small ones.

        Activations grow with the tokens, which one request shows; logits and sampling with the
        requests, which a step of one token each shows.
        """
        config = self._config
        num_tokens = min(_PROBE_TOKENS, config.max_num_batched_tokens)
        num_requests = min(_PROBE_REQUESTS, config.max_num_seqs)
        self._measured_step_bytes(1, 1)  # what is taken once and for all grows with nothing
        by_token = self._measured_step_bytes(num_tokens, 1) / num_tokens
        by_request = self._measured_step_bytes(num_requests, num_requests) / num_requests
        return int(by_token * config.max_num_batched_tokens + by_request * config.max_num_seqs)

    def _measured_step_bytes(self, num_tokens: int, num_requests: int) -> int:
        """What a step takes of the device, with a cache of NULL_BLOCK alone."""
        num_groups = len(self._loaded().attention_groups)
        batch = make_dummy_batch(
            self._config,
            num_tokens=num_tokens,
            num_requests=num_requests,
            num_groups=num_groups,
        )

        def run() -> None:
            runner = self._make_runner(self._make_caches([1] * num_groups))
            runner.submit(batch).result()

        return self._device.measure_peak_bytes(run)

    def _run_dummy(
        self, runner: ModelRunner | PoolingRunner, num_tokens: int, num_requests: int
    ) -> None:
        batch = make_dummy_batch(
            self._config,
            num_tokens=num_tokens,
            num_requests=num_requests,
            num_groups=len(self._loaded().attention_groups),
            sampling=SamplingSpec(),
        )
        runner.submit(batch).result()
        runner.forget_all()


def _cache_groups(model: LanguageModel | PoolingModel) -> list[CacheGroup]:
    return [
        CacheGroup(
            name=group.name,
            kind=group.spec.kind,
            window=group.spec.window,
            block_size=group.spec.block_size,
            num_layers=len(group.layers),
            bytes_per_block=size,
            max_tokens=group.max_tokens,
        )
        for group, size in zip(model.attention_groups, cache_bytes_per_block(model), strict=True)
    ]


def _reasons_against(device: Device, config: WorkerConfig) -> list[Reason]:
    reasons = list(device.reasons_against(config))
    if device.torch_device is None:
        reasons.append(
            Reason(
                code="worker.torch_device",
                need="a device that torch knows",
                have="torch_device is None",
                remedy="the backend must override Device.make_worker",
            )
        )
    if not device.capabilities.samples_on_device:
        reasons.append(
            Reason(
                code="worker.samples_on_device",
                need="sampling on the device",
                have="samples_on_device is False",
                remedy="serve the operators of kind logits by the reference, or bring a Worker",
            )
        )
    if config.world_size != 1:
        reasons.append(
            Reason(
                code="worker.world_size",
                need=f"a model over {config.world_size} devices",
                have="one device",
                remedy="run on one device",
            )
        )
    return reasons
