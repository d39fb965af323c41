"""The engine core's side of structured output: grammars that compile, and masks for each step.

A request whose grammar is not ready waits outside the scheduler, so it holds nobody up. Once it
runs, its state follows the tokens that came back; preemption loses nothing, since the state counts
tokens, not steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from msgspec.structs import replace

from quire.core.errors import QuireError, RequestError
from quire.core.interface.worker import StepBatch
from quire.core.scheduler.request import FinishReason, RequestSpec, RequestUpdate
from quire.core.structured.compiler import CompiledGrammar, GrammarCompiler
from quire.core.structured.spec import ANYTHING, ConstraintSpec
from quire.core.structured.state import GrammarState
from quire.core.structured.thinking import ThinkingState

_WAIT_S = 0.02
"""How long a core with nothing else to do waits for a grammar before it looks for messages."""


@dataclass(frozen=True, slots=True)
class _Parked:
    """A request whose grammar is being compiled."""

    spec: RequestSpec
    constraint: ConstraintSpec
    grammar: Future[CompiledGrammar]
    give_up_at_s: float


class Constraints:
    """Owns the grammar states of one engine core. Used by its thread."""

    def __init__(
        self, compiler: GrammarCompiler, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._compiler = compiler
        self._clock = clock
        self._parked: dict[str, _Parked] = {}
        self._states: dict[str, GrammarState | ThinkingState] = {}

    @property
    def num_parked(self) -> int:
        """Requests whose grammar is not ready."""
        return len(self._parked)

    def prepare(self) -> None:
        """Begins to make ready what the first grammar would wait for; returns at once.

        If it cannot be had, whoever asks for a grammar is told why.
        """
        self._compiler.prepare_soon()

    def park(self, spec: RequestSpec, constraint: ConstraintSpec) -> None:
        """Lets a request wait for its grammar. Raises: RequestError for an id that waits here."""
        if spec.request_id in self._parked:
            raise RequestError(
                f"request id {spec.request_id!r} is in use; choose another", param="request_id"
            )
        limit_s = self._compiler.limits.compile_time_s
        grammar = self._compiler.submit(constraint.grammar or ANYTHING)
        self._parked[spec.request_id] = _Parked(spec, constraint, grammar, self._clock() + limit_s)

    def wait(self) -> None:
        """Returns when a grammar is ready, or after a moment."""
        wait([one.grammar for one in self._parked.values()], _WAIT_S, FIRST_COMPLETED)

    def take_ready(self, add: Callable[[RequestSpec], None]) -> list[RequestUpdate]:
        """Hands requests with a grammar to `add`; the ends of those that cannot have one."""
        ends = []
        for request_id, one in list(self._parked.items()):
            if not one.grammar.done() and self._clock() < one.give_up_at_s:
                continue
            del self._parked[request_id]
            try:
                self._admit(one, add)
            except QuireError as error:
                ends.append(RequestUpdate(request_id, [], FinishReason.ERROR, error=str(error)))
        return ends

    def _admit(self, one: _Parked, add: Callable[[RequestSpec], None]) -> None:
        if not one.grammar.done():
            raise self._compiler.too_slow(one.constraint.grammar or ANYTHING)
        state = self._make_state(one, one.grammar.result())
        add(one.spec)
        self._states[one.spec.request_id] = state

    def _make_state(self, one: _Parked, grammar: CompiledGrammar) -> GrammarState | ThinkingState:
        constraint, vocab_size = one.constraint, self._compiler.vocab_size
        thinking = None
        if constraint.thinking is not None:
            thinking = ThinkingState(constraint.thinking, grammar.tokenizer, vocab_size=vocab_size)
            if constraint.grammar is None:
                return thinking
        return GrammarState(
            grammar,
            vocab_size=vocab_size,
            end_token_ids=(*one.spec.eos_token_ids, *one.spec.stop_token_ids),
            starts_after=constraint.starts_after,
            thinking=thinking,
        )

    def forget(self, request_ids: Iterable[str]) -> list[str]:
        """Drops what is known of requests; the ids of those that waited here."""
        waited = []
        for request_id in request_ids:
            self._states.pop(request_id, None)
            if self._parked.pop(request_id, None) is not None:
                waited.append(request_id)
        return waited

    def with_masks(self, batch: StepBatch) -> StepBatch:
        """The step, with the tokens that its constrained rows may sample."""
        if not self._states:
            return batch
        masks = {}
        for request_id, samples in zip(batch.request_ids, batch.samples, strict=True):
            state = self._states.get(request_id) if samples else None
            mask = None if state is None else state.mask()
            if mask is not None:
                masks[request_id] = mask
        return replace(batch, token_masks=masks) if masks else batch

    def follow(
        self, updates: Sequence[RequestUpdate], complete: Callable[[str], None]
    ) -> list[RequestUpdate]:
        """Takes in what was sampled; an output that is whole ends, and `complete` is told."""
        if not self._states:
            return list(updates)
        return [self._follow(update, complete) for update in updates]

    def _follow(self, update: RequestUpdate, complete: Callable[[str], None]) -> RequestUpdate:
        state = self._states.get(update.request_id)
        if state is None:
            return update
        if update.finish_reason is not None:
            del self._states[update.request_id]
            if update.finish_reason is FinishReason.ERROR and state.error is not None:
                return replace(update, error=state.error)
            return update
        state.accept(update.new_token_ids)
        if not state.is_complete:
            return update
        del self._states[update.request_id]
        complete(update.request_id)
        return replace(update, finish_reason=FinishReason.STOP, is_whole=True)

    def close(self) -> None:
        """Ends the threads that compile."""
        self._compiler.close()
