"""State-space models from their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quire.core.interface.backend import Device
from quire.core.interface.ops import PackedLinear
from quire.core.interface.quantization import QuantizedWeight
from quire.core.interface.worker import WorkerConfig
from quire.core.models.loading import WeightSource
from quire.core.models.model_config import load_config, read_json
from quire.core.models.state_space.delta_loading import projection_parts, read_projection
from quire.core.models.state_space.delta_mixer import DeltaWeights
from quire.core.models.state_space.delta_spec import DeltaSpec
from quire.core.models.state_space.describing import describe_state_space
from quire.core.models.state_space.mixers import MixerWeights
from quire.core.models.state_space.model import StateSpaceModel, StateSpaceWeights
from quire.core.models.state_space.spec import (
    StateSpaceSpec,
    StateSpaceTensors,
    read_spec,
)
from quire.core.models.transformers_adapter.pages import OwnPages
from quire.core.models.weights.checkpoint_files import CheckpointFiles
from quire.core.models.weights.checkpoint_quantization import parse_checkpoint_quantization
from quire.core.models.weights.dummy_weights import DummyWeights
from quire.core.models.weights.quantization import quantize
from quire.core.models.weights.quantization_spec import (
    QuantizationSpec,
    check_group_size,
    parse_quantization,
)
from quire.core.models.weights.quantized_files import (
    QuantizedFiles,
    move_quantized,
    read_codes,
)
from quire.core.models.weights.weight_layout import TensorShape

_QUANTIZED = ("in_proj", "out_proj")
"""Of a mixer, by the beginnings of their names."""


def load_state_space(config: WorkerConfig, device: Device) -> StateSpaceModel:
    """Loads `config.model`, one layer at a time.

    Raises: CheckpointError, UnsupportedError, DeviceOutOfMemory.
    """
    quantization = parse_quantization(config.quantization, config.options)
    directory = Path(config.model)
    # States are kept as the model computes them, whatever a cache of keys would be kept in.
    description = replace(describe_state_space(directory), cache_dtype=config.dtype).laid_out(
        dtype=config.dtype, cache_dtype=config.dtype, block_size=config.block_size
    )
    spec = read_spec(load_config(directory))
    tensors = StateSpaceTensors(spec)
    source = _open(config, directory, spec, tensors)
    if quantization is not None:
        layers = [tensors.mixer(layer) for layer in range(spec.num_layers)]
        check_group_size(quantization, mixer_inputs(layers))
    weights = MixerBuilder(source, device, config.dtype, quantization).build(spec, tensors)
    backends = [OwnPages(group, device.torch_device) for group in description.attention_groups]
    return StateSpaceModel(
        spec, description, weights, device, backends, max_model_len=config.max_model_len
    )


def _open(
    config: WorkerConfig, directory: Path, spec: StateSpaceSpec, tensors: StateSpaceTensors
) -> WeightSource:
    if config.load_format == "dummy":
        return DummyWeights(config.seed, norm_offset=0.0)
    files = open_files(directory, _rename)
    files.check(tensors, may_have=(tensors.lm_head.name,) if spec.has_tied_embeddings else ())
    return files


def open_files(directory: Path, rename: Callable[[str], str | None]) -> CheckpointFiles:
    """A checkpoint's files, whose weights may be stored quantized. Raises: CheckpointError."""
    stored = parse_checkpoint_quantization(read_json(directory / "config.json"), directory)
    if stored is None:
        return CheckpointFiles(directory, rename)
    return QuantizedFiles(directory, rename, stored)


