"""Backends that are broken on purpose, each in one way, on top of the honest reference."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch

from quire.backends.reference import ReferenceAttention, ReferenceOps, TorchDevice
from quire.backends.reference.communicator import GlooCommunicator
from quire.backends.sim.device import SimDevice
from quire.conformance.ranks import Opener
from quire.core.interface import (
    Capabilities,
    CapturedStep,
    CompletedStep,
    DeviceError,
    DeviceInfo,
    Event,
    GraphCapture,
    MemoryInfo,
    Ops,
    PendingStep,
    Queue,
    UnsupportedError,
    Worker,
    WorkerConfig,
)
from quire.core.worker.worker import DefaultWorker

DTYPES = ("float32", "bfloat16", "float16")
CLAIMS = Capabilities(
    dtypes=DTYPES,
    cache_dtypes=DTYPES,
    block_sizes=(16, 32),
    attention_kinds=frozenset({"causal", "sliding_window", "chunked"}),
    attention_features=frozenset({"soft_cap", "sinks", "alibi"}),
    copy_mode="unified",
    determinism="run_to_run",
)


def make_device(
    *,
    ops: type[Ops] = ReferenceOps,
    attention: type[ReferenceAttention] = ReferenceAttention,
    base: type[TorchDevice] = TorchDevice,
    **claims: object,
) -> TorchDevice:
    """The reference with one part exchanged."""

    class Sabotaged(base):
        def _make_ops(self):
            return ops()

        def _attention_class(self, spec):
            return attention

    capabilities = replace(CLAIMS, **claims)
    return Sabotaged(info=DeviceInfo(index=0, name="sabotaged"), capabilities=capabilities)


# --- operators ------------------------------------------------------------------------------------


class NextRow(ReferenceOps):
    def embedding(self, token_ids, weight):
        return super().embedding((token_ids + 1) % len(weight), weight)


class HalfAccumulation(ReferenceOps):
    def linear(self, x, packed):
        weight = packed.payload.weight
        total = torch.zeros((len(x), len(weight)), dtype=x.dtype)
        for k in range(0, x.shape[1], 8):
            total = total + x[:, k : k + 8] @ weight[:, k : k + 8].T
        return total


class ForgetsBias(ReferenceOps):
    def pack_linear(self, weight, bias):
        return super().pack_linear(weight, None)


class EpsOutsideTheRoot(ReferenceOps):
    def rms_norm(self, x, weight, eps):
        wide = x.float()
        root = wide.square().mean(-1, keepdim=True).sqrt() + eps
        return (wide / root * weight.float()).to(x.dtype)


class MemoisesByShape(ReferenceOps):
    def __init__(self):
        self._answers = {}

    def rms_norm(self, x, weight, eps):
        key = (x.shape, x.dtype)
        if key not in self._answers:
            self._answers[key] = super().rms_norm(x, weight, eps)
        return self._answers[key].clone()


class MutatesInputs(ReferenceOps):
    def rms_norm(self, x, weight, eps):
        result = super().rms_norm(x, weight, eps)
        x.copy_(result)
        return result


class WritesPastTheEnd(ReferenceOps):
    def soft_cap(self, x, cap):
        longer = torch.as_strided(x, (x.numel() + 2,), (1,), x.storage_offset())
        super().soft_cap(x, cap)
        longer[-1] = 0


class LeavesResidual(ReferenceOps):
    def add_rms_norm(self, x, residual, weight, eps):
        return self.rms_norm(residual + x, weight, eps)


class NormalisesBeforeRounding(ReferenceOps):
    def add_rms_norm(self, x, residual, weight, eps):
        residual.add_(x)
        return self.rms_norm(x, weight, eps)


class SwapsHalves(ReferenceOps):
    def gated_activation(self, x, kind):
        return super().gated_activation(x.roll(x.shape[-1] // 2, dims=-1), kind)


class WrongGelu(ReferenceOps):
    def gated_activation(self, x, kind):
        return super().gated_activation(x, "gelu_tanh" if kind == "gelu" else kind)


class PositionOffByOne(ReferenceOps):
    def rotary(self, q, k, cos, sin, *, is_interleaved):
        super().rotary(q, k, cos.roll(1, 0), sin.roll(1, 0), is_interleaved=is_interleaved)


class SwapsPairs(ReferenceOps):
    def rotary(self, q, k, cos, sin, *, is_interleaved):
        super().rotary(q, k, cos, sin, is_interleaved=not is_interleaved)


class CapsTwice(ReferenceOps):
    def soft_cap(self, x, cap):
        super().soft_cap(x, cap)
        super().soft_cap(x, cap)


class SkipsByException(ReferenceOps):
    def soft_cap(self, x, cap):
        pytest.skip("this hardware has no tanh")


class RefusesWhatItClaims(ReferenceOps):
    def soft_cap(self, x, cap):
        raise NotImplementedError("soft_cap")


class PenalisesTwice(ReferenceOps):
    def apply_penalties(self, logits, rows, token_ids, output_counts, settings):
        for _ in range(2):
            super().apply_penalties(logits, rows, token_ids, output_counts, settings)


class DividesNegatives(ReferenceOps):
    def apply_penalties(self, logits, rows, token_ids, output_counts, settings):
        repetition = settings[rows, 0]
        logits[rows, token_ids] /= repetition
        settings = settings.clone()
        settings[:, 0] = 1
        super().apply_penalties(logits, rows, token_ids, output_counts, settings)


class AssignsBias(ReferenceOps):
    def add_bias(self, logits, rows, token_ids, bias):
        logits[rows, token_ids] = bias


class ForbidsEveryRow(ReferenceOps):
    def keep_only(self, logits, rows, row_of_entry, token_ids):
        super().keep_only(logits, torch.arange(len(logits)), row_of_entry, token_ids)


class ReadsTheSignBitAsSign(ReferenceOps):
    def apply_token_mask(self, logits, rows, mask):
        super().apply_token_mask(logits, rows, mask & 0x7FFFFFFF)


class LogBaseTwo(ReferenceOps):
    def logprobs(self, logits, token_ids, num_top):
        result = super().logprobs(logits, token_ids, num_top)
        return replace(result, selected=result.selected / math.log(2))


class TiesShareTheWorseRank(ReferenceOps):
    def logprobs(self, logits, token_ids, num_top):
        result = super().logprobs(logits, token_ids, num_top)
        chosen = logits.gather(-1, token_ids.unsqueeze(-1))
        return replace(result, ranks=(logits >= chosen).sum(-1))


class Noisy(ReferenceOps):
    def linear(self, x, packed):
        exact = super().linear(x, packed)
        return exact * (1 + torch.randn(exact.shape) * 2.0**-23).to(exact.dtype)


class DependsOnTheBatch(ReferenceOps):
    def linear(self, x, packed):
        scale = 1 + (len(x) > 1) * torch.finfo(x.dtype).eps
        return super().linear(x, packed) * scale


# --- sampling -------------------------------------------------------------------------------------


class IgnoresUniform(ReferenceOps):
    def sample(self, logits, settings):
        return super().sample(
            logits, replace(settings, uniform=torch.full_like(settings.uniform, 0.5))
        )


class LastOfTies(ReferenceOps):
    def sample(self, logits, settings):
        if not settings.is_all_greedy:
            return super().sample(logits, settings)
        return logits.shape[-1] - 1 - logits.flip(-1).argmax(-1)


class ForgetsTemperature(ReferenceOps):
    def sample(self, logits, settings):
        ones = torch.where(settings.temperature > 0, 1.0, 0.0)
        return super().sample(logits, replace(settings, temperature=ones))


class TopKBreaksTies(ReferenceOps):
    def sample(self, logits, settings):
        order = logits.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(logits.shape[-1]).expand_as(order)
        )
        logits = logits.masked_fill(rank >= settings.top_k.unsqueeze(-1), float("-inf"))
        return super().sample(logits, settings)


class TopKOffByOne(ReferenceOps):
    def sample(self, logits, settings):
        return super().sample(logits, replace(settings, top_k=settings.top_k + 1))


class TopPOffByOne(ReferenceOps):
    """Leaves out the token that makes the sum reach top_p."""

    def sample(self, logits, settings):
        ranked, order = (
            (logits / settings.temperature.unsqueeze(-1)).softmax(-1).sort(-1, descending=True)
        )
        is_over = ranked.cumsum(-1) >= settings.top_p.unsqueeze(-1)
        is_over[:, 0] = False
        gone = torch.zeros_like(is_over).scatter_(-1, order, is_over)
        off = replace(settings, top_p=torch.ones_like(settings.top_p))
        return super().sample(logits.masked_fill(gone, float("-inf")), off)


class MinPOfOne(ReferenceOps):
    """Holds min_p against 1 instead of the largest probability."""

    def sample(self, logits, settings):
        probabilities = (logits / settings.temperature.unsqueeze(-1)).softmax(-1)
        least = torch.minimum(settings.min_p.unsqueeze(-1), probabilities.amax(-1, keepdim=True))
        off = replace(settings, min_p=torch.zeros_like(settings.min_p))
        return super().sample(logits.masked_fill(probabilities < least, float("-inf")), off)


# --- attention ------------------------------------------------------------------------------------


class IgnoresBlockTable(ReferenceAttention):
    def plan(self, batch):
        rows, width = batch.block_table.shape
        table = torch.arange(1, width + 1).expand(rows, width)
        return super().plan(replace(batch, block_table=table % 4 + 1))


class DropsLastToken(ReferenceAttention):
    def plan(self, batch):
        starts = batch.query_start_loc_host
        lens = [
            n - (starts[r + 1] - starts[r] == 1 and n > 1)
            for r, n in enumerate(batch.seq_lens_host)
        ]
        return super().plan(replace(batch, seq_lens_host=lens))


class HalfSums(ReferenceAttention):
    """Sums weights and values in the dtype of the inputs, token by token."""

    def _explicit(self, queries, keys, values, group, sinks, alibi_slopes):
        dtype = getattr(torch, self.spec.dtype)
        scores = torch.einsum("nhgqd,nhsd->nhgqs", queries, keys) * self.spec.scale
        if group.bias is not None:
            scores = scores + group.bias
        powers = (scores - scores.amax(-1, keepdim=True)).exp().to(dtype)
        total = torch.zeros(powers.shape[:-1], dtype=dtype)
        out = torch.zeros((*powers.shape[:-1], values.shape[-1]), dtype=dtype)
        for s in range(powers.shape[-1]):
            total = total + powers[..., s]
            out = out + powers[..., s, None] * values[:, :, None, None, s].to(dtype)
        return (out / total[..., None]).float()


class ReadsAllBlocks(ReferenceAttention):
    def forward(self, q, k, v, cache, plan, out, **extras):
        result = super().forward(q, k, v, cache, plan, out, **extras)
        return result.add_(0 * cache.tensors["v"].float().sum().to(out.dtype))


class ReadsBeforeTheWindow(ReferenceAttention):
    """Multiplies what no query sees by zero."""

    def plan(self, batch):
        self._first_blocks = batch.block_table[:, 0].long()
        return super().plan(batch)

    def forward(self, q, k, v, cache, plan, out, **extras):
        result = super().forward(q, k, v, cache, plan, out, **extras)
        return result.add_(
            0 * cache.tensors["v"][self._first_blocks, 0].float().sum().to(out.dtype)
        )


class SeesTheFuture(ReferenceAttention):
    def plan(self, batch):
        plan = super().plan(batch)
        return replace(plan, groups=tuple(replace(g, is_causal=False) for g in plan.groups))


class ChangesSpec(ReferenceAttention):
    """Serves another spec than it was asked for."""

    def __init__(self, spec, torch_device="cpu"):
        super().__init__(self._changed(spec), torch_device)


class NoSoftCap(ChangesSpec):
    def _changed(self, spec):
        return replace(spec, soft_cap=None)


class DoubledSoftCap(ChangesSpec):
    def _changed(self, spec):
        return replace(spec, soft_cap=spec.soft_cap and 2 * spec.soft_cap)


class WindowOffByOne(ChangesSpec):
    def _changed(self, spec):
        return replace(spec, window=spec.window and spec.window + 1)


class WrongScale(ChangesSpec):
    def _changed(self, spec):
        return replace(spec, scale=spec.scale * 1.02)


class WrongGroups(ReferenceAttention):
    """Query head h reads key head h % Hk."""

    def forward(self, q, k, v, cache, plan, out, **extras):
        heads = torch.arange(self.spec.num_heads).view(-1, self.spec.num_kv_heads).T.flatten()
        inner = torch.empty_like(out)
        super().forward(q[:, heads], k, v, cache, plan, inner, **extras)
        out[:, heads] = inner
        return out


class WritesTheNeighbour(ReferenceAttention):
    """Leaves a trace in the block that nobody owns."""

    def forward(self, q, k, v, cache, plan, out, **extras):
        cache.tensors["k"][-1] = 0
        return super().forward(q, k, v, cache, plan, out, **extras)


class CopiesOneBlock(ReferenceAttention):
    def copy_blocks(self, cache, source, target):
        super().copy_blocks(cache, source[:1], target[:1])


class UnderstatesItsBlocks(ReferenceAttention):
    def cache_layout(self):
        layout = super().cache_layout()
        return replace(layout, bytes_per_block=layout.bytes_per_block // 2)


class UntypedOutOfMemory(ReferenceAttention):
    def allocate(self, num_blocks):
        if num_blocks > 1 << 30:
            raise RuntimeError("HIP error 2")
        return super().allocate(num_blocks)


# --- devices --------------------------------------------------------------------------------------


class LiesAboutMemory(TorchDevice):
    def memory(self):
        return MemoryInfo(total_bytes=1 << 30, free_bytes=1 << 31)


class _Done(Event):
    def is_done(self):
        return True

    def wait(self):
        return None


class RacingQueue(Queue):
    """Copies on one stream and computes on another, with nothing between them."""

    def __init__(self):
        self._work: deque[Callable[[], None]] = deque()

    def upload(self, staging, target):
        target.copy_(staging)

    def run(self, work):
        self._work.append(work)

    def download(self, source, staging):
        staging.copy_(source)

    def record(self):
        while self._work:
            self._work.popleft()()
        return _Done()


class EarlyEventQueue(Queue):
    """Says that a copy is done before it is."""

    def __init__(self):
        self._waiting: list[Callable[[], object]] = []

    def _flush(self):
        for copy in self._waiting:
            copy()
        self._waiting.clear()

    def upload(self, staging, target):
        self._waiting.append(lambda: target.copy_(staging))

    def run(self, work):
        self._flush()
        work()

    def download(self, source, staging):
        self._flush()
        staging.copy_(source)

    def record(self):
        return _Done()


def with_queue(queue: type[Queue]) -> TorchDevice:
    """The reference behind another queue."""

    class Queued(TorchDevice):
        def __init__(self, **parts):
            super().__init__(**parts)
            self._queue = queue()

        def queue(self):
            return self._queue

    return make_device(base=Queued)


# --- workers --------------------------------------------------------------------------------------


class ForgetsSeeds(DefaultWorker):
    def execute(self, batch):
        return super().execute(_reseeded(batch, lambda seed: 0))


class ForgetsSeedsWhenSubmitted(DefaultWorker):
    def submit(self, batch):
        return super().submit(_reseeded(batch, lambda seed: 0))


class SeedsByBatch(DefaultWorker):
    def execute(self, batch):
        return super().execute(_reseeded(batch, lambda seed: seed + len(batch.request_ids)))


def _reseeded(batch, change):
    new = [
        msgspec.structs.replace(
            request,
            sampling=msgspec.structs.replace(request.sampling, seed=change(request.sampling.seed)),
        )
        for request in batch.new_requests
    ]
    return msgspec.structs.replace(batch, new_requests=new)


class IgnoresNewBlocks(DefaultWorker):
    """Writes every new block of a request into its first."""

    def execute(self, batch):
        new = [
            msgspec.structs.replace(r, block_ids=[[b[0]] * len(b) for b in r.block_ids])
            for r in batch.new_requests
        ]
        return super().execute(msgspec.structs.replace(batch, new_requests=new))


class KeepsTheFinished(DefaultWorker):
    """Keeps something of every request that it was told to forget."""

    def submit(self, batch):
        self.kept = getattr(self, "kept", 0) + len(batch.finished_request_ids)
        return super().submit(batch)

    def memory_by_tag(self):
        memory = super().memory_by_tag()
        return {**memory, "workspace": memory["workspace"] + 64 * getattr(self, "kept", 0)}


class NeverForgets(DefaultWorker):
    """Keeps every request in its batch for ever."""

    def submit(self, batch):
        return super().submit(msgspec.structs.replace(batch, finished_request_ids=[]))


class AnswersByBatch(DefaultWorker):
    """Gives another token where more than three requests meet."""

    def submit(self, batch):
        result = super().submit(batch).result()
        if len(batch.request_ids) > 3:
            tokens = [[t ^ 1 for t in tokens] for tokens in result.sampled_token_ids]
            result = msgspec.structs.replace(result, sampled_token_ids=tokens)
        return CompletedStep(result)


class LosesItsOutput(DefaultWorker):
    """Takes a request that comes back after preemption for its prompt alone, and padding."""

    def submit(self, batch):
        new = [
            msgspec.structs.replace(
                r,
                token_ids=r.token_ids[: r.num_prompt_tokens]
                + [0] * (len(r.token_ids) - r.num_prompt_tokens),
            )
            for r in batch.new_requests
        ]
        return super().submit(msgspec.structs.replace(batch, new_requests=new))


class IgnoresPrefixes(DefaultWorker):
    """Reads the second block for the first where a prefix was found in the cache."""

    def submit(self, batch):
        new = [
            msgspec.structs.replace(r, block_ids=[[b[1], *b[1:]] for b in r.block_ids])
            if r.num_computed_tokens
            else r
            for r in batch.new_requests
        ]
        return super().submit(msgspec.structs.replace(batch, new_requests=new))


class AliveOnce(TorchDevice):
    """Works for the first engine of a process and no other."""

    num_workers = 0

    def make_worker(self, config: WorkerConfig) -> Worker | None:
        self.num_workers += 1
        if self.num_workers > 1:
            raise DeviceError("the driver is open already")
        return None


class DrawsAnew(DefaultWorker):
    """Draws its random numbers from its own counter."""

    def submit(self, batch):
        self.count = getattr(self, "count", 0) + 1
        return super().submit(_reseeded(batch, lambda seed: seed + self.count))


def with_worker(worker: type[DefaultWorker], **claims: object) -> TorchDevice:
    """The reference with another worker."""

    class Working(TorchDevice):
        def make_worker(self, config: WorkerConfig) -> Worker | None:
            return worker(self, config)

    return make_device(base=Working, **claims)


# --- several devices ------------------------------------------------------------------------------


class SkipsLastRank(GlooCommunicator):
    """A sum to which the last rank adds nothing."""

    def all_reduce(self, x):
        return super().all_reduce(torch.zeros_like(x) if self.rank == self.world_size - 1 else x)


class GathersBackwards(GlooCommunicator):
    """The ranks' tensors in the order in which a ring brings them."""

    def all_gather(self, x, *, dim):
        parts = super().all_gather(x, dim=dim).chunk(self.world_size, dim=dim)
        return torch.cat(parts[::-1], dim=dim)


