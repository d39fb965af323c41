"""From safetensors files, or from a seed, to the arrays that `model.forward` takes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from quire.core.interface import CheckpointError
from quire_jax.decoder import Decoder
from quire_jax.model import NO_WINDOW, Weights, rotary_table

Numbers = npt.NDArray[Any]
Read = Callable[[str, tuple[int, ...]], Numbers]
"""A tensor of a checkpoint by name, of the shape that it must have."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One array of all layers: tensors of a layer, put one below the other."""

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """Names in a layer, without prefix, and shapes."""


def make_weights(
    decoder: Decoder, read: Read, *, dtype: str, max_model_len: int, device: jax.Device
) -> Weights:
    """Loads every weight onto `device`, in `dtype`; norms stay float32."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def put(array: Numbers, is_norm: bool = False) -> jax.Array:
        # A norm's offset is added here, before anything is rounded.
        if is_norm:
            return jax.device_put(array.astype(np.float32) + decoder.norm_offset, device)
        return jax.device_put(array.astype(kind), device)

    table = (decoder.vocab_size, decoder.hidden_size)
    cos, sin = rotary_table(decoder.ropes, max_model_len)
    weights: Weights = {
        "embedding": put(read("model.embed_tokens.weight", table)),
        "final_norm": put(read("model.norm.weight", table[1:]), is_norm=True),
        "cos": jax.device_put(cos, device),
        "sin": jax.device_put(sin, device),
        "layers": {
            stack.name: put(_stacked(decoder, stack, read), stack.name.endswith("norm"))
            for stack in stacks_of(decoder)
        }
        | {name: jax.device_put(array, device) for name, array in _facts(decoder).items()},
    }
    if not decoder.is_tied:
        weights["head"] = put(read("lm_head.weight", table))
    return weights


def stacks_of(decoder: Decoder) -> Iterator[Stack]:
    """The arrays of the layers."""
    hidden, inner, size = decoder.hidden_size, decoder.intermediate_size, decoder.head_size
    queries, pairs = decoder.num_heads * size, decoder.num_kv_heads * size
    qkv = {"self_attn.q_proj": queries, "self_attn.k_proj": pairs, "self_attn.v_proj": pairs}
    gate_up = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    yield from _linear("qkv", qkv, hidden, decoder.has_qkv_bias)
    yield from _linear("output", {"self_attn.o_proj": hidden}, queries, decoder.has_output_bias)
    yield from _linear("gate_up", gate_up, hidden, decoder.has_mlp_bias)
    yield from _linear("down", {"mlp.down_proj": hidden}, inner, decoder.has_mlp_bias)
    for name, (part, length) in _norms(decoder).items():
        yield Stack(name=name, parts=((f"{part}.weight", (length,)),))


def num_parameters(decoder: Decoder) -> int:
    """Of the checkpoint; a tied head counts once."""
    table = decoder.vocab_size * decoder.hidden_size
    layer = sum(int(np.prod(shape)) for s in stacks_of(decoder) for _, shape in s.parts)
    return table * (1 if decoder.is_tied else 2) + decoder.hidden_size + layer * decoder.num_layers


def make_dummy_reader(decoder: Decoder, seed: int) -> Read:
    """Random numbers by name and seed: norms of 1, biases of 0, the rest N(0, 1 / fan_in)."""

    def read(name: str, shape: tuple[int, ...]) -> Numbers:
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0 - decoder.norm_offset
            return np.full(shape, value, np.float32)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        numbers = rng.standard_normal(shape, dtype=np.float32)
        return numbers * np.float32(shape[-1] ** -0.5)

    return read


class CheckpointReader:
    """Tensors of a directory's safetensors files by name. Call it; close it when done."""

    def __init__(self, directory: Path) -> None:
        """Raises: CheckpointError if there are none or one is broken."""
        self._directory = directory
        self._files = [_open(path) for path in _paths(directory)]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __call__(self, name: str, shape: tuple[int, ...]) -> Numbers:
        """Raises: CheckpointError if it is missing or of another shape."""
        # Checkpoints of bare models lack the prefix.
        found = next((n for n in (name, name.removeprefix("model.")) if n in self._file_of), None)
        if found is None:
            raise CheckpointError(
                f"{self._directory} holds no tensor {name}; is it a complete checkpoint of the "
                "architecture that its config.json names?"
            )
        array: Numbers = self._file_of[found].get_tensor(found)
        if array.shape != shape:
            raise CheckpointError(
                f"{found} in {self._directory} has shape {array.shape}; its config.json asks for "
                f"{shape}: the files do not belong together"
            )
        return array

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.__exit__(None, None, None)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy").__enter__()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error


def _paths(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{directory} holds no *.safetensors; download the checkpoint")
        return paths
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r}); download it again") from error
    return [directory / name for name in sorted(names)]


def _linear(name: str, parts: dict[str, int], width: int, has_bias: bool) -> Iterable[Stack]:
    yield Stack(name=name, parts=tuple((f"{p}.weight", (n, width)) for p, n in parts.items()))
    if has_bias:
        biases = tuple((f"{part}.bias", (count,)) for part, count in parts.items())
        yield Stack(name=f"{name}_bias", parts=biases)


def _norms(decoder: Decoder) -> dict[str, tuple[str, int]]:
    """Names of norms to their names in a layer and their lengths."""
    hidden, size = decoder.hidden_size, decoder.head_size
    norms = {"input_norm": ("input_layernorm", hidden)}
    if decoder.has_sandwich_norms:
        norms["attention_output_norm"] = ("post_attention_layernorm", hidden)
        norms["mlp_norm"] = ("pre_feedforward_layernorm", hidden)
        norms["mlp_output_norm"] = ("post_feedforward_layernorm", hidden)
    else:
        norms["mlp_norm"] = ("post_attention_layernorm", hidden)
    if decoder.has_qk_norm:
        norms |= {f"{x}_norm": (f"self_attn.{x}_norm", size) for x in "qk"}
    return norms


def _stacked(decoder: Decoder, stack: Stack, read: Read) -> Numbers:
    layers = [
        np.concatenate([read(f"model.layers.{layer}.{name}", shape) for name, shape in stack.parts])
        for layer in range(decoder.num_layers)
    ]
    return np.stack(layers)


def _facts(decoder: Decoder) -> dict[str, Numbers]:
    """What differs from layer to layer, as arrays, so that one compiled layer serves all."""
    group_of = {
        layer: number for number, layers in enumerate(decoder.groups.values()) for layer in layers
    }
    windows = [NO_WINDOW if window is None else window for window in decoder.windows]
    return {
        "group": np.array([group_of[layer] for layer in range(decoder.num_layers)], np.int32),
        "window": np.array(windows, np.int32),
        "rope": np.array(decoder.layer_ropes, np.int32),
    }
