"""Chunks of a stream that differ from each other in one text alone, encoded once."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

_encode = msgspec.json.Encoder().encode


class PlainChunks:
    """The JSON of a chunk of each choice with room for its text.

    Nearly all chunks of a stream are of this kind, and making a model of each costs far more than
    the text does.
    """

    __slots__ = ("_make", "_parts")

    def __init__(self, make: Callable[[int, str], bytes]) -> None:
        """`make`: the whole JSON of a chunk that adds a text to the choice of an index."""
        self._make = make
        self._parts: dict[int, tuple[bytes, bytes]] = {}

    def body(self, index: int, text: str) -> bytes:
        """The JSON of the chunk that adds `text` to the choice `index`."""
        parts = self._parts.get(index)
        if parts is None:
            parts = self._parts[index] = self._split(index)
        return parts[0] + _encode(text) + parts[1]

    def _split(self, index: int) -> tuple[bytes, bytes]:
        """A mark that no client can guess and put into the id of its answer."""
        mark = uuid.uuid4().hex
        head, found, tail = self._make(index, mark).partition(f'"{mark}"'.encode())
        assert found, head
        return head, tail