class SendsFromItsNeighbour(GlooCommunicator):
    """Counts sources from 1."""

    def broadcast(self, x, *, source):
        return super().broadcast(x, source=(source + 1) % self.world_size)


class ForgetsToWrite(GlooCommunicator):
    """Returns what was sent, and leaves the argument as it was."""

    def broadcast(self, x, *, source):
        return super().broadcast(x.clone(), source=source)


class WaitsForNobody(GlooCommunicator):
    def barrier(self):
        return None


class SumsInHalf(GlooCommunicator):
    """Rounds after each rank, and to fewer bits than the dtype has."""

    def all_reduce(self, x):
        return super().all_reduce(x.bfloat16()).to(x.dtype)


class RaisesWhatTorchRaises(GlooCommunicator):
    """A rank that dies is somebody else's RuntimeError."""

    def all_reduce(self, x):
        try:
            return super().all_reduce(x)
        except DeviceError as error:
            raise RuntimeError("connection reset by peer") from error


COMMUNICATORS = {
    cls.__name__: cls
    for cls in (
        GlooCommunicator,
        SkipsLastRank,
        GathersBackwards,
        SendsFromItsNeighbour,
        ForgetsToWrite,
        WaitsForNobody,
        SumsInHalf,
        RaisesWhatTorchRaises,
    )
}


