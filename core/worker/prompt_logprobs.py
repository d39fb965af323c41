"""Log-probabilities of prompt tokens, for those who asked, a slice of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from quire.core.interface import Ops
from quire.core.models.language_model import LanguageModel
from quire.core.worker.input_batch import InputBatch
from quire.core.worker.sampler import logprob_fields, write_logprobs
from quire.core.worker.sampling_settings import PROMPT_LOGPROBS
from quire.core.worker.staging import Field
from quire.core.worker.step_arrays import Array, Int64s, StepRows

PREFIX = "prompt_"
MAX_SLICE_BYTES = 64 * 2**20
"""Of float32 logits held at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPart:
    """The prompt positions of one request that a step computes."""

    request_id: str
    begin: int
    """Its first row among those of all parts."""
    end: int
    num_top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """All prompt positions of a step after which somebody wants the next token's probability."""

    parts: list[PromptPart]
    arrays: dict[str, Array]
    """`prompt_rows` [P] of the hidden states, `prompt_targets` [P]: the tokens that follow."""
    num_top: int

    @property
    def num_rows(self) -> int:
        """P."""
        return self.parts[-1].end

    def fields(self, vocab_size: int) -> list[Field]:
        """What `run` writes."""
        return logprob_fields(PREFIX, self.num_rows, min(self.num_top, vocab_size))


def make_prompt_rows(
    requests: InputBatch, step: StepRows, last_tokens: Int64s
) -> PromptRows | None:
    """The prompt positions that a step computes for those who asked; None: there are none."""
    asks = np.flatnonzero(requests.settings.features[step.rows] & PROMPT_LOGPROBS)
    parts: list[PromptPart] = []
    flat: list[Int64s] = []
    targets: list[int] = []
    for index in asks.tolist():
        state = requests.states(step.rows[index : index + 1])[0]
        begin = int(step.num_computed[index])
        # Position p tells of token p + 1, so the prompt's last position tells of the output.
        count = min(begin + int(step.num_new[index]), state.num_prompt_tokens - 1) - begin
        if count <= 0:
            continue
        start = int(last_tokens[index]) + 1 - int(step.num_new[index])
        flat.append(np.arange(start, start + count))
        targets += state.tokens[begin + 1 : begin + 1 + count]
        done = parts[-1].end if parts else 0
        num_top = state.sampling.num_prompt_logprobs or 0
        parts.append(
            PromptPart(request_id=state.request_id, begin=done, end=done + count, num_top=num_top)
        )
    if not parts:
        return None
    arrays: dict[str, Array] = {
        "prompt_rows": np.concatenate(flat),
        "prompt_targets": np.array(targets, np.int64),
    }
    return PromptRows(parts=parts, arrays=arrays, num_top=max(part.num_top for part in parts))


def run_prompt_logprobs(
    model: LanguageModel,
    ops: Ops,
    hidden: Tensor,
    tensors: Mapping[str, Tensor],
    out: Mapping[str, Tensor],
    *,
    max_slice_bytes: int = MAX_SLICE_BYTES,
) -> None:
    """Writes the log-probabilities of `prompt_targets` after `prompt_rows` of hidden [T, H].

    Mutates the fields of `out` that begin with `prompt_`. Holds logits of at most
    `max_slice_bytes`, or of one position.
    """
    rows, targets = tensors["prompt_rows"], tensors["prompt_targets"]
    vocab_size = model.description.vocab_size
    for piece in _slices(len(rows), max(1, max_slice_bytes // (4 * vocab_size))):
        logits = model.logits(hidden.index_select(0, rows[piece])).float()
        write_logprobs(ops, logits, targets[piece], out, PREFIX, piece)


def _slices(size: int, step: int) -> Iterator[slice]:
    for begin in range(0, size, step):
        yield slice(begin, min(begin + step, size))
