"""What the worker remembers of its requests, and how a step changes it: all of it, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from quire.core.interface import NewRequest, QuireError, SamplingSpec, StepBatch


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """One request, from `NewRequest` until it is forgotten."""

    request_id: str
    tokens: list[int]
    """Prompt and output."""
    num_prompt_tokens: int
    sampling: SamplingSpec
    blocks: list[list[int]]
    """For each cache group."""
    problem: str = ""
    """Why it cannot be served; it runs on harmless ids until the engine drops it."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def is_penalised(self) -> bool:
        """Whether tokens already seen count against themselves."""
        spec = self.sampling
        penalties = (spec.repetition_penalty, spec.frequency_penalty, spec.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def seen_counts(self) -> dict[int, int]:
        """Each token of prompt and output, and how often it stands in the output."""
        output = Counter(self.tokens[self.num_prompt_tokens :])
        return {token: output[token] for token in self.tokens}

    def forbidden_ids(self) -> set[int]:
        """Tokens that min_tokens or bad words forbid now."""
        spec = self.sampling
        output = self.tokens[self.num_prompt_tokens :]
        forbidden = set()
        for word in filter(None, spec.bad_words):
            prefix = list(word[:-1])
            if not prefix or output[-len(prefix) :] == prefix:
                forbidden.add(word[-1])
        if len(output) < spec.min_tokens:
            forbidden.update(spec.min_tokens_forbids)
        return forbidden


@dataclass(slots=True, kw_only=True, eq=False)
class ScheduledRequest:
    """One request's part of a step."""

    state: RequestState
    num_computed: int
    num_new: int
    new_blocks: Sequence[Sequence[int]]
    """For each cache group, what the step appends to the table."""
    samples: bool

    @property
    def new_tokens(self) -> list[int]:
        """The tokens that the step computes."""
        return self.state.tokens[self.num_computed : self.num_computed + self.num_new]

    def blocks(self, group: int) -> list[int]:
        """The table of one cache group, as the step needs it."""
        new = self.new_blocks[group] if self.new_blocks else ()
        return [*self.state.blocks[group], *new]


@dataclass(slots=True, kw_only=True, eq=False)
class StagedStep:
    """A step that may still fail: nothing is remembered of it before `RequestBook.commit`."""

    batch: StepBatch
    scheduled: list[ScheduledRequest]
    added: list[RequestState] = field(default_factory=list)


class RequestBook:
    """The requests that the worker remembers."""

    def __init__(self, *, vocab_size: int, num_groups: int) -> None:
        self._vocab_size = vocab_size
        self._num_groups = num_groups
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def stage(self, batch: StepBatch) -> StagedStep:
        """Looks a step up and checks it; changes nothing.

        Raises: QuireError if the batch does not fit what is known.
        """
        added = {new.request_id: self._make(new) for new in batch.new_requests}
        gone = set(batch.finished_request_ids)
        known = {k: v for k, v in self._states.items() if k not in gone} | added
        unknown = [name for name in batch.request_ids if name not in known]
        if unknown:
            raise QuireError(
                f"scheduled but unknown to the worker: {', '.join(unknown)}; bring them as new"
            )
        columns = zip(
            batch.request_ids,
            batch.num_computed_tokens,
            batch.num_new_tokens,
            batch.new_block_ids,
            batch.samples,
            strict=True,
        )
        scheduled = [
            ScheduledRequest(
                state=known[name],
                num_computed=computed,
                num_new=new,
                new_blocks=blocks or (),
                samples=samples,
            )
            for name, computed, new, blocks, samples in columns
        ]
        for part in scheduled:
            _check(part)
        return StagedStep(batch=batch, scheduled=scheduled, added=list(added.values()))

    def commit(self, staged: StagedStep, tokens: Sequence[int]) -> None:
        """The step has happened. `tokens` has one for each request that samples."""
        for name in staged.batch.finished_request_ids:
            self._states.pop(name, None)
        for state in staged.added:
            self._states[state.request_id] = state
        for part in staged.scheduled:
            for table, blocks in zip(part.state.blocks, part.new_blocks, strict=False):
                table.extend(blocks)
        sampled = (part for part in staged.scheduled if part.samples)
        for part, token in zip(sampled, tokens, strict=True):
            part.state.tokens.append(token)

    def _make(self, new: NewRequest) -> RequestState:
        problem = "; ".join(self._problems(new))
        size = self._vocab_size
        return RequestState(
            request_id=new.request_id,
            tokens=[token if 0 <= token < size else 0 for token in new.token_ids],
            num_prompt_tokens=new.num_prompt_tokens,
            sampling=SamplingSpec() if problem else new.sampling,
            blocks=[list(ids) for ids in new.block_ids] or [[] for _ in range(self._num_groups)],
            problem=problem,
        )

    def _problems(self, new: NewRequest) -> Iterator[str]:
        """What would break the step for the others, were it let through."""
        spec = new.sampling
        named = {
            "token_ids": new.token_ids,
            "allowed_token_ids": spec.allowed_token_ids or (),
            "logit_bias": [token for token, _ in spec.logit_bias],
            "bad_words": [token for word in spec.bad_words for token in word],
            "min_tokens_forbids": spec.min_tokens_forbids,
        }
        for name, ids in named.items():
            stray = next((i for i in ids if not 0 <= i < self._vocab_size), None)
            if stray is not None:
                last = self._vocab_size - 1
                yield f"{name} holds token {stray}; the vocabulary has ids 0 to {last}"
        if spec.logits_processors:
            yield "this device runs no logits processors of the user's; leave them out"


def _check(part: ScheduledRequest) -> None:
    has = len(part.state.tokens)
    end = part.num_computed + part.num_new
    if part.num_new < 1 or end > has or (part.samples and end != has):
        raise QuireError(
            f"request {part.state.request_id!r} has {has} tokens; the step asks for "
            f"{part.num_new} from {part.num_computed} on{' and samples' if part.samples else ''}"
        )
