"""What both completion endpoints do with the outputs of a generation: collect, count, date."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, field

from quire.core.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from quire.core.serving.answers.generation import Generation, PromptOutput
from quire.core.serving.protocol.usage import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every body of one answer begins with."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class PromptFacts:
    """What is known of a prompt since its first output."""

    text: str | None
    """As it was given; None for token ids."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int
    first_token_text: str = ""
    """What nothing predicts, where log-probabilities of the prompt were asked."""


@dataclass(slots=True)
class Tally:
    """The prompts of an answer and the tokens so far. Grows with each output."""

    prompts: dict[int, PromptFacts] = field(default_factory=dict)
    num_output_tokens: int = 0

    def note(self, item: PromptOutput) -> PromptFacts:
        """Counts an output; returns what is known of its prompt."""
        output = item.output
        facts = self.prompts.get(item.prompt_index)
        if facts is None:
            facts = _facts_of(output)
            self.prompts[item.prompt_index] = facts
        if output.prompt_logprobs is not None:
            facts.logprobs = output.prompt_logprobs
        self.num_output_tokens += sum(len(child.token_ids) for child in output.outputs)
        return facts

    def usage(self) -> Usage:
        """The usage so far."""
        prompts = self.prompts.values()
        return Usage.of(
            prompt=sum(len(facts.token_ids) for facts in prompts),
            completion=self.num_output_tokens,
            cached=sum(facts.num_cached_tokens for facts in prompts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeOutput:
    """One finished output of one prompt."""

    prompt_index: int
    facts: PromptFacts
    child: CompletionOutput


async def collect(generation: Generation) -> tuple[list[WholeOutput], Tally]:
    """Runs a generation of kind `final` to its end; the outputs by prompt, then by index."""
    tally = Tally()
    found: list[WholeOutput] = []
    async with aclosing(generation.outputs()) as outputs:
        async for item in outputs:
            facts = tally.note(item)
            found += [
                WholeOutput(prompt_index=item.prompt_index, facts=facts, child=child)
                for child in item.output.outputs
            ]
    found.sort(key=lambda whole: (whole.prompt_index, whole.child.index))
    return found, tally


def _facts_of(output: RequestOutput) -> PromptFacts:
    return PromptFacts(
        text=output.prompt,
        token_ids=list(output.prompt_token_ids),
        logprobs=output.prompt_logprobs,
        num_cached_tokens=output.num_cached_tokens,
    )
