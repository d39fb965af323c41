"""Decode steps recorded once for each number of requests, and replayed with new data.

Used where a device's `step_mode` is not `eager` and it offers `graphs`. A recording is made when
the first step of its size comes, or, after `defer`, one by one in moments that the engine chooses,
while such steps run eagerly. Recorded work reads buffers at fixed addresses, so a replay first
copies the step's tensors there. What a plan learns from the host while it is recorded is the worst
case: it must take lengths from the device's tensors.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quire.core.errors import DeviceOutOfMemory, UnsupportedError
from quire.core.interface import NULL_BLOCK, AttentionBatch, CapturedStep, Device, GraphCapture
from quire.core.models.language_model import LanguageModel
from quire.core.worker.buckets import Buckets
from quire.core.worker.step_arrays import StepRows

Forward = Callable[[Mapping[str, Tensor], Sequence[AttentionBatch]], Tensor]
"""(token_ids and positions, one batch for each group) to hidden states [T, H]."""

_LOGGER = logging.getLogger(__name__)


class DecodeGraphs:
    """The recordings of one model's decode steps, and the buffers that they read and write."""

    def __init__(
        self, device: Device, model: LanguageModel, graphs: GraphCapture, max_requests: int
    ) -> None:
        self._device = device
        self._graphs = graphs
        self._max_model_len = model.max_model_len
        self._sizes = _sizes(device.capabilities.request_buckets, max_requests)
        self.buckets = Buckets(self._sizes, self._sizes)
        """Decode steps are padded to these: a token for each request."""
        self._captured: dict[int, CapturedStep | None] = {}
        self._deferred: set[int] = set()
        self._num_missed: Counter[int] = Counter()
        self._has_told = False
        self._recorded_bytes = 0
        self._parts: dict[int, dict[str, Tensor]] = {}
        block_sizes = [group.spec.block_size for group in model.attention_groups]
        self._block_sizes = block_sizes
        index_dtype = getattr(torch, device.capabilities.index_dtype)
        self._static = _static_buffers(
            str(device.torch_device), self._sizes[-1], model, block_sizes, index_dtype
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of requests that have, or get, a recording."""
        return self._sizes

    def takes(self, step: StepRows) -> bool:
        """Whether a step is one token for each of its requests, and not too many."""
        return len(step.rows) <= self._sizes[-1] and int(step.num_new.max()) == 1

    def run(self, tensors: Mapping[str, Tensor], forward: Forward) -> Tensor | None:
        """Replays a step: hidden states [n, H], overwritten by the next replay.

        Records it first if it is the first of its size and was not deferred. None: it must run
        eagerly.
        """
        num_requests = len(tensors["seq_lens"])
        if num_requests in self._deferred:
            self._num_missed[num_requests] += 1
            return None
        if num_requests not in self._captured:
            self._captured[num_requests] = self._capture(num_requests, forward)
        captured = self._captured[num_requests]
        if captured is None:
            return None
        static = self._of_size(num_requests)
        self._graphs.fill(
            [
                (tensors[name], _as_wide(target, tensors[name]))
                for name, target in static.items()
                if name in tensors
            ]
        )
        captured.replay()
        return static["hidden"]

    def defer(self) -> None:
        """From now on steps do not wait for recordings: `capture_next` makes them."""
        self._num_missed.clear()
        self._deferred = set(self._sizes) - set(self._captured)

    @property
    def has_deferred(self) -> bool:
        """Whether `capture_next` has anything to do."""
        return bool(self._deferred)

    def capture_next(self, forward: Forward) -> None:
        """Makes one recording: of the size that ran eagerly most often, then of the largest.

        Where the device has no memory for it, steps of this size and larger ones stay eager, which
        is said once. Mutates the static buffers alone. Raises: DeviceLost.
        """
        num_requests = max(self._deferred, key=lambda size: (self._num_missed[size], size))
        free = self._device.memory().free_bytes
        try:
            self._captured[num_requests] = self._capture(num_requests, forward)
        except DeviceOutOfMemory as error:
            self._give_up(num_requests, error)
        self._deferred.discard(num_requests)
        if self._device.capabilities.copy_mode != "unified":
            self._recorded_bytes += max(0, free - self._device.memory().free_bytes)

    @property
    def size_bytes(self) -> int:
        """Of the static buffers, and what recordings made by `capture_next` took of the device."""
        return sum(buffer.nbytes for buffer in self._static.values()) + self._recorded_bytes

    def _give_up(self, num_requests: int, error: DeviceOutOfMemory) -> None:
        lost = {size for size in self._deferred if size >= num_requests}
        self._captured |= dict.fromkeys(lost)
        self._deferred -= lost
        if not self._has_told:
            self._has_told = True
            _LOGGER.warning(
                "decodes of %d and more requests run eagerly, without a recording: %s",
                num_requests,
                error,
            )

    def _make_harmless(self) -> None:
        """Warming up runs the step: what the last replay left must not be computed once more.

        Keys would be written as they were, but states would move on by a token.
        """
        for name, buffer in self._static.items():
            if name == "seq_lens":
                buffer.fill_(1)
            elif name.startswith("block_table."):
                buffer.fill_(NULL_BLOCK)
            elif name.startswith("slot_mapping."):
                buffer.fill_(NULL_BLOCK * self._block_sizes[int(name.partition(".")[2])])
            elif name in ("token_ids", "positions"):
                buffer.zero_()

    def release(self) -> None:
        """Drops every recording."""
        self._deferred.clear()
        self._captured.clear()
        self._graphs.release()

    def _capture(self, num_requests: int, forward: Forward) -> CapturedStep | None:
        static = self._of_size(num_requests)
        batches = [
            self._worst_batch(static, group, num_requests) for group in range(_num_groups(static))
        ]

        self._make_harmless()

        def step() -> None:
            static["hidden"].copy_(forward(static, batches))

        try:
            return self._graphs.capture(f"decode of {num_requests} requests", step)
        except UnsupportedError as error:
            _LOGGER.warning("decodes of %d requests run eagerly: %s", num_requests, error)
            return None

    def _of_size(self, num_requests: int) -> dict[str, Tensor]:
        """The first rows of every buffer; the same tensors each time."""
        parts = self._parts.get(num_requests)
        if parts is None:
            parts = {
                name: buffer[: num_requests + (name == "query_start_loc")]
                for name, buffer in self._static.items()
            }
            self._parts[num_requests] = parts
        return parts

    def _worst_batch(
        self, static: Mapping[str, Tensor], group: int, num_requests: int
    ) -> AttentionBatch:
        return AttentionBatch(
            query_start_loc=static["query_start_loc"],
            seq_lens=static["seq_lens"],
            block_table=static[f"block_table.{group}"],
            slot_mapping=static[f"slot_mapping.{group}"],
            query_start_loc_host=range(num_requests + 1),
            seq_lens_host=[self._max_model_len] * num_requests,
            num_requests=num_requests,
            num_tokens=num_requests,
            max_query_len=1,
            max_seq_len=self._max_model_len,
        )


def make_decode_graphs(
    device: Device, model: LanguageModel, max_requests: int
) -> DecodeGraphs | None:
    """The recordings of a device that claims and offers them; None: steps run eagerly."""
    if device.capabilities.step_mode == "eager" or not model.can_be_recorded:
        return None
    graphs = device.graphs()
    return None if graphs is None else DecodeGraphs(device, model, graphs, max_requests)


def _sizes(buckets: Sequence[int], max_requests: int) -> tuple[int, ...]:
    """The device's buckets, or powers of two, up to one that holds `max_requests`."""
    if buckets:
        return Buckets((), buckets).request_sizes(max_requests)
    powers = [1 << bits for bits in range(max_requests.bit_length()) if 1 << bits < max_requests]
    return (*powers, max_requests)


def _static_buffers(
    torch_device: str,
    size: int,
    model: LanguageModel,
    block_sizes: Sequence[int],
    index_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Buffers for the largest step, filled with one that harms nobody."""
    description = model.description
    hidden_dtype = getattr(torch, description.dtype)
    with torch.inference_mode(mode=False), torch.device(torch_device):
        buffers = {
            "token_ids": torch.zeros(size, dtype=torch.int64),
            "positions": torch.zeros(size, dtype=torch.int64),
            "query_start_loc": torch.arange(size + 1, dtype=torch.int32),
            "seq_lens": torch.ones(size, dtype=torch.int32),
            "hidden": torch.zeros((size, description.hidden_size), dtype=hidden_dtype),
        }
        for group, block_size in enumerate(block_sizes):
            width = -(-model.max_model_len // block_size)
            table = torch.full((size, width), NULL_BLOCK, dtype=index_dtype)
            slots = torch.full((size,), NULL_BLOCK * block_size, dtype=torch.int64)
            buffers |= {f"block_table.{group}": table, f"slot_mapping.{group}": slots}
    return buffers


def _as_wide(target: Tensor, source: Tensor) -> Tensor:
    """The part of a block table's buffer that a step's table fills."""
    return target[:, : source.shape[1]] if source.dim() == 2 else target


def _num_groups(static: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("block_table.") for name in static)
