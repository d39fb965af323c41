"""Arguments whose values stand as plain text, told as JSON while they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quire.core.serving.tools.events import as_json, read_json
from quire.core.serving.tools.marked import held_back


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedForm:
    """How one family writes pairs of a key and a value."""

    begin: re.Pattern[str]
    """Up to the value; its group `key` is the key."""
    close: str
    """Behind the value."""
    end: re.Pattern[str]
    """Behind the last pair."""
    marks: tuple[str, str]
    """How `begin` and `end` begin."""
    is_padded: bool
    """A line break on either side of a value is none of it."""


QWEN_CODER = TaggedForm(
    begin=re.compile(r"<parameter=(?P<key>[^>\n]+)>"),
    close="</parameter>",
    end=re.compile("</function>"),
    marks=("<parameter=", "</function>"),
    is_padded=True,
)
GLM = TaggedForm(
    begin=re.compile(r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>"),
    close="</arg_value>",
    end=re.compile("(?=</tool_call>)"),
    marks=("<arg_key>", "</tool_call>"),
    is_padded=False,
)


class TaggedArguments:
    """Pairs between tags: a value is a string where the tool's schema says so, else JSON."""

    def __init__(self, form: TaggedForm, properties: Mapping[str, Any]) -> None:
        """`properties`: the schemas of the tool's parameters."""
        self._form = form
        self._properties = properties
        self._buffer = ""
        self._num_pairs = 0
        self._is_in_value = self._is_at_start = self._is_text = False
        self.is_broken = False
        """Something stood where nothing stands."""
        self.rest: str | None = None

    def feed(self, text: str) -> str:
        """See `ArgumentReader`."""
        self._buffer += text
        said: list[str] = []
        while self._value(said) if self._is_in_value else self._between(said):
            pass
        return "".join(said)

    def begins(self, text: str) -> bool:
        """See `ArgumentReader`."""
        self.feed(text)
        if self.is_broken or self.rest is not None or not self._num_pairs:
            return False
        tail = self._buffer.strip()
        return self._is_in_value or any(
            tail.startswith(mark) or mark.startswith(tail) for mark in self._form.marks
        )

    def _between(self, said: list[str]) -> bool:
        begin = self._form.begin.search(self._buffer)
        end = self._form.end.search(self._buffer)
        if begin is not None and (end is None or begin.start() < end.start()):
            self._open(begin, said)
            return True
        if end is not None:
            self._skip(self._buffer[: end.start()])
            self.rest = self._buffer[end.end() :]
            said.append("}" if self._num_pairs else "{}")
        return False

    def _open(self, begin: re.Match[str], said: list[str]) -> None:
        self._skip(self._buffer[: begin.start()])
        self._buffer = self._buffer[begin.end() :]
        key = begin["key"].strip()
        kind = self._properties.get(key)
        self._is_text = isinstance(kind, Mapping) and kind.get("type") == "string"
        self._is_in_value = self._is_at_start = True
        opening = '"' if self._is_text else ""
        said.append(f"{', ' if self._num_pairs else '{'}{as_json(key)}: {opening}")
        self._num_pairs += 1

    def _value(self, said: list[str]) -> bool:
        if self._is_at_start and self._form.is_padded and not self._see_start():
            return False
        close = self._form.close
        at = self._buffer.find(close)
        if at < 0:
            if self._is_text:
                closes = (close, f"\n{close}") if self._form.is_padded else (close,)
                self._say(len(self._buffer) - held_back(self._buffer, closes), said)
            return False
        value, self._buffer = self._buffer[:at], self._buffer[at + len(close) :]
        if self._form.is_padded:
            value = value.removesuffix("\n")
        said.append(f'{_escaped(value)}"' if self._is_text else _typed(value))
        self._is_in_value = False
        return True

    def _see_start(self) -> bool:
        """Takes the line break before a value away; False: it is not there yet, nor another."""
        self._is_at_start = not self._buffer
        self._buffer = self._buffer.removeprefix("\n")
        return not self._is_at_start

    def _say(self, size: int, said: list[str]) -> None:
        said.append(_escaped(self._buffer[:size]))
        self._buffer = self._buffer[size:]

    def _skip(self, text: str) -> None:
        self.is_broken = self.is_broken or bool(text.strip())


