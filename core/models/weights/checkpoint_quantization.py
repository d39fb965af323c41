"""What a config.json says of weights that are stored quantized, and which of it can be read.

Source: the `quantization_config` of transformers, and the formats' own descriptions: GPTQ (Frantar
et al. 2022), AWQ (Lin et al. 2023), compressed-tensors, FP8 of DeepSeek-V3 (2024, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.errors import Reason, UnsupportedError

METHODS = ("gptq", "awq", "compressed-tensors", "fp8")
_PACKED, _INTEGERS, _FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_BITS = (4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointQuantization:
    """How the weights of the linear layers of a checkpoint are stored."""

    layout: str
    """`gptq`, `awq`, `pack-quantized`, `int-quantized` or `float8`."""
    scheme: str
    """Where it comes from: one of `METHODS`."""
    bits: int = 8
    group_size: int = 0
    """Inputs that share a scale; 0: all of a row."""
    zero_offset: int = 0
    """What the stored zeros lack."""
    is_symmetric: bool = True
    has_activation_order: bool = False
    activations: str = "none"
    """As `QuantizedWeight.activations`."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale, of `float8`; None: a scale for each row or for all."""

    @property
    def format_name(self) -> str:
        """As `QuantizedWeight.format_name`."""
        return "fp8" if self.layout == "float8" else f"int{self.bits}"


def parse_checkpoint_quantization(
    raw: Mapping[str, Any], directory: Path
) -> CheckpointQuantization | None:
    """How the config says that weights are stored; None: plainly.

    Raises: UnsupportedError with every reason.
    """
    settings = raw.get("quantization_config")
    if not settings:
        return None
    found = settings if isinstance(settings, dict) else {}
    method = str(found.get("quant_method", "unknown"))
    reasons = list(_reasons(method, found))
    if reasons:
        raise UnsupportedError(reasons, what=f"the checkpoint in {directory}")
    parse = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _compressed}
    return parse[method](found)


def _gptq(found: Mapping[str, Any]) -> CheckpointQuantization:
    return CheckpointQuantization(
        layout="gptq",
        scheme="gptq",
        bits=int(found["bits"]),
        group_size=_group_size(found),
        # The first version of the format stores zeros less one.
        zero_offset=0 if found.get("checkpoint_format") == "gptq_v2" else 1,
        has_activation_order=bool(found.get("desc_act")),
    )


def _awq(found: Mapping[str, Any]) -> CheckpointQuantization:
    return CheckpointQuantization(
        layout="awq", scheme="awq", bits=4, group_size=_group_size(found), is_symmetric=False
    )


def _fp8(found: Mapping[str, Any]) -> CheckpointQuantization:
    block = found.get("weight_block_size")
    is_dynamic = found.get("activation_scheme", "dynamic") == "dynamic"
    return CheckpointQuantization(
        layout="float8",
        scheme="fp8",
        block=(int(block[0]), int(block[1])) if block else None,
        activations=("group" if block else "token") if is_dynamic else "none",
    )


def _compressed(found: Mapping[str, Any]) -> CheckpointQuantization:
    group = next(iter(found["config_groups"].values()))
    weights, layout = group["weights"], _layout_of(found, group)
    if layout == _FLOATS:
        block = weights.get("block_structure")
        return CheckpointQuantization(
            layout="float8",
            scheme="compressed-tensors",
            block=(int(block[0]), int(block[1])) if block else None,
            activations=_float8_activations(group.get("input_activations"), block),
        )
    return CheckpointQuantization(
        layout=layout,
        scheme="compressed-tensors",
        bits=int(weights["num_bits"]),
        group_size=_group_size(weights),
        is_symmetric=bool(weights.get("symmetric", True)),
        has_activation_order=weights.get("actorder") == "group",
        activations="token" if group.get("input_activations") else "none",
    )


def _float8_activations(inputs: Mapping[str, Any] | None, block: Sequence[int] | None) -> str:
    """Static scales are left out: activations as they are come nearer to what was trained."""
    if not inputs or not inputs.get("dynamic"):
        return "none"
    is_grouped = inputs.get("strategy") == "group"
    if is_grouped and block and int(inputs.get("group_size") or 0) == int(block[1]):
        return "group"
    return "token" if inputs.get("strategy") == "token" else "none"


def _group_size(found: Mapping[str, Any]) -> int:
    return max(int(found.get("group_size") or 0), 0)


def _layout_of(found: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    return str(group.get("format") or found.get("format"))


def _reasons(method: str, found: Mapping[str, Any]) -> Iterator[Reason]:
    if method not in METHODS:
        yield _reason(f"weights quantized by {method}", f"plain weights, {', '.join(METHODS)}")
    elif method == "gptq":
        yield from _one_of("GPTQ with bits", found.get("bits"), _BITS)
        yield from _one_of(
            "GPTQ with checkpoint_format",
            found.get("checkpoint_format") or "gptq",
            ("gptq", "gptq_v2"),
        )
    elif method == "awq":
        yield from _one_of("AWQ with bits", found.get("bits", found.get("w_bit")), (4,))
        yield from _one_of("AWQ with version", str(found.get("version", "gemm")).lower(), ("gemm",))
        if not found.get("zero_point", True):
            yield _reason("AWQ without zero points", "AWQ with zero points")
    elif method == "fp8":
        yield from _one_of("FP8 with fmt", found.get("fmt") or "e4m3", ("e4m3",))
    else:
        yield from _compressed_reasons(found)


def _compressed_reasons(found: Mapping[str, Any]) -> Iterator[Reason]:
    groups = found.get("config_groups") or {}
    if not isinstance(groups, dict) or len(groups) != 1:
        yield _reason(f"compressed-tensors with {len(groups)} config_groups", "one group")
        return
    group = next(iter(groups.values()))
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    layout = _layout_of(found, group)
    if layout not in (_PACKED, _INTEGERS, _FLOATS):
        known = f"{_PACKED}, {_INTEGERS}, {_FLOATS}"
        yield _reason(f"compressed-tensors of format {layout}", known)
        return
    bits = _BITS if layout == _PACKED else (8,)
    yield from _one_of("compressed-tensors with num_bits", weights.get("num_bits"), bits)
    strategies = ("channel", "group") if layout != _FLOATS else ("tensor", "channel", "block")
    yield from _one_of("weights with strategy", weights.get("strategy"), strategies)
    if inputs and layout != _FLOATS:
        if not inputs.get("dynamic") or inputs.get("strategy") != "token":
            yield _reason("activations rounded by static scales", "dynamic ones, by the token")
        if inputs.get("num_bits") != 8 or not inputs.get("symmetric", True):
            yield _reason("activations other than symmetric int8", "symmetric int8")
    if found.get("kv_cache_scheme"):
        yield _reason("a cache quantized by the checkpoint", "--cache-dtype")
    if (found.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        yield _reason("sparse weights", "dense ones")


def _one_of(what: str, value: object, known: tuple[object, ...]) -> Iterator[Reason]:
    if value not in known:
        yield _reason(f"{what} {value}", ", ".join(map(str, known)))


def _reason(need: str, have: str) -> Reason:
    return Reason(
        code="model.quantization",
        need=need,
        have=have,
        remedy="use the model's unquantized checkpoint, with --quantization int8 or int4",
    )