class Scaled(TorchDevice):
    """The reference with the communicator that a file names: the same processes try them all."""

    chosen: Path | None = None

    def communicator(self, ranks, *, rank, address):
        if len(ranks) > self.capabilities.max_tensor_parallel or self.chosen is None:
            return super().communicator(ranks, rank=rank, address=address)
        return COMMUNICATORS[self.chosen.read_text()](ranks, rank=rank, address=address)


def open_scaled(rank: int, chosen: str = "") -> TorchDevice:
    """One rank's device; other processes call this by its name."""
    torch.set_num_threads(1)
    device = make_device(base=Scaled, max_tensor_parallel=3)
    device.__dict__["chosen"] = Path(chosen) if chosen else None
    return device


def opener_of(chosen: Path) -> Opener:
    """How another process opens the device whose communicator `chosen` names."""
    return Opener(target="saboteurs:open_scaled", arguments=(str(chosen),))


class RefusesWithoutReason(TorchDevice):
    def communicator(self, ranks, *, rank, address):
        if len(ranks) > 1:
            raise NotImplementedError("communicator")
        return super().communicator(ranks, rank=rank, address=address)


# --- recordings -----------------------------------------------------------------------------------


class HostLengthsAttention(ReferenceAttention):
    """Takes lengths from what the host said when the step was recorded: the worst case."""


