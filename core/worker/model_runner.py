"""One step of a model on one device.

    StepBatch -> columns (InputBatch) -> flat arrays -> one upload
    -> attention plans -> model -> logits of the sampled rows -> Sampler
    -> one download -> StepResult

Everything between the copies touches device tensors alone and runs in the device's queue, so an
asynchronous device has the next step waiting while it computes this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.core.errors import DeviceLost
from quire.core.interface import (
    AttentionBatch,
    Device,
    LayerCache,
    StepBatch,
    WorkerConfig,
)
from quire.core.models.language_model import LanguageModel
from quire.core.models.step_context import StepContext
from quire.core.models.step_images import RequestImages
from quire.core.worker.buckets import Buckets
from quire.core.worker.decode_graphs import make_decode_graphs
from quire.core.worker.device_errors import device_errors
from quire.core.worker.host_features import HostFeature, new_features
from quire.core.worker.input_batch import BatchChange, InputBatch
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.prepared_step import PreparedStep, continued_step, prepare_step
from quire.core.worker.prompt_logprobs import run_prompt_logprobs
from quire.core.worker.request_state import RequestState
from quire.core.worker.running_step import RunningStep
from quire.core.worker.sampler import Sampler
from quire.core.worker.staging import Field, StagingBuffer
from quire.core.worker.step_arrays import Array, Int64s, StepArrays, StepRows
from quire.core.worker.step_results import StepOutline


@dataclass(slots=True)
class StepBuffers:
    """The buffers of one step in flight."""

    inputs: StagingBuffer
    outputs: StagingBuffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepWork:
    """The device's part of one step: everything it needs, in device tensors and host facts."""

    runner: ModelRunner
    arrays: StepArrays
    outline: StepOutline
    may_replay: bool
    """A decode step, padded so that a recording of it can be replayed."""
    features: Sequence[HostFeature]
    """What new requests bring besides tokens."""
    images: Sequence[RequestImages]
    """Of the requests whose prompts show images."""
    tensors: Mapping[str, Tensor]
    out: Mapping[str, Tensor]

    def __call__(self) -> None:
        """Runs the step. Mutates `out`, the cache and the runner's last tokens."""
        with torch.inference_mode(), device_errors("activations"):
            self.runner.run(self)