_QUOTE = "<escape>"
_KEY = re.compile(r"([\w.-]+)\s*:")
_KEY_BEGUN = re.compile(r"[\w.-]+\s*")


class GemmaArguments:
    """`{key:<escape>text<escape>,other:3,more:[1,{a:2}]}`."""

    def __init__(self, _name: str = "") -> None:
        """See `MakeReader`."""
        self._buffer = ""
        self._closers: list[str] = []
        """Of the objects and lists that are open."""
        self._expects: Literal["key", "value", "item", "comma", "text"] = "value"
        self._has_before = False
        """Something stands before, in the object or list that is open."""
        self.is_broken = False
        """What came cannot be read; nothing more is."""
        self.rest: str | None = None

    def feed(self, text: str) -> str:
        """See `ArgumentReader`."""
        self._buffer += text
        said: list[str] = []
        while self.rest is None and self._advance(said):
            pass
        return "".join(said)

    def begins(self, text: str) -> bool:
        """See `ArgumentReader`."""
        self.feed(text)
        return self.rest is None

    def _advance(self, said: list[str]) -> bool:
        """One step; whether there may be another."""
        if self._expects == "text":
            return self._text(said)
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        if self._expects != "value" and self._buffer[0] == self._closers[-1]:
            return self._close(said)
        if self._expects == "comma":
            return self._comma()
        if self._expects == "key":
            return self._key(said)
        return self._value(said)

    def _close(self, said: list[str]) -> bool:
        said.append(self._closers.pop())
        self._buffer = self._buffer[1:]
        self._end_value()
        if not self._closers:
            self.rest = self._buffer
        return True

    def _end_value(self) -> None:
        self._expects, self._has_before = "comma", True

    def _comma(self) -> bool:
        if self._buffer[0] != ",":
            return self._break()
        self._buffer = self._buffer[1:]
        self._expects = "key" if self._closers[-1] == "}" else "item"
        return True

    def _break(self) -> bool:
        self.is_broken, self.rest = True, self._buffer
        return False

    def _key(self, said: list[str]) -> bool:
        key = _KEY.match(self._buffer)
        if key is None:
            return False if _KEY_BEGUN.fullmatch(self._buffer) else self._break()
        self._write(f"{as_json(key[1])}: ", key.end(), said)
        self._expects, self._has_before = "value", False
        return True

    def _write(self, written: str, size: int, said: list[str]) -> None:
        """What stands in place of the next `size` characters."""
        said.append(f", {written}" if self._has_before else written)
        self._buffer = self._buffer[size:]

    def _value(self, said: list[str]) -> bool:
        first = self._buffer[0]
        if first in "{[":
            self._write(first, 1, said)
            self._closers.append("}" if first == "{" else "]")
            self._expects, self._has_before = "key" if first == "{" else "item", False
            return True
        if self._buffer.startswith(_QUOTE):
            self._write('"', len(_QUOTE), said)
            self._expects = "text"
            return True
        return not _QUOTE.startswith(self._buffer) and self._plain(said)

    def _text(self, said: list[str]) -> bool:
        at = self._buffer.find(_QUOTE)
        if at < 0:
            size = len(self._buffer) - held_back(self._buffer, (_QUOTE,))
            said.append(_escaped(self._buffer[:size]))
            self._buffer = self._buffer[size:]
            return False
        said.append(f'{_escaped(self._buffer[:at])}"')
        self._buffer = self._buffer[at + len(_QUOTE) :]
        self._end_value()
        return True

    def _plain(self, said: list[str]) -> bool:
        """A number, a constant, or a text without quotes."""
        stop = re.search(r"[,{}\]]" if self._closers[-1:] == ["]"] else "[,{}]", self._buffer)
        if stop is None:
            return False
        if stop[0] == "{" or not self._closers:
            return self._break()
        self._write(_typed(self._buffer[: stop.start()].strip()), stop.start(), said)
        self._end_value()
        return True


def _typed(text: str) -> str:
    """A value as JSON: what it says, or the text itself where it says nothing."""
    value = read_json(text.strip())
    return as_json(text if value is None and text.strip() != "null" else value)


def _escaped(text: str) -> str:
    """A piece of a JSON string."""
    return as_json(text)[1:-1]
