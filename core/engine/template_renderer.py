"""A program that renders chat templates: foreign code, so it can be limited and killed.

Reads requests from stdin and answers on stdout, each a JSON text behind its length in four bytes.
Imports nothing of Quire, and of others jinja2 alone, so that it starts fast and stays small.
`quire.core.engine.template_process` starts it.

The environment of the templates is that of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 30
LENGTH = struct.Struct(">I")


class _Generation(Extension):
    """Lets `{% generation %}` pass: it marks what the assistant said, for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` without the ways from a class to the interpreter."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class TooMuchTextError(Exception):
    """The template wrote more than it may."""


def make_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox in which templates run."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    return environment


def make_renderer() -> Callable[[dict[str, Any]], str]:
    """A function from a request to its text; keeps the last templates compiled."""
    compiled = lru_cache(maxsize=16)(make_environment().from_string)

    def render(request: dict[str, Any]) -> str:
        pieces, num_chars = [], 0
        for piece in compiled(request["template"]).generate(request["variables"]):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > request["max_chars"]:
                raise TooMuchTextError(f"more than {request['max_chars']} characters")
        return "".join(pieces)

    return render


def answer(render: Callable[[dict[str, Any]], str], request: dict[str, Any]) -> dict[str, str]:
    """The text, or what went wrong in words. Takes too long: the alarm ends the process."""
    _set_alarm(request["time_limit_s"] + 1.0)
    try:
        return {"text": render(request)}
    except MemoryError:
        return {"error": "more memory than it may use"}
    except TooMuchTextError as error:
        return {"error": str(error)}
    except Exception as error:  # the template's own code raised: anything is possible
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        _set_alarm(0.0)


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message; None at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    return json.loads(body) if len(body) == length else None


def write_message(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Writes one message and flushes."""
    body = json.dumps(message, ensure_ascii=True).encode()
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def main() -> None:
    """Answers until stdin ends, which it does with the parent."""
    _limit_memory()
    render = make_renderer()
    write_message(sys.stdout.buffer, {"text": "ready"})
    while (request := read_message(sys.stdin.buffer)) is not None:
        write_message(sys.stdout.buffer, answer(render, request))


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not a Unix: the limit on time remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


if __name__ == "__main__":
    main()