def _rename(name: str) -> str | None:
    """Early checkpoints call the table of embeddings otherwise."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def mixer_inputs(mixers: Iterable[Mapping[str, TensorShape]]) -> Iterator[tuple[str, int]]:
    """Name and number of inputs of the products of mixers that are quantized."""
    for tensors in mixers:
        for name, tensor in tensors.items():
            if name.startswith(_QUANTIZED) and len(tensor.shape) == 2:
                yield tensor.name, tensor.shape[1]


class MixerBuilder:
    """Turns tensors of a source into what mixers multiply with.

    Quantized are the two large products alone. What makes time steps, B and C of the channels is
    small, and what it makes decides how fast a state forgets.
    """

    def __init__(
        self,
        source: WeightSource,
        device: Device,
        dtype: str,
        quantization: QuantizationSpec | None = None,
    ) -> None:
        self._source = source
        self._quantization = quantization
        claimed = device.capabilities.quantizations
        self._kept_formats = claimed if quantization is None else frozenset[str]()
        self._dtype_name = dtype
        self._ops = device.ops()
        self._device = device.torch_device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Memory of all that was built."""
        return self._size_bytes

    def build(self, spec: StateSpaceSpec, tensors: StateSpaceTensors) -> StateSpaceWeights:
        """All weights of a model of mixers alone."""
        embedding = self._read(tensors.embedding)
        norms = [self._read(tensors.norm(layer)) for layer in range(spec.num_layers)]
        norms.append(self._read(tensors.final_norm))
        mixers = [self.mixer(tensors.mixer(layer), spec) for layer in range(spec.num_layers)]
        if spec.has_tied_embeddings:
            lm_head = self._packed(embedding, None, is_head=True)
            self._size_bytes += lm_head.size_bytes
        else:
            lm_head = self._pack(self._cast(tensors.lm_head), is_head=True)
        return StateSpaceWeights(
            embedding=embedding,
            norms=norms,
            mixers=mixers,
            lm_head=lm_head,
            size_bytes=self._size_bytes,
        )

    def mixer(self, tensors: dict[str, TensorShape], spec: StateSpaceSpec) -> MixerWeights:
        """The weights of one mixer."""
        bias = tensors.get("conv1d.bias")
        is_first = spec.num_heads is None
        return MixerWeights(
            in_proj=self._linear(tensors, "in_proj"),
            conv=self._read(tensors["conv1d.weight"]).squeeze(1),
            conv_bias=None if bias is None else self._read(bias),
            out_proj=self._linear(tensors, "out_proj"),
            a=-torch.exp(self._float32(tensors["A_log"])),
            d=self._float32(tensors["D"]),
            dt_bias=self._float32(tensors["dt_proj.bias" if is_first else "dt_bias"]),
            x_proj=self._wide(tensors, "x_proj") if is_first else None,
            dt_proj=self._wide(tensors, "dt_proj", has_bias=False) if is_first else None,
            norm=self._read(tensors["norm.weight"]) if "norm.weight" in tensors else None,
            inner_norms=self._inner_norms(tensors) if spec.has_inner_norms else None,
        )

    def delta_mixer(self, tensors: dict[str, TensorShape], spec: DeltaSpec) -> DeltaWeights:
        """The weights of one gated delta net, its first projection in one piece."""
        return DeltaWeights(
            in_proj=self._delta_projection(tensors, spec),
            conv=self._read(tensors["conv1d.weight"]).squeeze(1),
            conv_bias=None,
            out_proj=self._linear(tensors, "out_proj"),
            a=-torch.exp(self._float32(tensors["A_log"])),
            dt_bias=self._float32(tensors["dt_bias"]),
            norm=self._float32(tensors["norm.weight"]),
        )

    def _inner_norms(self, tensors: dict[str, TensorShape]) -> tuple[Tensor, Tensor, Tensor]:
        dt, b, c = (self._read(tensors[f"{name}_layernorm.weight"]) for name in ("dt", "b", "c"))
        return dt, b, c

    def _linear(self, tensors: dict[str, TensorShape], name: str) -> PackedLinear:
        tensor, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        read = None if bias is None else self._read(bias)
        codes = read_codes(self._source, (tensor,), self._kept_formats)
        if codes is not None:
            return self._pack_codes(codes[0], read)
        return self._pack(self._cast(tensor), read)

    def _delta_projection(self, tensors: dict[str, TensorShape], spec: DeltaSpec) -> PackedLinear:
        """In codes if all its parts are in codes that are alike."""
        parts = projection_parts(spec, tensors)
        codes = read_codes(self._source, parts, self._kept_formats)
        if codes is None:
            return self._pack(read_projection(spec, tensors, self._cast))
        by_name = {part.name: weight for part, weight in zip(parts, codes, strict=True)}

        def rows(field: str) -> Tensor:
            return read_projection(spec, tensors, lambda part: getattr(by_name[part.name], field))

        zeros = None if codes[0].zeros is None else rows("zeros")
        whole = replace(codes[0], codes=rows("codes"), scales=rows("scales"), zeros=zeros)
        return self._pack_codes(whole, None)

    def _pack_codes(self, codes: QuantizedWeight, bias: Tensor | None) -> PackedLinear:
        moved = move_quantized(codes, str(self._device))
        packed = self._ops.pack_quantized_linear(moved, bias, self._dtype_name)
        self._size_bytes += packed.size_bytes
        return packed

    def _wide(
        self, tensors: dict[str, TensorShape], name: str, *, has_bias: bool = True
    ) -> PackedLinear:
        """Not quantized. `has_bias`: one that is there belongs to the product."""
        bias = tensors.get(f"{name}.bias") if has_bias else None
        weight = self._cast(tensors[f"{name}.weight"])
        packed = self._ops.pack_linear(weight, None if bias is None else self._read(bias))
        self._size_bytes += packed.size_bytes or weight.nbytes
        return packed

    def _pack(
        self, weight: Tensor, bias: Tensor | None = None, *, is_head: bool = False
    ) -> PackedLinear:
        packed = self._packed(weight, bias, is_head=is_head)
        self._size_bytes += packed.size_bytes or weight.nbytes
        return packed

    def _packed(self, weight: Tensor, bias: Tensor | None, *, is_head: bool) -> PackedLinear:
        if self._quantization is None:
            return self._ops.pack_linear(weight, bias)
        codes = quantize(weight, self._quantization, is_head=is_head, ops=self._ops)
        return self._ops.pack_quantized_linear(codes, bias, self._dtype_name)

    def _cast(self, tensor: TensorShape) -> Tensor:
        """One to be packed at once, perhaps still in its file."""
        return self._source.read(tensor).to(self._device, self._dtype)

    def _read(self, tensor: TensorShape) -> Tensor:
        # A copy: what a file maps would stay mapped.
        read = self._source.read(tensor).to(self._device, self._dtype, copy=True)
        self._size_bytes += read.nbytes
        return read

    def _float32(self, tensor: TensorShape) -> Tensor:
        read = self._source.read(tensor).to(self._device, torch.float32, copy=True)
        self._size_bytes += read.nbytes
        return read
