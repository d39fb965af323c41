"""A checkpoint's weight files: found, checked as a whole, then read a tensor at a time.

safetensors, or else PyTorch's own format, of which tensors alone are read: no code of it runs.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire.core.errors import CheckpointError
from quire.core.interface.quantization import QuantizedWeight
from quire.core.models.model_config import read_json
from quire.core.models.weights.weight_layout import TensorShape

_INDEX = "model.safetensors.index.json"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_OTHER_SUFFIXES = {".bin", ".pt", ".pth", ".gguf"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 4 * 2**20
"""Of a tensor that is read by several threads."""
_HOST = torch.frombuffer(bytearray(1), dtype=torch.uint8).device
"""Where what is read from a file lies."""
_MAX_LISTED = 40
"""Problems shown of each kind; a wrong config makes hundreds of the same."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    name: str
    """As the file calls it."""
    shape: tuple[int, ...]
    place: StoredBytes | None = None
    """Where its bytes lie one after the other; None: only its library knows."""


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A tensor's bytes in its file."""

    offset: int
    size: int
    dtype: torch.dtype


class CheckpointFiles:
    """The tensors of a checkpoint by the names that its family gives them.

    Raises: CheckpointError if there are no files that can be read.
    """

    def __init__(self, directory: Path, rename: Callable[[str], str | None]) -> None:
        self._directory = directory
        # None is started before it has work; they end with this object.
        self._threads = ThreadPoolExecutor(torch.get_num_threads())
        self._stored: dict[str, StoredTensor] = {}
        for path in find_weight_files(directory):
            for stored in _read_header(path):
                name = rename(stored.name)
                if name is not None:
                    self._stored[name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def check(self, expected: Iterable[TensorShape], *, may_have: tuple[str, ...] = ()) -> None:
        """Compares with what the model needs. Names in `may_have` are ignored if they are there.

        Raises: CheckpointError that lists all that is missing, unexpected or of another shape.
        """
        wanted = {tensor.name: tensor.shape for tensor in expected}
        absent = [name for name in wanted if name not in self._stored]
        surplus = [name for name in self._stored if name not in wanted and name not in may_have]
        missing = [_with_nearest(name, surplus) for name in absent[:_MAX_LISTED]]
        missing += absent[_MAX_LISTED:]
        unexpected = [
            f"{stored.name} ({stored.path.name})"
            for name, stored in self._stored.items()
            if name not in wanted and name not in may_have
        ]
        misshaped = [
            f"{stored.name} is {list(stored.shape)}, not {list(wanted[name])} ({stored.path.name})"
            for name, stored in self._stored.items()
            if name in wanted and stored.shape != wanted[name]
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
        if any(kinds.values()):
            problems = "".join(_list(kind, names) for kind, names in kinds.items() if names)
            raise CheckpointError(
                f"the weights in {self._directory} do not fit its config.json:{problems}\n"
                "Download the model again, or give the config.json that belongs to these weights."
            )

    def read_into(self, tensor: TensorShape, target: Tensor) -> None:
        """Writes one tensor to `target`, of its shape, on any device and in any floating dtype.

        Where nothing has to be converted, the file is read straight into `target`: a mapped file
        costs a page fault for every 4 KiB, which takes ten times as long as the bytes.
        Raises: CheckpointError if the file cannot be read.
        """
        stored = self._stored[tensor.name]
        place = stored.place
        if place is None or place.dtype != target.dtype or not _is_plain(target):
            target.copy_(self.read(tensor))
        elif target.numel():
            _read_bytes(stored.path, place, target, self._threads)

    def read_quantized(
        self, tensor: TensorShape, formats: Collection[str]
    ) -> QuantizedWeight | None:
        """A weight as the codes that are stored, if its `format_name` is among `formats`.

        None: it is in none of them, or plain, or no record says it.
        """
        return None

    def read(self, tensor: TensorShape) -> Tensor:
        """One tensor in the checkpoint's dtype: a view of the mapped file, unmapped when dropped.

        Raises: CheckpointError if the file cannot be read.
        """
        stored = self._stored[tensor.name]
        # Opened anew each time: one mapping of a whole shard would keep all its pages resident.
        with _open(stored.path) as file:
            content: Tensor = file.get_tensor(stored.name)
        return content


def find_weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, shards in order; safetensors where there are some.

    Raises: CheckpointError that says what is there instead.
    """
    if (directory / _INDEX).is_file():
        return _shards(directory, _INDEX)
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    files = [path for path in files if not path.name.startswith("consolidated")]
    if files:
        return files
    if (directory / _TORCH_INDEX).is_file():
        return _shards(directory, _TORCH_INDEX)
    files = sorted(directory.glob("pytorch_model*.bin"))
    if files:
        return files
    others = sorted(p.name for p in directory.iterdir() if p.suffix in _OTHER_SUFFIXES)
    if others:
        raise CheckpointError(
            f"{directory} has weights as {', '.join(others)}; native families read *.safetensors "
            "and pytorch_model*.bin in a directory. Name a GGUF file itself, or save the "
            "model again with save_pretrained"
        )
    raise CheckpointError(
        f"{directory} has no *.safetensors file; download the weights, or pass --load-format dummy"
    )


def _shards(directory: Path, index: str) -> list[Path]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / index} has no weight_map; download it again")
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    absent = [path.name for path in shards if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{directory} lacks {', '.join(absent)}, which {index} names; download them"
        )
    return shards


def _read_header(path: Path) -> Iterator[StoredTensor]:
    with _open(path) as file:
        places = {} if path.suffix == ".bin" else _places(path)
        for name in file.keys():  # noqa: SIM118 - not a dict
            shape = tuple(file.get_slice(name).get_shape())
            yield StoredTensor(path, name, shape, places.get(name))


def _places(path: Path) -> dict[str, StoredBytes]:
    """Where the tensors of a safetensors file lie, which its library has checked already.

    Source: the format's description, https://huggingface.co/docs/safetensors: the header's length
    in 8 bytes, little-endian, the header as JSON, and the tensors, at offsets from its end.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: StoredBytes(8 + length + begin, end - begin, _DTYPES[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _DTYPES
        for begin, end in [entry["data_offsets"]]
    }


def _is_plain(target: Tensor) -> bool:
    """Whether its elements lie on the host one after the other."""
    return target.device == _HOST and target.is_contiguous()


def _read_bytes(
    path: Path, place: StoredBytes, target: Tensor, threads: ThreadPoolExecutor
) -> None:
    """A large tensor in several pieces at once: fresh memory costs a page fault in each thread."""
    whole = target.flatten().view(torch.uint8).numpy().data
    starts = range(0, len(whole), _PIECE_BYTES)
    pieces = [(place.offset + start, whole[start : start + _PIECE_BYTES]) for start in starts]
    try:
        with path.open("rb", buffering=0) as file:
            if len(pieces) == 1:
                _read_piece(file, pieces[0])
                return
            list(threads.map(partial(_read_piece, file), pieces))
    except OSError as error:
        raise _damaged(path, error) from error


def _read_piece(file: FileIO, piece: tuple[int, memoryview]) -> None:
    """Fills the memory from the file's offset; leaves the file's own position alone."""
    offset, left = piece
    while left:
        count = os.preadv(file.fileno(), [left], offset)
        if not count:
            raise OSError(f"it ends {len(left)} bytes early")
        left, offset = left[count:], offset + count


class _TorchFile:
    """A file of PyTorch's own format, with the methods of a safetensors file that are used here.

    Mapped, so that a tensor is read when it is copied; nothing but tensors is unpickled.
    """

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )

    def keys(self) -> list[str]:
        """Names."""
        return list(self._tensors)

    def get_slice(self, name: str) -> _TorchSlice:
        """What tells a shape."""
        return _TorchSlice(self._tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        """A tensor that lies in the mapped file."""
        return self._tensors[name]


class _TorchSlice:
    """Tells a tensor's shape."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._tensor.shape)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".bin":
            yield _TorchFile(path)
            return
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, UnpicklingError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    size = path.stat().st_size if path.exists() else 0
    return CheckpointError(
        f"{path} ({size} bytes) is truncated or corrupt: {error}; delete it and download it again"
    )


def _with_nearest(name: str, surplus: list[str]) -> str:
    near = difflib.get_close_matches(name, surplus, n=1, cutoff=0.7)
    return f"{name} (the nearest there is: {near[0]})" if near else name


def _list(kind: str, names: list[str]) -> str:
    shown = "".join(f"\n    {name}" for name in names[:_MAX_LISTED])
    rest = len(names) - _MAX_LISTED
    return f"\n  {kind} ({len(names)}):{shown}" + (f"\n    and {rest} more" if rest > 0 else "")
