"""The files of a batch: the lines to be answered, and the answers, which are added one by one."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quire.core.errors import ConfigError

URLS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score"),
    *("/rerank", "/v1/rerank", "/v2/rerank", "/generate"),
)
"""Where a line may be sent."""
_NEEDED = {"custom_id", "url", "body"}
_MAX_PROBLEMS = 8


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request."""

    custom_id: str
    """Unique in its file."""
    url: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What came of a line: a response of whatever status, or an error where there was none."""

    custom_id: str
    status: int
    request_id: str
    body: Any

    @property
    def is_failed(self) -> bool:
        """Whether the line was refused or failed."""
        return self.status != 200

    def to_line(self) -> bytes:
        """As the OpenAI API writes batch output."""
        response = {
            "status_code": self.status,
            "request_id": self.request_id,
            "body": self.body,
        }
        record = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": self.custom_id,
            "response": response,
            "error": None,
        }
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def read_lines(path: Path) -> Iterator[BatchLine]:
    """The lines of a file, one at a time. Raises: ConfigError for one that is no request."""
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                line = _parse(raw)
                if isinstance(line, str):
                    raise ConfigError(f"{path}, line {number}: {line}")
                yield line


def check_lines(path: Path) -> frozenset[str]:
    """The ids of all lines of a file, which is held to its form before anything runs.

    Raises: ConfigError that names the first lines that are wrong, or an id that comes twice.
    """
    seen: dict[str, int] = {}
    problems = []
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            line = _parse(raw) if raw.strip() else None
            if isinstance(line, str):
                problems.append(f"line {number}: {line}")
            elif line is not None and line.custom_id in seen:
                first = seen[line.custom_id]
                problems.append(f"line {number}: custom_id {line.custom_id!r} is line {first}'s")
            elif line is not None:
                seen[line.custom_id] = number
            if len(problems) == _MAX_PROBLEMS:
                break
    if problems:
        raise ConfigError("; ".join([f"{path} cannot be run", *problems]))
    if not seen:
        raise ConfigError(f"{path} holds no lines")
    return frozenset(seen)


class AnswerFile:
    """The output: answers are added whole, and those of an earlier run are kept.

    Use as a context. Another run on the same file is refused while one goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        """Ids that are answered."""
        self.num_failed = 0
        """Answers that are refusals or failures."""
        self._file = path.open("a+b")

    def __enter__(self) -> Self:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(
                f"another run writes {self.path}; wait for it, or choose another output"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def resume(self, ids: frozenset[str], *, drops_failed: bool) -> None:
        """Reads what is answered; a last line that was cut is taken away.

        With `drops_failed` refusals and failures are taken away too, to be tried again.
        Raises: ConfigError for a file that belongs to another input.
        """
        self._file.seek(0)
        kept, size = [], 0
        for raw in self._file:
            record = _record_of(raw)
            if record is None:
                # Only the last line can be cut: each is written at once, its end with it.
                break
            custom_id = record["custom_id"]
            if custom_id not in ids or custom_id in self.done:
                raise ConfigError(
                    f"{self.path} answers {custom_id!r}, which the input does not ask (once); "
                    "choose another output"
                )
            size += len(raw)
            is_failed = record["response"]["status_code"] != 200
            if drops_failed and is_failed:
                continue
            self.done.add(custom_id)
            self.num_failed += is_failed
            kept.append(raw)
        rest = self._file.seek(0, os.SEEK_END) - size
        if rest and b"\n" in self._tail(size):
            raise ConfigError(f"{self.path} holds a line that is no answer; choose another output")
        self._rewrite(kept, size)

    def add(self, answer: BatchAnswer) -> None:
        """Writes an answer, in one piece."""
        self._file.write(answer.to_line())
        self._file.flush()
        self.done.add(answer.custom_id)
        self.num_failed += answer.is_failed

    def _tail(self, size: int) -> bytes:
        self._file.seek(size)
        return self._file.read()

    def _rewrite(self, kept: list[bytes], size: int) -> None:
        """Cuts the file behind what is whole; writes it anew where answers were dropped."""
        if sum(map(len, kept)) == size:
            self._file.truncate(size)
            return
        spare = self.path.with_name(self.path.name + ".kept")
        spare.write_bytes(b"".join(kept))
        file = spare.open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        # In one step: whoever is interrupted here has the old file or the new one.
        spare.replace(self.path)
        self._file.close()
        self._file = file


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(raw: bytes) -> BatchLine | str:
    """The request of a line, or what is wrong with it."""
    try:
        record = json.loads(raw)
    except ValueError as error:
        return f"no JSON ({error})"
    if not isinstance(record, dict):
        return "no JSON object"
    odd = sorted((_NEEDED - set(record)) | (set(record) - _NEEDED - {"method"}))
    if odd:
        return f"{odd[0]!r} is missing or unknown; a line has custom_id, method, url and body"
    custom_id, url, body = record["custom_id"], record["url"], record["body"]
    if not isinstance(custom_id, str) or not custom_id:
        return "custom_id is no text"
    if record.get("method", "POST") != "POST":
        return f"method is {record['method']!r}; it is POST"
    if url not in URLS:
        return f"url {url!r} is none of {', '.join(URLS)}"
    if not isinstance(body, dict):
        return "body is no JSON object"
    if body.get("stream"):
        return "body asks for a stream; a batch has whole answers"
    return BatchLine(custom_id, url, body)


def _record_of(raw: bytes) -> dict[str, Any] | None:
    """An answer of an earlier run; None for what is none, or is cut."""
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
        int(record["response"]["status_code"])
        str(record["custom_id"])
    except (ValueError, TypeError, KeyError):
        return None
    return record if isinstance(record, dict) else None
