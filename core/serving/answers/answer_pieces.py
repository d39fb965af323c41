"""The parts of an assistant's turn, as every API that answers conversations tells them apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quire.core.serving.protocol.chat import AnswerMessage


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that was added."""

    kind: Literal["text", "reasoning"]
    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A tool call that begins, or more of its arguments."""

    index: int
    """Of the call in the turn."""
    call_id: str | None
    """Given with the first piece."""
    name: str
    """Given with the first piece."""
    arguments: str
    """What was added to the JSON."""
    kind: Literal["call"] = "call"


Piece = TextPiece | CallPiece


def pieces_of(delta: AnswerMessage) -> Iterator[Piece]:
    """What a chunk added, in the order in which a turn has it: thoughts, text, calls."""
    thought = delta.reasoning_content or delta.reasoning
    if thought:
        yield TextPiece("reasoning", thought)
    if delta.content:
        yield TextPiece("text", delta.content)
    for position, call in enumerate(delta.tool_calls or ()):
        yield CallPiece(
            index=position if call.index is None else call.index,
            call_id=call.id,
            name=call.function.name or "",
            arguments=call.function.arguments,
        )
