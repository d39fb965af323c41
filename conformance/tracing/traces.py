"""A trace in one file: what a worker was built with, each step's batch and result, its operators.

    the magic line, then frames: 8 bytes of length (little endian) and so much msgpack
    header, one frame a step, and a footer with the number of steps and the SHA-256 of all before it

A file that was cut, changed or written by another version is refused with what is wrong.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from quire.core.errors import ConfigError
from quire.core.interface import CachePlan, ModelInfo, StepBatch, StepResult, WorkerConfig

MAGIC = b"quire-trace\n"
FORMAT_VERSION = 1
_LENGTH_BYTES = 8
NONE, DIGESTS, TENSORS = "none", "digests", "tensors"
DETAILS = (NONE, DIGESTS, TENSORS)


class TensorRecord(msgspec.Struct, frozen=True, array_like=True):
    """One tensor that went into or came out of an operator."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    """Of its bits."""
    data: bytes
    """Its bits, row by row; empty where digests alone were asked for."""


class OperatorCall(msgspec.Struct, frozen=True, array_like=True):
    """One call of an operator."""

    op: str
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    """What it returned and what it wrote into."""


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Where a trace comes from, and all that another worker needs to follow it."""

    format_version: int
    quire_version: str
    interface_version: str
    created: str
    backend: str
    device: str
    architecture: str
    detail: str
    """Of operators: `none`, `digests` or `tensors`."""
    why_no_operators: str = ""
    """Where they were asked for and could not be recorded."""
    model_digest: str
    worker_config: WorkerConfig
    model_info: ModelInfo
    cache_plan: CachePlan


class TraceStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step."""

    batch: StepBatch
    result: StepResult
    calls: list[OperatorCall]


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A whole trace."""

    header: TraceHeader
    steps: list[TraceStep]


class _Version(msgspec.Struct, frozen=True):
    format_version: int


class _Footer(msgspec.Struct, frozen=True, kw_only=True):
    num_steps: int
    sha256: str


class TraceWriter:
    """Writes a trace step by step; without its `close` the file is one that was cut."""

    def __init__(self, path: Path) -> None:
        """Raises: ConfigError if the file cannot be written."""
        try:
            self._file: io.BufferedWriter = path.open("wb")
        except OSError as error:
            raise ConfigError(f"the trace cannot be written: {error}") from error
        self._digest = hashlib.sha256()
        self.num_steps = 0
        self._put(MAGIC)

    def write_header(self, header: TraceHeader) -> None:
        """First, once."""
        self._frame(header)

    def write_step(self, step: TraceStep) -> None:
        """The next step."""
        self._frame(step)
        self.num_steps += 1

    def close(self) -> None:
        """Writes the footer. Calling twice is harmless."""
        if not self._file.closed:
            self._frame(_Footer(num_steps=self.num_steps, sha256=self._digest.hexdigest()))
            self._file.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes; a trace that was interrupted is left without its footer."""
        if kind is None:
            self.close()
        self._file.close()

    def _frame(self, record: msgspec.Struct) -> None:
        encoded = msgspec.msgpack.encode(record)
        self._put(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def read_trace(path: Path) -> Trace:
    """A trace from its file.

    Raises: ConfigError if it is none, was cut or changed, or is of another version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not content.startswith(MAGIC):
        raise ConfigError(f"{path} is no trace: record one with `quire trace record`")
    frames = list(_frames(path, content))
    if not frames:
        raise _cut(path, 0)
    try:
        _check_version(path, frames[0])
        if len(frames) == 1 or not _is_whole(path, content, frames):
            raise _cut(path, max(0, len(frames) - 2))
        return Trace(
            header=msgspec.msgpack.decode(frames[0], type=TraceHeader),
            steps=[msgspec.msgpack.decode(frame, type=TraceStep) for frame in frames[1:-1]],
        )
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}; record it again") from error


def _frames(path: Path, content: bytes) -> Iterator[bytes]:
    position = len(MAGIC)
    number = 0
    while position < len(content):
        head = content[position : position + _LENGTH_BYTES]
        length = int.from_bytes(head, "little")
        position += _LENGTH_BYTES
        if len(head) < _LENGTH_BYTES or position + length > len(content):
            raise _cut(path, max(0, number - 1))
        yield content[position : position + length]
        position += length
        number += 1


def _check_version(path: Path, header: bytes) -> None:
    version = msgspec.msgpack.decode(header, type=_Version).format_version
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path} is a trace of format {version}; this quire reads format {FORMAT_VERSION}. "
            "Replay it with the quire that recorded it, or record it again"
        )


def _is_whole(path: Path, content: bytes, frames: Sequence[bytes]) -> bool:
    """Whether the last frame is the footer. Raises: ConfigError if it is and does not fit."""
    try:
        footer = msgspec.msgpack.decode(frames[-1], type=_Footer)
    except msgspec.ValidationError:
        return False
    before = content[: len(content) - len(frames[-1]) - _LENGTH_BYTES]
    if footer.sha256 != hashlib.sha256(before).hexdigest():
        raise ConfigError(f"{path} was changed after it was recorded: its checksum does not fit")
    return footer.num_steps == len(frames) - 2


def _cut(path: Path, num_steps: int) -> ConfigError:
    return ConfigError(
        f"{path} is cut: it ends after {num_steps} steps without the end that a finished recording "
        "has. Record it again, or copy it again"
    )


def digest_model(directory: Path) -> str:
    """Over the config and the weight files of a model: name, size, first and last mebibyte."""
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        if path.exists():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()
