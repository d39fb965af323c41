"""Tiny checkpoints in the layouts of quantized ones, written by obvious loops, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each nibble of a word holds."""
Parts = dict[str, Tensor]


def rounded(weight: Tensor, bits: int, group: int, *, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes [N, K], scales (float16) and zeros [N, K // group], and what they mean: float32 [N, K]."""
    grouped = weight.view(weight.shape[0], -1, group)
    most = 2**bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        scales = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        scales = ((high - low) / most).half()
        zeros = (-low / scales.float()).round().clamp(1, most).long()
    codes = (grouped / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    codes = codes.clamp(0, most)
    meant = (codes - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)
    return codes.long().flatten(1), scales, zeros, meant.flatten(1)


def pack_rows(codes: Tensor, bits: int, columns: tuple[int, ...] | None = None) -> Tensor:
    """Words int32 [R, C * bits / 32]; nibble i of a word holds column `columns[i]` of its own."""
    count = 32 // bits
    rows, width = codes.shape
    words = torch.zeros(rows, -(-width // count), dtype=torch.int64)
    for row in range(rows):
        for word in range(words.shape[1]):
            value = 0
            for i, column in enumerate(columns or range(count)):
                if word * count + column < width:
                    value |= int(codes[row, word * count + column]) << (i * bits)
            words[row, word] = value - 2**32 if value >= 2**31 else value
    return words.to(torch.int32)


def as_gptq(
    weight: Tensor, *, bits: int, version: int, order: bool = False
) -> tuple[Parts, Tensor]:
    """GPTQ; `order`: groups are of inputs from all over the row."""
    groups = torch.arange(weight.shape[1]) // GROUP
    shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(3))
    place = shuffled if order else torch.arange(len(groups))
    codes, scales, zeros, meant = rounded(weight[:, place], bits, GROUP, symmetric=version == 1)
    original = torch.argsort(place)
    stored = zeros - 1 if version == 1 else zeros
    parts = {
        "qweight": pack_rows(codes[:, original], bits).T,
        "qzeros": pack_rows(stored.T, bits),
        "scales": scales.T,
        "g_idx": groups[original].int(),
    }
    return parts, meant[:, original]


def as_awq(weight: Tensor) -> tuple[Parts, Tensor]:
    """AWQ of version gemm: columns interleaved within a word."""
    codes, scales, zeros, meant = rounded(weight, 4, GROUP, symmetric=False)
    parts = {
        "qweight": pack_rows(codes.T, 4, AWQ_COLUMNS),
        "qzeros": pack_rows(zeros.T, 4, AWQ_COLUMNS),
        "scales": scales.T,
    }
    return parts, meant


def as_packed(weight: Tensor, *, symmetric: bool) -> tuple[Parts, Tensor]:
    """compressed-tensors, pack-quantized."""
    codes, scales, zeros, meant = rounded(weight, 4, GROUP, symmetric=symmetric)
    parts = {
        "weight_packed": pack_rows(codes, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_rows(zeros.T, 4).T
    return parts, meant


def as_integers(weight: Tensor) -> tuple[Parts, Tensor]:
    """compressed-tensors, int-quantized, a scale for each output."""
    codes, scales, _, meant = rounded(weight, 8, weight.shape[1], symmetric=True)
    return {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}, meant


def as_float8(
    weight: Tensor, *, block: int | tuple[int, int] | None, suffix: str
) -> tuple[Parts, Tensor]:
    """Eight-bit floats with a scale for each block, or for each row."""
    step, width = (block, block) if isinstance(block, int) else block or (1, weight.shape[1])
    rows, columns = -(-weight.shape[0] // step), -(-weight.shape[1] // width)
    scales = torch.empty(rows, columns)
    narrow = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * step, (i + 1) * step), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[part].abs().max() / 448
            narrow[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = narrow[part].float() * scales[i, j]
    return {"weight": narrow, suffix: scales}, meant


def quantize_checkpoint(
    directory: Path,
    plain: Path,
    settings: dict[str, object],
    encode: Callable[[Tensor], tuple[Parts, Tensor]],
    plain_names: tuple[str, ...] = (),
) -> None:
    """Rewrites the model in `directory`, and the one in `plain` with the numbers that are meant."""
    tensors = load_file(directory / "model.safetensors")
    stored, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() != 2 or "embed" in name or "lm_head" in name or "mlp.gate." in name:
            continue
        if not name.endswith(".weight") or any(part in name for part in plain_names):
            continue
        parts, meant[name] = encode(weight)
        del stored[name]
        stem = name.removesuffix(".weight")
        stored.update({f"{stem}.{part}": value for part, value in parts.items()})
    for target, content in ((directory, stored), (plain, meant)):
        contiguous = {name: value.contiguous() for name, value in content.items()}
        save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": settings}))