class DeviceLengthsAttention(ReferenceAttention):
    """Takes lengths from the device's tensors alone, as recorded work must."""

    def plan(self, batch):
        return super().plan(
            replace(
                batch,
                seq_lens_host=batch.seq_lens.tolist(),
                query_start_loc_host=batch.query_start_loc.tolist(),
            )
        )


class CallsAgain(CapturedStep):
    """Calls the recorded function again: right only if all it reads lies in static buffers."""

    def __init__(self, step):
        self._step = step

    def replay(self):
        self._step()


class KeepsItsFirstAnswer(CapturedStep):
    """A recording whose kernels read copies of the buffers, made when it was recorded."""

    def __init__(self, step):
        self._is_first = True
        self._step = step

    def replay(self):
        if self._is_first:
            self._step()
        self._is_first = False


class SoftwareGraphs(GraphCapture):
    """Records by remembering the function."""

    def __init__(self, step: type[CapturedStep] = CallsAgain):
        self._kind = step

    def capture(self, key, step):
        step()
        return self._kind(step)


class RefusesToRecord(GraphCapture):
    def capture(self, key, step):
        raise UnsupportedError([], what=key)


def with_graphs(
    graphs: Callable[[], GraphCapture | None],
    attention: type[ReferenceAttention] = DeviceLengthsAttention,
    **claims: object,
) -> TorchDevice:
    """The reference with recordings."""

    class Recording(TorchDevice):
        def __init__(self, **parts):
            super().__init__(**parts)
            self._graphs = graphs()

        def graphs(self):
            return self._graphs

    return make_device(
        base=Recording, attention=attention, step_mode="capture", copy_mode="synchronous", **claims
    )


