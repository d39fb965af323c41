"""The device that fails: the reference, with a fault behind each of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.backends.faults.queue import FaultsQueue
from quire.backends.faults.schedule import Faults, FaultSchedule, reason_against
from quire.backends.reference import (
    ReferenceAttention,
    ReferenceOps,
    ReferencePlan,
    TorchDevice,
)
from quire.core.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionPlan,
    AttentionSpec,
    Capabilities,
    DeviceInfo,
    DeviceOutOfMemory,
    LayerCache,
    MemoryInfo,
    Ops,
    PackedLinear,
    Queue,
    Reason,
    Worker,
    WorkerConfig,
)

_DTYPES = ("float32", "bfloat16", "float16")
_NOISE = 3.0


class FaultsDevice(TorchDevice):
    """Host memory that fails as the options of its worker say."""

    def __init__(self, info: DeviceInfo, *, is_asynchronous: bool) -> None:
        self._schedule = FaultSchedule()
        super().__init__(
            info=info,
            torch_device="cpu",
            capabilities=Capabilities(
                dtypes=_DTYPES,
                cache_dtypes=_DTYPES,
                block_sizes=(16, 4, 8, 32),
                attention_kinds=frozenset({"causal", "sliding_window", "chunked", "mla"}),
                features=frozenset(
                    {"lora", "moe", "recurrent", "speculation", "state_slots", "cache_rows"}
                ),
                attention_features=frozenset({"soft_cap", "sinks", "alibi"}),
                is_asynchronous=is_asynchronous,
                copy_mode="asynchronous" if is_asynchronous else "synchronous",
            ),
        )
        self._queue = FaultsQueue(self._schedule, is_asynchronous=is_asynchronous)

    def _make_ops(self) -> Ops:
        return FaultsOps(self._schedule)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        backend = super().attention(spec)
        assert isinstance(backend, FaultsAttention), backend
        backend.schedule = self._schedule
        return backend

    def _attention_class(self, spec: AttentionSpec) -> type[ReferenceAttention]:
        return FaultsAttention

    def queue(self) -> Queue:
        return self._queue

    def memory(self) -> MemoryInfo:
        self._schedule.check_alive()
        return super().memory()

    def reasons_against(self, worker_config: WorkerConfig) -> Sequence[Reason]:
        reason = reason_against(worker_config.options)
        return () if reason is None else (reason,)

    def make_worker(self, config: WorkerConfig) -> Worker | None:
        """None: the core's own Worker. This is where a device meets its options."""
        if reason_against(config.options) is None:  # else the worker refuses them
            self._schedule.faults = Faults.from_options(config.options)
        return None


class FaultsOps(ReferenceOps):
    """Operators that refuse memory for weights, or write NaN over a row of logits."""

    def __init__(self, schedule: FaultSchedule) -> None:
        self._schedule = schedule
        self._vocab_size = 0

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        if self._schedule.faults.oom_at_load:
            raise DeviceOutOfMemory(
                "memory for weights was refused on purpose",
                requested_bytes=weight.nbytes,
                tag="weights",
            )
        return super().pack_linear(weight, bias)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        self._vocab_size = weight.shape[0]  # how the layer that makes logits is told from others
        return super().embedding(token_ids, weight)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        out = super().linear(x, packed)
        is_due = self._schedule.is_due(self._schedule.faults.nan_logits_at_step)
        if is_due and packed.num_outputs == self._vocab_size and len(out):
            out[0] = torch.nan
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FaultsPlan(ReferencePlan):
    """The reference's plan, and the block that is overwritten before it is read."""

    corrupt_block: int


class FaultsAttention(ReferenceAttention):
    """Attention that refuses memory for the cache, or overwrites a block of it."""

    schedule: FaultSchedule
    """Set by the device that makes it."""

    def allocate(self, num_blocks: int) -> LayerCache:
        self.schedule.restart_count()
        if self.schedule.faults.oom_at_allocate:
            raise DeviceOutOfMemory("memory for the cache was refused on purpose", tag="cache")
        return super().allocate(num_blocks)

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        plan = super().plan(batch)
        if not self.schedule.is_due(self.schedule.faults.corrupt_block_at_step):
            return plan
        assert isinstance(plan, ReferencePlan), plan
        return FaultsPlan(
            slot_mapping=plan.slot_mapping,
            num_tokens=plan.num_tokens,
            groups=plan.groups,
            corrupt_block=int(batch.block_table[0, 0]),
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        if isinstance(plan, FaultsPlan):
            for tensor in cache.tensors.values():
                _corrupt(tensor[plan.corrupt_block], self.schedule.faults.corrupt_with)
        return super().forward(q, k, v, cache, plan, out, sinks=sinks, alibi_slopes=alibi_slopes)


def _corrupt(block: Tensor, kind: str) -> None:
    """Overwrites a block. Mutates `block`."""
    if kind == "nan":
        block.fill_(torch.nan)
        return
    noise = torch.randn(block.shape, generator=torch.Generator().manual_seed(0))
    block.copy_(noise * _NOISE)
