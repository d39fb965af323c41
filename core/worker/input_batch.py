"""The requests that a worker remembers, in columns that persist from step to step.

A step changes a few rows and reads the scheduled ones, so preparing it costs a fixed number of
numpy calls. A step that fails is undone: the batch is then as if it had never come.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from quire.core.errors import QuireError
from quire.core.interface import NULL_BLOCK, NewRequest, StepBatch
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.request_state import RequestState, make_request_state
from quire.core.worker.sampling_settings import READS_HISTORY, SamplingSettings
from quire.core.worker.step_arrays import Int64s, RowIndex, StepRows


@dataclass(slots=True)
class BatchChange:
    """What one step changed, so that it can be undone, and rows be reused once it cannot."""

    forgotten: list[RequestState] = field(default_factory=list)
    added: list[RequestState] = field(default_factory=list)
    grown: list[tuple[int, int, int]] = field(default_factory=list)
    """(group, row, number of blocks before)."""
    sampled: list[RequestState] = field(default_factory=list)
    """Those to which a token on its way was appended."""


class InputBatch:
    """Columns with a row for each remembered request. Used by one thread."""

    def __init__(
        self,
        *,
        capacity: int,
        max_model_len: int,
        block_sizes: Sequence[int],
        vocab_size: int,
        processors: LogitsProcessors,
        index_dtype: str = "int32",
        max_source_tokens: Sequence[int | None] = (),
    ) -> None:
        """An empty batch.

        `max_source_tokens`: for each group, the most encoder tokens of a request, None where blocks
        follow its own tokens; empty: they do in all.
        """
        self.source_groups = frozenset(
            group for group, limit in enumerate(max_source_tokens) if limit is not None
        )
        limits = [max_model_len if limit is None else limit for limit in max_source_tokens]
        limits = limits or [max_model_len] * len(block_sizes)
        self.block_sizes = tuple(block_sizes)
        self.settings = SamplingSettings(capacity, vocab_size)
        self.block_tables = [
            np.full((capacity, -(-limit // size)), NULL_BLOCK, index_dtype)
            for size, limit in zip(block_sizes, limits, strict=True)
        ]
        """[rows, blocks] for each cache group; NULL_BLOCK past a request's last block."""
        self._vocab_size = vocab_size
        self._processors = processors
        self._num_blocks = np.zeros((len(self.block_sizes), capacity), np.int64)
        self._num_tokens = np.zeros(capacity, np.int64)
        self._num_prompt_tokens = np.zeros(capacity, np.int64)
        self._num_source_tokens = np.zeros(capacity, np.int64)
        self._last_token = np.zeros(capacity, np.int64)
        self._is_on_its_way = np.zeros(capacity, np.bool_)
        """The last token was sampled by a step whose result has not been read."""
        self._state_of_row: list[RequestState | None] = [None] * capacity
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(capacity))

    def __len__(self) -> int:
        return len(self._row_of)

    # --- changes --------------------------------------------------------------------------------

    def apply(self, batch: StepBatch) -> BatchChange:
        """Forgets, adds and appends what a step says. All or nothing.

        Raises: QuireError if the batch does not fit what the worker knows.
        """
        change = BatchChange()
        try:
            for request_id in batch.finished_request_ids:
                self._forget(request_id, change)
            for new in batch.new_requests:
                self._forget(new.request_id, change)
                self._add(new, change)
            self._check_known(batch.request_ids)
            for request_id, blocks in zip(batch.request_ids, batch.new_block_ids, strict=True):
                if blocks is not None:
                    self._append_blocks(self._row_of[request_id], blocks, change)
        except BaseException:
            self.undo(change)
            raise
        return change

    def undo(self, change: BatchChange) -> None:
        """Takes a change back. Of several, the last one first."""
        for state in change.sampled:
            state.tokens.pop()
            state.num_on_their_way -= 1
            self._note_tokens(state)
        for group, row, num_blocks in reversed(change.grown):
            self.block_tables[group][row, num_blocks:] = NULL_BLOCK
            self._num_blocks[group, row] = num_blocks
        for state in reversed(change.added):
            del self._row_of[state.request_id]
            self._release(state)
        for state in change.forgotten:
            self._row_of[state.request_id] = state.row

    def settle(self, change: BatchChange) -> None:
        """Says that a change will not be undone: the rows of forgotten requests are free."""
        for state in change.forgotten:
            self._release(state)

    def forget_all(self) -> None:
        """Forgets every request. No step may be in flight."""
        change = BatchChange()
        for request_id in list(self._row_of):
            self._forget(request_id, change)
        self.settle(change)

    def append_sampled(
        self, rows: RowIndex, states: Sequence[RequestState], change: BatchChange
    ) -> None:
        """Gives the requests in `rows` one more token, whose value is on its way."""
        self._num_tokens[rows] += 1
        self._is_on_its_way[rows] = True
        self._last_token[rows] = 0
        change.sampled.extend(states)
        for state in states:
            state.tokens.append(0)
            state.num_on_their_way += 1

    def fill_sampled(self, change: BatchChange, tokens: Sequence[Sequence[int]]) -> None:
        """Writes the values of the tokens that a step sampled. Steps settle in their order.

        Several for a request whose guesses were right; it has no other token on its way.
        """
        for state, values in zip(change.sampled, tokens, strict=True):
            token = values[-1]
            state.tokens[len(state.tokens) - state.num_on_their_way] = values[0]
            state.num_on_their_way -= 1
            if len(values) > 1:
                state.tokens.extend(values[1:])
                self._num_tokens[state.row] += len(values) - 1
            if state.seen is not None:
                state.seen.append(token)
            if not state.num_on_their_way and self._state_of_row[state.row] is state:
                self._last_token[state.row] = token
                self._is_on_its_way[state.row] = False

    # --- reading --------------------------------------------------------------------------------

    def scheduled(self, batch: StepBatch) -> StepRows:
        """The rows of a step and what it computes of each.

        Raises: QuireError if it computes tokens that a request does not have.
        """
        step = StepRows(
            rows=np.array(list(map(self._row_of.__getitem__, batch.request_ids)), np.int64),
            num_computed=np.array(batch.num_computed_tokens, np.int64),
            num_new=np.array(batch.num_new_tokens, np.int64),
        )
        has = self._num_tokens[step.rows]
        if batch.draft_token_ids:
            drafts = batch.draft_token_ids
            counts = [len(drafts.get(name, ())) for name in batch.request_ids]
            has = has + np.array(counts, np.int64)
        reaches_end = step.ends == has
        is_wrong = (step.ends > has) | (step.num_new < 1) | (batch.samples & ~reaches_end)
        if is_wrong.any():
            raise QuireError(self._mismatch(batch, int(np.flatnonzero(is_wrong)[0])))
        return step

    def token_ids(
        self,
        step: StepRows,
        last_tokens: Int64s,
        num_tokens: int,
        drafts: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> Int64s:
        """The tokens that a step computes, flat [num_tokens]; 0 where unknown or padding.

        `drafts`: what is guessed to follow the tokens of a request.
        """
        flat = np.zeros(num_tokens, np.int64)
        is_decode = (step.num_new == 1) & (step.ends == self._num_tokens[step.rows])
        flat[last_tokens[is_decode]] = self._last_token[step.rows[is_decode]]
        for request in np.flatnonzero(~is_decode).tolist():
            state = self._state_of_row[step.rows[request]]
            assert state is not None, request
            begin = int(step.num_computed[request])
            end = begin + int(step.num_new[request])
            start = int(last_tokens[request]) + 1 - (end - begin)
            guesses = drafts.get(state.request_id, ())
            known = end - len(guesses)
            flat[start : start + known - begin] = state.tokens[begin:known]
            flat[start + known - begin : start + end - begin] = guesses
        return flat

    def last_token_ids(self, rows: RowIndex, num_tokens: int) -> Int64s:
        """`token_ids` of a step that computes the last token of each of `rows`."""
        known = self._last_token[rows]
        flat = np.zeros(num_tokens, np.int64)
        flat[: len(known)] = known
        return flat

    def on_their_way(self, step: StepRows) -> Int64s:
        """Which requests of a step compute a token whose value only the device has."""
        is_last = step.ends == self._num_tokens[step.rows]
        return np.flatnonzero(self._is_on_its_way[step.rows] & is_last)

    def must_settle(self, request_ids: Sequence[str]) -> bool:
        """Whether a request needs the values of tokens that are still on their way."""
        if not self._is_on_its_way.any():
            return False
        known = [self._row_of[name] for name in request_ids if name in self._row_of]
        rows = np.array(known, np.int64)
        reads = (self.settings.features[rows] & READS_HISTORY) != 0
        return bool((reads & self._is_on_its_way[rows]).any())

    def output_indices(self, rows: Int64s) -> Int64s:
        """The place in the output of the next token of each row."""
        return self._num_tokens[rows] - self._num_prompt_tokens[rows]

    def num_source_tokens(self, rows: Int64s) -> Int64s:
        """What the model's encoder makes of that which each row brings."""
        return self._num_source_tokens[rows]

    def states(self, rows: npt.NDArray[np.int64]) -> list[RequestState]:
        """The requests in `rows`."""
        found = [self._state_of_row[row] for row in rows.tolist()]
        return [state for state in found if state is not None]

    def check_integrity(self) -> None:
        """Raises AssertionError if rows are lost, shared, or disagree with their requests."""
        used = sorted(self._row_of.values())
        assert len(set(used)) == len(used), used
        held = [row for row, state in enumerate(self._state_of_row) if state is not None]
        assert sorted(held + self._free_rows) == list(range(len(self._state_of_row))), held
        for request_id, row in self._row_of.items():
            state = self._state_of_row[row]
            assert state is not None, request_id
            assert (state.request_id, state.row) == (request_id, row), state
            assert self._num_tokens[row] == len(state.tokens), state
            assert self._last_token[row] == state.tokens[-1], state

    # --- rows -----------------------------------------------------------------------------------

    def _forget(self, request_id: str, change: BatchChange) -> None:
        row = self._row_of.pop(request_id, None)
        if row is None:
            return
        state = self._state_of_row[row]
        assert state is not None, request_id
        change.forgotten.append(state)

    def _add(self, new: NewRequest, change: BatchChange) -> None:
        if not self._free_rows:
            raise QuireError(
                f"request {new.request_id!r} is one more than the worker was built for; "
                "schedule at most max_num_seqs requests and name those that finished"
            )
        if not new.token_ids:
            raise QuireError(f"request {new.request_id!r} has no tokens; send at least one")
        row = heapq.heappop(self._free_rows)
        state = make_request_state(
            new, row=row, vocab_size=self._vocab_size, processors=self._processors
        )
        self._state_of_row[row] = state
        self._row_of[new.request_id] = row
        change.added.append(state)
        self._num_prompt_tokens[row] = new.num_prompt_tokens
        self._num_source_tokens[row] = state.num_source_tokens
        self._num_blocks[:, row] = 0
        for table in self.block_tables:
            table[row] = NULL_BLOCK
        self._note_tokens(state)
        self.settings.set(row, state.sampling)
        self._append_blocks(row, new.block_ids, change)

    def _note_tokens(self, state: RequestState) -> None:
        """Brings the columns up to a request's tokens."""
        self._num_tokens[state.row] = len(state.tokens)
        self._last_token[state.row] = state.tokens[-1]
        self._is_on_its_way[state.row] = state.num_on_their_way > 0

    def _append_blocks(self, row: int, blocks: list[list[int]], change: BatchChange) -> None:
        for group, ids in enumerate(blocks):
            if not ids:
                continue
            begin = int(self._num_blocks[group, row])
            table = self.block_tables[group]
            if begin + len(ids) > table.shape[1]:
                raise QuireError(
                    f"a request has {begin + len(ids)} blocks in cache group {group}; "
                    f"max_model_len holds {table.shape[1]}"
                )
            change.grown.append((group, row, begin))
            table[row, begin : begin + len(ids)] = ids
            self._num_blocks[group, row] = begin + len(ids)

    def _release(self, state: RequestState) -> None:
        self._state_of_row[state.row] = None
        heapq.heappush(self._free_rows, state.row)

    def _check_known(self, request_ids: Sequence[str]) -> None:
        unknown = [name for name in request_ids if name not in self._row_of]
        if unknown:
            raise QuireError(
                f"scheduled but unknown to the worker: {', '.join(unknown)}; bring them as new"
            )

    def _mismatch(self, batch: StepBatch, index: int) -> str:
        request_id = batch.request_ids[index]
        has = self._num_tokens[self._row_of[request_id]]
        begin, count = batch.num_computed_tokens[index], batch.num_new_tokens[index]
        return (
            f"request {request_id!r} has {has} tokens; the step asks for {count} from {begin} on"
            f"{' and samples' if batch.samples[index] else ''}"
        )
