"""Checkpoints whose linear layers are stored quantized, as the contract's record or as numbers.

Every layout is turned into `QuantizedWeight`, or where that cannot say it (groups in the order of
activations) or the device does not take it, into float32. Source: as `checkpoint_quantization`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from quire.core.errors import CheckpointError
from quire.core.interface.quantization import QuantizedWeight
from quire.core.models.weights.checkpoint_files import CheckpointFiles
from quire.core.models.weights.checkpoint_quantization import CheckpointQuantization
from quire.core.models.weights.weight_layout import TensorShape

_WORD_BITS = 32
_NO_FLOAT8 = 0x7F
"""The bits of e4m3 that are no number, whatever the sign."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where output i of eight lies in a word of AWQ."""
_SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "pack-quantized": (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    ),
    "int-quantized": ("weight", "weight_scale", "weight_zero_point"),
    "float8": ("weight", "weight_scale", "weight_scale_inv", "input_scale", "activation_scale"),
}  # fmt: skip


class QuantizedFiles(CheckpointFiles):
    """A checkpoint's files whose linear layers may be stored as `settings` says."""

    def __init__(
        self,
        directory: Path,
        rename: Callable[[str], str | None],
        settings: CheckpointQuantization,
    ) -> None:
        super().__init__(directory, rename)
        self._settings = settings

    def check(self, expected: Iterable[TensorShape], *, may_have: tuple[str, ...] = ()) -> None:
        """As plain files; of a quantized layer all parts must be there, in their shapes."""
        wanted: list[TensorShape] = []
        allowed = list(may_have)
        for tensor in expected:
            if not self._is_quantized(tensor.name):
                wanted.append(tensor)
                continue
            wanted += self._parts(tensor)
            allowed += [self._part(tensor.name, s) for s in _SUFFIXES[self._settings.layout]]
        super().check(wanted, may_have=tuple(allowed))

    def read_into(self, tensor: TensorShape, target: Tensor) -> None:
        """As plain files; a quantized weight is widened and rounded once."""
        if self._is_quantized(tensor.name):
            target.copy_(self.read(tensor))
        else:
            super().read_into(tensor, target)

    def read(self, tensor: TensorShape) -> Tensor:
        """As plain files; a quantized weight in float32."""
        if not self._is_quantized(tensor.name):
            return super().read(tensor)
        if self._settings.layout == "float8":
            scales, size = self._float8_scales(tensor)
            wide = scales.repeat_interleave(size, 1)[:, : tensor.shape[1]]
            return self._read_part(tensor, "weight").float() * wide
        return _widen(*self._decode(tensor), self._groups_of_inputs(tensor))

    def read_quantized(
        self, tensor: TensorShape, formats: Collection[str]
    ) -> QuantizedWeight | None:
        """As plain files; None also for groups that are not in order."""
        settings = self._settings
        if not self._is_quantized(tensor.name) or settings.format_name not in formats:
            return None
        if settings.layout == "float8":
            return self._read_float8(tensor)
        groups, group_size = self._groups_of_inputs(tensor), self._group_size(tensor)
        in_order = torch.arange(tensor.shape[1]) // group_size
        if not torch.equal(groups, in_order):
            return None
        codes, scales, zeros = self._decode(tensor)
        bits = self._settings.bits
        if bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        return QuantizedWeight(
            bits=bits,
            group_size=0 if group_size == tensor.shape[1] else group_size,
            num_inputs=tensor.shape[1],
            codes=codes.to(torch.uint8).contiguous(),
            scales=scales.contiguous(),
            zeros=zeros.to(torch.uint8).contiguous(),
            activations=self._settings.activations,
            scheme=self._settings.scheme,
        )

    # --- parts ----------------------------------------------------------------------------------

    def _part(self, name: str, suffix: str) -> str:
        return f"{name.removesuffix('.weight')}.{suffix}"

    def _has(self, name: str, suffix: str) -> bool:
        return self._part(name, suffix) in self._stored

    def _is_quantized(self, name: str) -> bool:
        if not name.endswith(".weight"):
            return False
        if self._settings.layout in ("gptq", "awq"):
            return self._has(name, "qweight")
        marks = ("weight_packed", "weight_scale", "weight_scale_inv")
        return any(self._has(name, mark) for mark in marks)

    def _parts(self, tensor: TensorShape) -> list[TensorShape]:
        """What must be there of a quantized weight, by name and shape."""
        rows, columns = tensor.shape
        groups, packed = columns // self._group_size(tensor), _WORD_BITS // self._settings.bits
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "gptq": {
                "qweight": (columns // packed, rows),
                "qzeros": (groups, rows // packed),
                "scales": (groups, rows),
            },
            "awq": {
                "qweight": (columns, rows // packed),
                "qzeros": (groups, rows // packed),
                "scales": (groups, rows),
            },
            "pack-quantized": {
                "weight_packed": (rows, -(-columns // packed)),
                "weight_scale": (rows, groups),
            },
            "int-quantized": {"weight": (rows, columns), "weight_scale": (rows, groups)},
            "float8": {"weight": (rows, columns)},
        }
        wanted = dict(shapes[self._settings.layout])
        if self._settings.has_activation_order and self._settings.layout == "gptq":
            wanted["g_idx"] = (columns,)
        return [
            TensorShape(name=self._part(tensor.name, suffix), shape=shape)
            for suffix, shape in wanted.items()
        ]

    def _group_size(self, tensor: TensorShape) -> int:
        size = self._settings.group_size or tensor.shape[1]
        if tensor.shape[1] % size:
            raise CheckpointError(
                f"{tensor.name} has {tensor.shape[1]} inputs, which groups of {size} do not "
                "divide; give the config.json that belongs to these weights"
            )
        return size

    def _groups_of_inputs(self, tensor: TensorShape) -> Tensor:
        """The group of each input: int64 [K]."""
        for suffix in ("g_idx", "weight_g_idx"):
            if self._has(tensor.name, suffix):
                return self._read_part(tensor, suffix).long()
        return torch.arange(tensor.shape[1]) // self._group_size(tensor)

    def _read_part(self, tensor: TensorShape, suffix: str) -> Tensor:
        return super().read(TensorShape(name=self._part(tensor.name, suffix), shape=()))

    # --- layouts --------------------------------------------------------------------------------

    def _decode(self, tensor: TensorShape) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int32 [N, K], scales [N, G] and zeros int32 [N, G]."""
        layout, bits = self._settings.layout, self._settings.bits
        if layout in ("pack-quantized", "int-quantized"):
            return self._decode_compressed(tensor)
        words, zero_words = self._read_part(tensor, "qweight"), self._read_part(tensor, "qzeros")
        scales = self._read_part(tensor, "scales").T
        order = None if layout == "gptq" else _AWQ_ORDER
        codes = unpack(words.T, bits) if order is None else unpack(words, bits, order).T
        zeros = unpack(zero_words, bits, order).T + self._settings.zero_offset
        if zeros.max() > 255:
            raise CheckpointError(f"{tensor.name} has a zero of 256; save it again as gptq_v2")
        return codes, scales, zeros

    def _decode_compressed(self, tensor: TensorShape) -> tuple[Tensor, Tensor, Tensor]:
        """Signed codes and zeros, moved up by half their range."""
        bits, (rows, columns) = self._settings.bits, tensor.shape
        middle, scales = 1 << (bits - 1), self._read_part(tensor, "weight_scale")
        is_packed = self._settings.layout == "pack-quantized"
        if is_packed:
            codes = unpack(self._read_part(tensor, "weight_packed"), bits)[:, :columns]
        else:
            codes = self._read_part(tensor, "weight").int() + middle
        if not self._has(tensor.name, "weight_zero_point"):
            return codes, scales, torch.full(scales.shape, middle, dtype=torch.int32)
        zeros = self._read_part(tensor, "weight_zero_point")
        if is_packed and zeros.dtype == torch.int32:
            return codes, scales, unpack(zeros.T, bits).T[:rows]
        return codes, scales, zeros.int() + middle

    def _read_float8(self, tensor: TensorShape) -> QuantizedWeight | None:
        """None: the last group is short, or a code is no number, as then only numbers show."""
        weight, (scales, size) = self._read_part(tensor, "weight"), self._float8_scales(tensor)
        if weight.dtype != torch.float8_e4m3fn or tensor.shape[1] % size:
            return None
        codes = weight.view(torch.uint8)
        if bool(((codes & _NO_FLOAT8) == _NO_FLOAT8).any()):
            return None
        return QuantizedWeight(
            bits=8,
            group_size=0 if size == tensor.shape[1] else size,
            num_inputs=tensor.shape[1],
            codes=codes.contiguous(),
            scales=scales.contiguous(),
            activations=self._settings.activations,
            scheme=self._settings.scheme,
            encoding="float8_e4m3fn",
        )

    def _float8_scales(self, tensor: TensorShape) -> tuple[Tensor, int]:
        """float32 [N, G], and the inputs of a group, of which the last may have fewer."""
        rows, columns = tensor.shape
        suffix = (
            "weight_scale_inv" if self._has(tensor.name, "weight_scale_inv") else "weight_scale"
        )
        scale = self._read_part(tensor, suffix).float()
        if self._settings.block is not None and scale.dim() == 2:
            outputs, inputs = self._settings.block
            return scale.repeat_interleave(outputs, 0)[:rows], min(inputs, columns)
        return scale.reshape(-1, 1).expand(rows, 1), columns


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes int32 [R, C * 32 / bits] of words int32 [R, C], the lowest bits first.

    `order`: the place in a word of each of its codes, where that is another.
    """
    places = order or tuple(range(_WORD_BITS // bits))
    shifts = torch.tensor(places, dtype=torch.int32) * bits
    return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(1)


def _widen(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """(code - zero) * scale: float32 [N, K]."""
    return (codes - zeros[:, groups]).float() * scales[:, groups].float()


@runtime_checkable
class CodedSource(Protocol):
    """A source of tensors that may have some in codes."""

    def read_quantized(
        self, tensor: TensorShape, formats: Collection[str]
    ) -> QuantizedWeight | None:
        """One weight in one of the formats; None: it is to be read as numbers."""
        ...


def read_codes(
    source: object, parts: Sequence[TensorShape], formats: Collection[str]
) -> list[QuantizedWeight] | None:
    """Parts of one product as a source has them, alike but for their rows; None: not all in codes.

    formats: what the device multiplies by.
    """
    if not formats or not isinstance(source, CodedSource):
        return None
    found = [source.read_quantized(part, formats) for part in parts]
    codes = [weight for weight in found if weight is not None]
    return codes if len(codes) == len(parts) and _are_alike(codes) else None


def move_rows(weight: QuantizedWeight, move: Callable[[Tensor], Tensor]) -> QuantizedWeight:
    """The same with its rows in another order, or others beside them."""
    return replace(
        weight,
        codes=move(weight.codes),
        scales=move(weight.scales),
        zeros=None if weight.zeros is None else move(weight.zeros),
    )


def _are_alike(parts: Sequence[QuantizedWeight]) -> bool:
    kinds = {
        (
            *(p.bits, p.group_size, p.num_inputs, p.activations, p.encoding),
            *(p.scales.dtype, p.zeros is None),
        )
        for p in parts
    }
    return len(kinds) == 1


def stack_quantized(parts: list[QuantizedWeight]) -> QuantizedWeight | None:
    """Weights below one another; None: they differ in more than their rows."""
    if not _are_alike(parts):
        return None
    first = parts[0]
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return replace(
        first,
        codes=torch.cat([p.codes for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def move_quantized(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    """The same on a device of torch."""
    return replace(
        weight,
        codes=weight.codes.to(device),
        scales=weight.scales.to(device),
        zeros=None if weight.zeros is None else weight.zeros.to(device),
    )
