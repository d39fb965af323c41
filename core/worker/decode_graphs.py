"""Decode steps recorded once for each number of requests, and replayed with new data.

Used where a device's `step_mode` is not `eager` and it offers `graphs`. Recorded work reads buffers
at fixed addresses, so a replay first copies the step's tensors there. What a plan learns from the
host while it is recorded is the worst case: it must take lengths from the device's tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quire.core.errors import UnsupportedError
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
        self._graphs = graphs
        self._max_model_len = model.max_model_len
        self._sizes = _sizes(device.capabilities.request_buckets, max_requests)
        self.buckets = Buckets(self._sizes, self._sizes)
        """Decode steps are padded to these: a token for each request."""
        self._captured: dict[int, CapturedStep | None] = {}
        block_sizes = [group.spec.block_size for group in model.attention_groups]
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

        Records it first if it is the first of its size. None: it must run eagerly.
        """
        num_requests = len(tensors["seq_lens"])
        if num_requests not in self._captured:
            self._captured[num_requests] = self._capture(num_requests, forward)
        captured = self._captured[num_requests]
        if captured is None:
            return None
        static = self._of_size(num_requests)
        for name, target in static.items():
            if name in tensors:
                source = tensors[name]
                (target[:, : source.shape[1]] if source.dim() == 2 else target).copy_(source)
        captured.replay()
        return static["hidden"]

    def release(self) -> None:
        """Drops every recording."""
        self._captured.clear()
        self._graphs.release()

    def _capture(self, num_requests: int, forward: Forward) -> CapturedStep | None:
        static = self._of_size(num_requests)
        batches = [
            self._worst_batch(static, group, num_requests) for group in range(_num_groups(static))
        ]

        def step() -> None:
            static["hidden"].copy_(forward(static, batches))

        try:
            return self._graphs.capture(f"decode of {num_requests} requests", step)
        except UnsupportedError as error:
            _LOGGER.warning("decodes of %d requests run eagerly: %s", num_requests, error)
            return None

    def _of_size(self, num_requests: int) -> dict[str, Tensor]:
        """The first rows of every buffer."""
        return {
            name: buffer[: num_requests + (name == "query_start_loc")]
            for name, buffer in self._static.items()
        }

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


def _num_groups(static: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("block_table.") for name in static)