class OtherBitsWhenReplayed(CapturedStep):
    """Another kernel is chosen while a step is recorded: nearly the same numbers."""

    def __init__(self, step):
        self._step = step

    def replay(self):
        with torch.inference_mode():
            self._step()
            hidden = _hidden_of(self._step)
            hidden.mul_(1 + torch.finfo(hidden.dtype).eps)


def _hidden_of(step):
    cells = dict(zip(step.__code__.co_freevars, step.__closure__, strict=True))
    return cells["static"].cell_contents["hidden"]


# --- overlap, streams, processes ------------------------------------------------------------------


class LosesStepsAhead(DefaultWorker):
    """Takes the token of the step before the last for a step that is submitted ahead."""

    def submit(self, batch):
        is_ahead = getattr(self, "waiting", 0) > 0
        self.waiting = getattr(self, "waiting", 0) + 1
        return _Counted(self, super().submit(batch), is_ahead)


class _Counted(PendingStep):
    """A step, and whether it was submitted while another was on its way."""

    def __init__(self, worker, inner, is_ahead):
        self._worker, self._inner, self._is_ahead = worker, inner, is_ahead
        self._result = None

    def result(self):
        if self._result is None:
            self._result = self._inner.result()
            self._worker.waiting -= 1
            if self._is_ahead:
                tokens = [[t ^ 1 for t in tokens] for tokens in self._result.sampled_token_ids]
                self._result = msgspec.structs.replace(self._result, sampled_token_ids=tokens)
        return self._result