class ModelRunner:
    """Runs steps of one model. Used by one thread."""

    def __init__(
        self,
        model: LanguageModel,
        device: Device,
        caches: Sequence[LayerCache],
        config: WorkerConfig,
        processors: LogitsProcessors,
    ) -> None:
        """`caches` has one for each layer.

        Raises: UnsupportedError if the device has no bucket for the largest step.
        """
        claims = device.capabilities
        self._model = model
        self._device = device
        self._caches = caches
        self._buckets = Buckets.of(
            claims, max_tokens=config.max_num_batched_tokens, max_requests=config.max_num_seqs
        )
        self._graphs = make_decode_graphs(device, model, config.max_num_seqs)
        self._lost: DeviceLost | None = None
        depth = 2 if claims.is_asynchronous else 1
        self._ring = deque(
            StepBuffers(StagingBuffer(device), StagingBuffer(device)) for _ in range(depth)
        )
        self._in_flight: deque[RunningStep] = deque()
        self._last: PreparedStep | None = None
        """The step that was submitted last, unless it was taken back."""
        # A row is free again when the step that forgot its request is done.
        capacity = config.max_num_seqs * (1 + depth)
        self.requests = InputBatch(
            capacity=capacity,
            max_model_len=model.max_model_len,
            block_sizes=[group.spec.block_size for group in model.attention_groups],
            vocab_size=model.description.vocab_size,
            processors=processors,
            index_dtype=claims.index_dtype,
            max_source_tokens=[group.max_tokens for group in model.attention_groups],
        )
        self._sampler = Sampler(
            device,
            processors,
            vocab_size=model.description.vocab_size,
            # With guesses every token of a step may be sampled after.
            max_rows=max(
                [config.max_num_seqs, config.max_num_batched_tokens, *claims.request_buckets]
            ),
        )
        # One more: where the tokens of padding rows go.
        self._last_tokens = torch.zeros(capacity + 1, dtype=torch.int64, device=device.torch_device)

    # --- on the host ----------------------------------------------------------------------------

    def submit(self, batch: StepBatch) -> RunningStep:
        """Starts one step. If it cannot be started, the batch of requests is as it was before.

        Raises: QuireError for a batch that does not fit; DeviceOutOfMemory, DeviceLost.
        """
        if self.requests.must_settle(batch.request_ids):
            self.finish_steps(0)
        self.finish_steps(len(self._ring) - 1)
        change = self.requests.apply(batch)
        try:
            with device_errors("workspace"):
                step = self._start(batch, change)
        except BaseException as error:
            self._last = None
            self._lost = error if isinstance(error, DeviceLost) else self._lost
            self.requests.undo(change)
            raise
        self._in_flight.append(step)
        return step

    def finish_steps(self, num_left: int) -> None:
        """Waits for the oldest steps until at most `num_left` are in flight.

        Raises: what a step raised; it and those after it have then not happened.
        """
        while len(self._in_flight) > num_left:
            step = self._in_flight.popleft()
            try:
                step.finish()
            except Exception as error:
                self._cancel(step, error)
                raise

    def finish_until(self, step: RunningStep) -> None:
        """Finishes steps in their order, up to and with this one. Raises as `finish_steps` does."""
        behind = list(self._in_flight).index(step)
        self.finish_steps(len(self._in_flight) - behind - 1)

    def forget_all(self) -> None:
        """Forgets every request; waits for the steps in flight."""
        self.finish_steps(0)
        self._last = None
        self.requests.forget_all()

    def check_alive(self) -> None:
        """Raises: DeviceLost, if a step has found the device gone."""
        if self._lost is not None:
            raise self._lost

    def defer_recordings(self) -> bool:
        """From now on decode steps run eagerly until `record_next` has recorded their size.

        Returns whether decode steps are recorded at all.
        """
        if self._graphs is not None:
            self._graphs.defer()
        return self._graphs is not None

    def record_next(self) -> bool:
        """Records decode steps of one more size; whether others are left. Raises: DeviceLost."""
        graphs = self._graphs
        if graphs is None or not graphs.has_deferred:
            return False

        def record() -> None:
            with torch.inference_mode(), device_errors("graphs"):
                graphs.capture_next(self._forward)

        try:
            self._device.queue().run(record)
        except DeviceLost as error:
            self._lost = error
            raise
        return graphs.has_deferred

    @property
    def graph_bytes(self) -> int:
        """Memory of recordings and of the buffers that they read."""
        return 0 if self._graphs is None else self._graphs.size_bytes

    def release(self) -> None:
        """Drops recordings; no step may follow."""
        if self._graphs is not None:
            self._graphs.release()

    @property
    def workspace_bytes(self) -> int:
        """Memory of the buffers on the device."""
        buffers = [b for pair in self._ring for b in (pair.inputs, pair.outputs)]
        return sum(buffer.size_bytes for buffer in buffers)

    def _cancel(self, failed: RunningStep, error: Exception) -> None:
        """Takes back a step that failed, and those that were built on it."""
        self._lost = error if isinstance(error, DeviceLost) else self._lost
        self._last = None
        later = list(self._in_flight)
        self._in_flight.clear()
        for step in reversed(later):
            step.cancel(error, is_cause=False)
        failed.cancel(error, is_cause=True)
        for step in (failed, *later):
            step.drain()

    def _start(self, batch: StepBatch, change: BatchChange) -> RunningStep:
        prepared = self._prepare(batch)
        outline = prepared.outline
        inputs = self._inputs(prepared)
        buffers = self._ring[0]
        fields = self._outputs(outline)
        work = StepWork(
            runner=self,
            arrays=prepared.arrays,
            outline=outline,
            may_replay=prepared.may_replay,
            features=new_features(batch),
            images=self._images(prepared.step, prepared.arrays, outline.states),
            tensors=buffers.inputs.upload(inputs),
            out=buffers.outputs.outputs(fields),
        )
        queue = self._device.queue()
        queue.run(work)
        result = buffers.outputs.download(fields)
        event = queue.record()
        self._ring.rotate(-1)
        self.requests.append_sampled(prepared.sampled_rows, prepared.sampled_states, change)
        self._last = prepared
        return RunningStep(self, outline, change, result, event)

    def _prepare(self, batch: StepBatch) -> PreparedStep:
        """From the step before if this one only goes on, anew otherwise. Raises: QuireError."""
        if self._last is not None:
            prepared = continued_step(self._last, batch, self.requests)
            if prepared is not None:
                return prepared
        step, graphs = self.requests.scheduled(batch), self._graphs
        may_replay = graphs is not None and graphs.takes(step)
        buckets = graphs.buckets if graphs is not None and may_replay else self._buckets
        return prepare_step(
            batch,
            self.requests,
            buckets,
            step,
            may_replay=may_replay,
            pads_logits=self._buckets.pads_requests,
        )

    def _images(
        self, step: StepRows, arrays: StepArrays, states: Sequence[RequestState]
    ) -> list[RequestImages]:
        """What the model is told of the requests whose prompts show images or are seen whole."""
        if not self._model.description.accepts:
            return []
        found = []
        for index, state in enumerate(states):
            shown = state.shown
            if shown or self._model.description.sees_whole_prompts:
                row, begin = state.row, int(arrays.query_start_loc[index])
                images = RequestImages(
                    begin=begin,
                    num_computed=int(step.num_computed[index]),
                    num_new=int(step.num_new[index]),
                    prompt_ids=state.tokens[: state.num_prompt_tokens],
                    features=shown,
                    block_ids=[table[row].copy() for table in self.requests.block_tables],
                    memo=state.memo,
                )
                found.append(images)
        return found

    def _outputs(self, outline: StepOutline) -> list[Field]:
        fields = self._sampler.outputs(outline.sampling)
        if outline.prompt is not None:
            fields += outline.prompt.fields(self._model.description.vocab_size)
        return fields

    def _inputs(self, prepared: PreparedStep) -> dict[str, Array]:
        """All that goes to the device, by name."""
        step, arrays, logits = prepared.step, prepared.arrays, prepared.logits
        outline = prepared.outline
        inputs: dict[str, Array] = {
            "token_ids": self._token_ids(prepared),
            "positions": arrays.positions,
            "query_start_loc": arrays.query_start_loc,
            "seq_lens": arrays.seq_lens,
        }
        for group, table in enumerate(arrays.block_tables):
            inputs[f"block_table.{group}"] = table
            if group not in self.requests.source_groups:
                inputs[f"slot_mapping.{group}"] = arrays.slot_mappings[group]
        if arrays.source_lens is not None:
            inputs["source_lens"] = arrays.source_lens
        num_logits = outline.sampling.num_rows
        inputs["logit_rows"] = _padded(logits.flat, num_logits, 0)
        if len(self._ring) > 1:
            nobody = len(self._last_tokens) - 1
            # What follows guesses is read on the host before its request runs again.
            owners = np.where(logits.is_guessing, nobody, step.rows[logits.requests])
            inputs["sampled_rows"] = _padded(owners, num_logits, nobody)
            waiting = self.requests.on_their_way(step)
            inputs["waiting_tokens"] = arrays.last_tokens[waiting]
            inputs["waiting_rows"] = step.rows[waiting]
        inputs |= outline.sampling.arrays
        if outline.prompt is not None:
            inputs |= outline.prompt.arrays
        return inputs

    def _token_ids(self, prepared: PreparedStep) -> Int64s:
        num_tokens = prepared.arrays.num_tokens
        if prepared.is_pure_decode:
            return self.requests.last_token_ids(prepared.sampled_rows, num_tokens)
        drafts = prepared.outline.batch.draft_token_ids
        return self.requests.token_ids(
            prepared.step, prepared.arrays.last_tokens, num_tokens, drafts
        )

    # --- on the device --------------------------------------------------------------------------

    def run(self, work: StepWork) -> None:
        """The device's part of a step; `StepWork` calls it when its turn in the queue comes."""
        tensors, out, outline = work.tensors, work.out, work.outline
        self._fetch_waiting_tokens(tensors)
        hidden = self._hidden(work)
        if outline.sampling.num_rows:
            logits = self._model.logits(hidden.index_select(0, tensors["logit_rows"]))
            self._sampler.run(logits, outline.sampling, tensors, out, outline.failures)
            if "sampled_rows" in tensors:
                self._last_tokens.index_copy_(0, tensors["sampled_rows"], out["tokens"])
        if outline.prompt is not None:
            run_prompt_logprobs(self._model, self._device.ops(), hidden, tensors, out)

    def _fetch_waiting_tokens(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills in tokens that the step before sampled and that the host has not seen."""
        rows = tensors.get("waiting_rows")
        if rows is not None and len(rows):
            tokens = self._last_tokens.index_select(0, rows)
            tensors["token_ids"].index_copy_(0, tensors["waiting_tokens"], tokens)

    def _hidden(self, work: StepWork) -> Tensor:
        """Hidden states [T, H] of a step, replayed where it was recorded."""
        if self._graphs is not None and work.may_replay:
            hidden = self._graphs.run(work.tensors, self._forward)
            if hidden is not None:
                return hidden
        groups = range(len(self._model.attention_groups))
        batches = [_attention_batch(work.arrays, work.tensors, group) for group in groups]
        return self._forward(work.tensors, batches, work)

    def _forward(
        self,
        tensors: Mapping[str, Tensor],
        batches: Sequence[AttentionBatch],
        work: StepWork | None = None,
    ) -> Tensor:
        """Plans, and runs the model; `batches` has one for each cache group."""
        backends = self._model.attention_backends
        plans = [backend.plan(batch) for backend, batch in zip(backends, batches, strict=True)]
        context = StepContext(
            token_ids=tensors["token_ids"],
            positions=tensors["positions"],
            caches=self._caches,
            plans=plans,
            features=[f.on(self._device.torch_device) for f in (work.features if work else ())],
            images=work.images if work else (),
        )
        return self._model.forward(context)


def _attention_batch(
    arrays: StepArrays, tensors: Mapping[str, Tensor], group: int
) -> AttentionBatch:
    if f"slot_mapping.{group}" not in tensors:
        return _source_batch(arrays, tensors, group)
    return AttentionBatch(
        query_start_loc=tensors["query_start_loc"],
        seq_lens=tensors["seq_lens"],
        block_table=tensors[f"block_table.{group}"],
        slot_mapping=tensors[f"slot_mapping.{group}"],
        query_start_loc_host=arrays.query_start_loc.tolist(),
        seq_lens_host=arrays.seq_lens.tolist(),
        num_requests=arrays.num_requests,
        num_tokens=arrays.num_tokens,
        max_query_len=arrays.max_query_len,
        max_seq_len=arrays.max_seq_len,
    )


def _source_batch(arrays: StepArrays, tensors: Mapping[str, Tensor], group: int) -> AttentionBatch:
    """For a group whose blocks follow what requests bring: it has lengths, and no new slots."""
    assert arrays.source_lens is not None, group
    return AttentionBatch(
        query_start_loc=tensors["query_start_loc"],
        seq_lens=tensors["source_lens"],
        block_table=tensors[f"block_table.{group}"],
        slot_mapping=tensors["token_ids"][:0],
        query_start_loc_host=arrays.query_start_loc.tolist(),
        seq_lens_host=arrays.source_lens.tolist(),
        num_requests=arrays.num_requests,
        num_tokens=arrays.num_tokens,
        max_query_len=arrays.max_query_len,
        max_seq_len=int(arrays.source_lens.max()),
    )


def _padded(column: Int64s, size: int, value: int) -> Int64s:
    if len(column) == size:
        return column
    return np.concatenate([column, np.full(size - len(column), value, column.dtype)])