class TiresAfterTwoRequests(DefaultWorker):
    """Gives other tokens once it has served two requests."""

    def submit(self, batch):
        self.served = getattr(self, "served", 0) + len(batch.new_requests)
        result = super().submit(batch).result()
        if self.served > 2:
            tokens = [[t ^ 1 for t in tokens] for tokens in result.sampled_token_ids]
            result = msgspec.structs.replace(result, sampled_token_ids=tokens)
        return CompletedStep(result)


class DependsOnEarlierWorkers(TorchDevice):
    """Keeps something of the engine before, which a fresh process does not have."""

    num_workers = 0

    def make_worker(self, config: WorkerConfig) -> Worker | None:
        self.num_workers += 1
        return DefaultWorker(self, config) if self.num_workers == 1 else _Flips(self, config)


class _Flips(DefaultWorker):
    def submit(self, batch):
        result = super().submit(batch).result()
        tokens = [[t ^ 1 for t in tokens] for tokens in result.sampled_token_ids]
        return CompletedStep(msgspec.structs.replace(result, sampled_token_ids=tokens))


def asynchronous(worker: type[DefaultWorker]) -> TorchDevice:
    """A worker on a device whose steps may overlap."""

    class Working(SimDevice):
        def make_worker(self, config: WorkerConfig) -> Worker | None:
            return worker(self, config)

    return Working()


@dataclass(frozen=True, slots=True, kw_only=True)
class Saboteur:
    """One broken backend, and the test that must catch it with these words."""

    name: str
    device: Callable[[], TorchDevice]
    test: str
    words: str
    communicator: str = "GlooCommunicator"
    """Of `COMMUNICATORS`, where the test needs several processes."""


def _broken(name: str, device: Callable[[], TorchDevice], test: str, words: str) -> Saboteur:
    return Saboteur(name=name, device=device, test=f"test_{test}", words=words)


def _ops(cls: type[Ops], test: str, words: str, **claims: object) -> Saboteur:
    return _broken(cls.__name__, lambda: make_device(ops=cls, **claims), test, words)


def _attention(cls: type[ReferenceAttention], test: str, words: str) -> Saboteur:
    return _broken(cls.__name__, lambda: make_device(attention=cls), test, words)


def _engine(cls: type[DefaultWorker], test: str, words: str) -> Saboteur:
    name = f"{cls.__name__}-{test.partition('[')[0]}"
    return _broken(name, lambda: with_worker(cls), f"{_SERVES}{test}", words)


def _scaled(cls: type[GlooCommunicator], test: str, words: str) -> Saboteur:
    name = cls.__name__
    return Saboteur(
        name=name,
        device=lambda: open_scaled(0),
        test=f"test_l4_scale.py::test_{test}",
        words=words,
        communicator=name,
    )


_EXTENDS = "extensions.py::test_"
_SERVES = "l3_engine.py::test_"
_OPS, _SAMPLE = "l1_ops.py::test_", "l1_sampling.py::test_"
_ATTEND, _BOOTS, _RUNS = "l1_attention.py::test_", "l0_boots.py::test_", "l2_runner.py::test_"

SABOTEURS: tuple[Saboteur, ...] = (
    _ops(NextRow, f"{_OPS}numerics[embedding-h64-float32-normal]", "copied bit for bit"),
    _ops(
        HalfAccumulation, f"{_OPS}numerics[linear-k1024-bfloat16-normal]", "accumulate in float32"
    ),
    _ops(ForgetsBias, f"{_OPS}numerics[linear-k96-bias-float32-normal]", "add the bias"),
    _ops(
        EpsOutsideTheRoot,
        f"{_OPS}numerics[rms_norm-h64-float32-small]",
        "eps added inside the root",
    ),
    _ops(MemoisesByShape, f"{_OPS}new_data[rms_norm-float32]", "same shapes and new data"),
    _ops(MutatesInputs, f"{_OPS}purity[rms_norm-float32]", "the input 'x' was changed"),
    _ops(WritesPastTheEnd, f"{_OPS}purity[soft_cap-float32]", "memory around 'x' was overwritten"),
    _ops(LeavesResidual, f"{_OPS}numerics[add_rms_norm-h64-float32-normal]", "goes into residual"),
    _ops(
        NormalisesBeforeRounding,
        f"{_OPS}numerics[add_rms_norm-h33-bfloat16-normal]",
        "what is normalised",
    ),
    _ops(
        SwapsHalves,
        f"{_OPS}numerics[gated_activation-silu-i48-float32-normal]",
        "first half is activated",
    ),
    _ops(
        WrongGelu, f"{_OPS}numerics[gated_activation-gelu-i48-float32-normal]", "right form of GELU"
    ),
    _ops(PositionOffByOne, f"{_OPS}numerics[rotary-half-float32-normal]", "rotary"),
    _ops(SwapsPairs, f"{_OPS}numerics[rotary-interleaved-float16-normal]", "is_interleaved"),
    _ops(CapsTwice, f"{_OPS}numerics[soft_cap-cap30-float32-normal]", "cap * tanh"),
    _ops(
        SkipsByException,
        f"{_OPS}numerics[soft_cap-cap30-float32-normal]",
        "only the suite may skip",
    ),
    _ops(
        RefusesWhatItClaims,
        f"{_OPS}numerics[soft_cap-cap30-float32-normal]",
        "serve it, or do not claim it",
    ),
    _ops(PenalisesTwice, f"{_OPS}numerics[apply_penalties-small-float32-normal]", "Once an entry"),
    _ops(
        DividesNegatives, f"{_OPS}numerics[apply_penalties-wide-float32-normal]", "repetition first"
    ),
    _ops(AssignsBias, f"{_OPS}numerics[add_bias-small-float32-normal]", "add_bias"),
    _ops(
        ReadsTheSignBitAsSign,
        f"{_OPS}numerics[apply_token_mask-small-float32-normal]",
        "the sign bit is a bit like others",
    ),
    _ops(ForbidsEveryRow, f"{_OPS}numerics[keep_only-small-float32-normal]", "other rows stay"),
    _ops(LogBaseTwo, f"{_OPS}numerics[logprobs-small-float32-normal]", "log_softmax"),
    _ops(
        TiesShareTheWorseRank,
        f"{_OPS}numerics[logprobs-wide-float32-small]",
        "ties share the better rank",
    ),
    _ops(Noisy, f"{_OPS}repeats[linear-float32]", "gave other bits"),
    _ops(
        DependsOnTheBatch,
        f"{_OPS}alone_equals_batch[linear-bfloat16]",
        "other bits alone",
        determinism="batch_invariant",
    ),
    _ops(IgnoresUniform, f"{_SAMPLE}same_logits_new_uniform[v50]", "must follow settings.uniform"),
    _ops(LastOfTies, f"{_SAMPLE}greedy_ties[v300]", "Ties go to the lowest id"),
    _ops(ForgetsTemperature, f"{_SAMPLE}draws[v50]", "after the temperature"),
    _ops(TopKBreaksTies, f"{_SAMPLE}top_k_ties[v50]", "tie with the k-th"),
    _ops(TopKOffByOne, f"{_SAMPLE}top_k[v50]", "exactly the k largest"),
    _ops(TopPOffByOne, f"{_SAMPLE}top_p[v50]", "makes the sum reach top_p"),
    _ops(MinPOfOne, f"{_SAMPLE}min_p[v50]", "row's largest probability"),
    _attention(IgnoresBlockTable, f"{_ATTEND}decode[mha-d64-b16-float32]", "block table"),
    _attention(DropsLastToken, f"{_ATTEND}needle[last-2048-bfloat16]", "the last of 2048 tokens"),
    _attention(HalfSums, f"{_ATTEND}decode[gqa4-d64-b32-bfloat16]", "accumulated in float32"),
    _attention(ReadsAllBlocks, f"{_ATTEND}unused_slots[gqa2-float32]", "NaN in unused slots"),
    _attention(ReadsBeforeTheWindow, f"{_ATTEND}kinds[window20-float32]", "may belong to others"),
    _attention(SeesTheFuture, f"{_ATTEND}causality[gqa2-float32]", "the future is seen"),
    _attention(NoSoftCap, f"{_ATTEND}kinds[softcap-float32]", "soft_cap=0.8"),
    _attention(DoubledSoftCap, f"{_ATTEND}kinds[softcap-bfloat16]", "cap * tanh"),
    _attention(WindowOffByOne, f"{_ATTEND}kinds[window20-float16]", "p - window < j <= p"),
    _attention(WrongScale, f"{_ATTEND}prefill[mha-d64-b16-float32]", "float64 oracle"),
    _attention(WrongGroups, f"{_ATTEND}gqa_equals_mha[gqa2-float16]", "h // (heads / key heads)"),
    _attention(
        WritesTheNeighbour, f"{_ATTEND}cache_writes[gqa2-float32]", "belong to another request"
    ),
    _attention(CopiesOneBlock, f"{_ATTEND}block_moves[gqa2-float32]", "copy_blocks"),
    _attention(UnderstatesItsBlocks, f"{_BOOTS}allocates_and_frees", "plan for less than is taken"),
    _attention(
        UntypedOutOfMemory, f"{_BOOTS}out_of_memory_is_typed", "instead of DeviceOutOfMemory"
    ),
    _broken(
        "LiesAboutMemory",
        lambda: make_device(base=LiesAboutMemory),
        f"{_BOOTS}memory_is_sane",
        "between 0 and the total",
    ),
    _broken(
        "Racing", lambda: with_queue(RacingQueue), f"{_BOOTS}queue_keeps_order", "out of order"
    ),
    _broken(
        "EarlyEvent",
        lambda: with_queue(EarlyEventQueue),
        f"{_BOOTS}staging_may_rest",
        "done before its copy",
    ),
    _broken(
        "ForgetsSeeds",
        lambda: with_worker(ForgetsSeeds),
        f"{_RUNS}seeds[float32]",
        "is the seed used",
    ),
    _broken(
        "SeedsByBatch",
        lambda: with_worker(SeedsByBatch),
        f"{_RUNS}seeds[float32]",
        "whatever else happens",
    ),
    _broken(
        "IgnoresNewBlocks",
        lambda: with_worker(IgnoresNewBlocks),
        f"{_RUNS}chunked_prefill[chunk33-float32]",
        "float64 model",
    ),
    _broken(
        "PositionInRunner",
        lambda: make_device(ops=PositionOffByOne),
        f"{_RUNS}greedy[float32]",
        "less likely",
    ),
    _broken(
        "SumsInRunner",
        lambda: make_device(ops=DependsOnTheBatch, determinism="invariant"),
        f"{_RUNS}same_bits_in_any_batch[float32]",
        "other bits in a batch",
    ),
    _engine(KeepsTheFinished, "many_short_requests_leak_nothing", "told to forget"),
    _engine(NeverForgets, "many_short_requests_leak_nothing", "the engine died"),
    _engine(AnswersByBatch, "concurrent_equals_alone[float32]", "must not depend on the others"),
    _engine(AnswersByBatch, "aborts_leave_nothing", "among requests that were aborted"),
    _engine(LosesItsOutput, "preemption_in_a_tight_cache", "preempted"),
    _engine(IgnoresPrefixes, "prefix_hits", "from the prefix cache"),
    _engine(DrawsAnew, "seeds", "random number i of its seed"),
    _engine(ForgetsSeedsWhenSubmitted, "several_outputs", "each has its own seed"),
    _broken(
        "AliveOnce",
        lambda: make_device(base=AliveOnce),
        f"{_SERVES}restarts_in_one_process",
        "the driver is open already",
    ),
    _broken(
        "RefusesWithoutReason",
        lambda: make_device(base=RefusesWithoutReason),
        f"{_BOOTS}groups_beyond_the_claim_are_refused",
        "instead of UnsupportedError with its reason",
    ),
    _scaled(SkipsLastRank, "all_reduce[world2-float32]", "each counted once"),
    _scaled(SumsInHalf, "all_reduce[world3-float32]", "the sum over all ranks"),
    _scaled(GathersBackwards, "all_gather[world3-float16]", "in the order of the ranks"),
    _scaled(SendsFromItsNeighbour, "broadcast[world3-bfloat16]", "broadcast from rank 0 brought"),
    _scaled(ForgetsToWrite, "broadcast[world2-int64]", "did not write it into x"),
    _scaled(WaitsForNobody, "barrier[world2]", "passed barriers when"),
    _scaled(RaisesWhatTorchRaises, "lost_rank_is_an_error[world2]", "must get a DeviceError"),
    _broken(
        "KeepsItsFirstAnswer",
        lambda: with_graphs(lambda: SoftwareGraphs(KeepsItsFirstAnswer)),
        f"{_EXTENDS}graphs_recordings_are_read_anew[float32]",
        "less likely",
    ),
    _broken(
        "OtherBitsWhenReplayed",
        lambda: with_graphs(lambda: SoftwareGraphs(OtherBitsWhenReplayed)),
        f"{_EXTENDS}graphs_replay_equals_eager[float32]",
        "replays the same bits",
    ),
    _broken(
        "LengthsOfTheRecording",
        lambda: with_graphs(SoftwareGraphs, HostLengthsAttention),
        f"{_EXTENDS}graphs_replay_equals_eager[float32]",
        "replayed decode steps",
    ),
    _broken(
        "RefusesToRecord",
        lambda: with_graphs(RefusesToRecord),
        f"{_EXTENDS}graphs_replay_equals_eager[float32]",
        "was replayed",
    ),
    _broken(
        "LosesStepsAhead",
        lambda: asynchronous(LosesStepsAhead),
        f"{_SERVES}overlap_changes_nothing",
        "with steps that overlap",
    ),
    _engine(TiresAfterTwoRequests, "stop_and_stream", "it must end with the first"),
    _broken(
        "DependsOnEarlierWorkers",
        lambda: make_device(base=DependsOnEarlierWorkers),
        f"{_SERVES}own_process_equals_this_one",
        "that a fresh process does not have",
    ),
)
