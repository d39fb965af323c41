"""Hybrid models from their checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quire.core.interface.backend import Device
from quire.core.interface.quantization import QuantizedWeight
from quire.core.interface.worker import WorkerConfig
from quire.core.models.decoder import make_attention_backends
from quire.core.models.description import ModelDescription
from quire.core.models.hybrid.describing import describe_hybrid, read_hybrid
from quire.core.models.hybrid.model import HybridLayerWeights, HybridModel, HybridWeights
from quire.core.models.hybrid.spec import HybridSpec, HybridTensors
from quire.core.models.loading import WeightBuilder, WeightSource
from quire.core.models.mlp import DenseWeights, MixtureWeights
from quire.core.models.self_attention import HeadWeights
from quire.core.models.state_space.delta_mixer import DeltaWeights
from quire.core.models.state_space.delta_spec import DeltaSpec
from quire.core.models.state_space.loading import MixerBuilder, mixer_inputs, open_files
from quire.core.models.state_space.mixer_spec import MixerSpec
from quire.core.models.state_space.mixers import MixerWeights
from quire.core.models.state_space.spec import StateSpaceSpec
from quire.core.models.transformers_adapter.pages import OwnPages
from quire.core.models.weights.checkpoint_files import CheckpointFiles
from quire.core.models.weights.dummy_weights import DummyWeights
from quire.core.models.weights.quantization import linear_inputs
from quire.core.models.weights.quantization_spec import check_group_size, parse_quantization
from quire.core.models.weights.quantized_files import read_codes
from quire.core.models.weights.weight_layout import (
    DenseTensors,
    HeadTensors,
    LayerTensors,
    TensorShape,
)

_LOG = logging.getLogger(__name__)


def load_hybrid(config: WorkerConfig, device: Device) -> HybridModel:
    """Loads `config.model`, one layer at a time.

    Raises: CheckpointError, UnsupportedError, DeviceOutOfMemory.
    """
    quantization = parse_quantization(config.quantization, config.options)
    directory = Path(config.model)
    description = _laid_out(describe_hybrid(directory), config)
    spec = read_hybrid(directory)
    tensors, stored = _open(config, directory, spec)
    keys, states = description.attention_groups
    attention = make_attention_backends(replace(description, attention_groups=(keys,)), device)
    source = ScaledWeights(stored, spec.weight_scales)
    if quantization is not None:
        check_group_size(quantization, linear_inputs(tensors.decoder))
        check_group_size(quantization, mixer_inputs(tensors.mixers.values()))
    mixers = MixerBuilder(_source_of_mixers(config, source), device, config.dtype, quantization)
    described = replace(description, decoder=spec.decoder)
    builder = _HybridBuilder(source, described, device, quantization)
    return HybridModel(
        spec,
        description,
        builder.build_hybrid(spec, tensors, mixers),
        device,
        [*attention, OwnPages(states, device.torch_device)],
        max_model_len=config.max_model_len,
    )


def _laid_out(description: ModelDescription, config: WorkerConfig) -> ModelDescription:
    """States are kept as the model computes them, whatever keys and values are kept in."""
    laid_out = description.laid_out(
        dtype=config.dtype, cache_dtype=config.cache_dtype, block_size=config.block_size
    )
    keys, states = laid_out.attention_groups
    states = replace(states, spec=replace(states.spec, cache_dtype=config.dtype))
    return replace(laid_out, attention_groups=(keys, states))


def _open(
    config: WorkerConfig, directory: Path, spec: HybridSpec
) -> tuple[HybridTensors, WeightSource]:
    """What a checkpoint holds, by the names that it has, and where it is read."""
    if config.load_format == "dummy":
        made = DummyWeights(config.seed, norm_offset=spec.decoder.norm_offset)
        return HybridTensors(spec), made
    files = _open_files(directory, spec)
    tensors = HybridTensors(_named_as_stored(spec, files))
    tied = (f"{spec.names.lm_head}.weight",) if tensors.decoder.lm_head is None else ()
    files.check(tensors, may_have=tied)
    return tensors, files


def _named_as_stored(spec: HybridSpec, files: CheckpointFiles) -> HybridSpec:
    """With the names of merged experts, if the first sparse layer has them merged."""
    names, mixture = spec.merged_names, spec.decoder.mixture
    if names is None or names.experts.merged is None or mixture is None:
        return spec
    first = names.layer.format(layer=min(mixture.layers)) + names.experts.merged[0]
    return replace(spec, names=names) if first in files else spec


def _open_files(directory: Path, spec: HybridSpec) -> CheckpointFiles:
    """Without what no text depends on."""
    ignored: list[str] = []

    def rename(name: str) -> str | None:
        if not name.startswith(spec.ignored_prefixes):
            return spec.names.rename(name)
        ignored.append(name)
        return None

    files = open_files(directory, rename)
    if ignored:
        _LOG.warning(
            "%s: %d tensors under %s are left out: no text depends on them",
            directory, len(ignored), " and ".join(spec.ignored_prefixes),
        )  # fmt: skip
    return files


def _source_of_mixers(config: WorkerConfig, source: WeightSource) -> WeightSource:
    """The same; but what is made up has no offset in the norms of mixers."""
    is_dummy = config.load_format == "dummy"
    return DummyWeights(config.seed, norm_offset=0.0) if is_dummy else source


class ScaledWeights:
    """Another source's tensors, some of them multiplied on the way, in float32.

    A multiplier of a layer's output costs nothing at run time that way, and is rounded once.
    """

    def __init__(self, source: WeightSource, scales: Mapping[str, tuple[float, ...]]) -> None:
        self._source = source
        self._scales = {
            name: torch.tensor(scale) for name, scale in scales.items() if set(scale) != {1.0}
        }

    def read(self, tensor: TensorShape) -> Tensor:
        """One tensor on the host; float32 where it is multiplied."""
        scale = self._scale_of(tensor)
        read = self._source.read(tensor)
        return read if scale is None else read.float() * scale

    def read_into(self, tensor: TensorShape, target: Tensor) -> None:
        """Writes one tensor to `target`."""
        if self._scale_of(tensor) is None:
            self._source.read_into(tensor, target)
        else:
            target.copy_(self.read(tensor))

    def read_quantized(
        self, tensor: TensorShape, formats: Collection[str]
    ) -> QuantizedWeight | None:
        """One in codes, whose scales are multiplied; None: it has none."""
        codes = read_codes(self._source, (tensor,), formats)
        scale = self._scale_of(tensor)
        if codes is None or scale is None:
            return None if codes is None else codes[0]
        return replace(codes[0], scales=codes[0].scales.float() * scale)

    def _scale_of(self, tensor: TensorShape) -> Tensor | None:
        """One number, or one for each row."""
        for name, scale in self._scales.items():
            if tensor.name.endswith("." + name):
                return scale.view(-1, *(1 for _ in tensor.shape[1:]))
        return None


def _build_mixer(
    mixers: MixerBuilder, tensors: dict[str, TensorShape], spec: MixerSpec
) -> MixerWeights | DeltaWeights:
    if isinstance(spec, DeltaSpec):
        return mixers.delta_mixer(tensors, spec)
    assert isinstance(spec, StateSpaceSpec), spec
    return mixers.mixer(tensors, spec)


class _HybridBuilder(WeightBuilder):
    """Turns tensors of a source into what the layers multiply with."""

    def build_hybrid(
        self, spec: HybridSpec, tensors: HybridTensors, mixers: MixerBuilder
    ) -> HybridWeights:
        """All weights; `mixers` reads those of the mixers."""
        decoder = tensors.decoder
        embedding = self._embedding = self._stack((decoder.embedding,))
        self._size_bytes += embedding.nbytes
        layers = []
        for index, layer in enumerate(decoder.layers):
            mixer = tensors.mixers.get(index)
            has_attention = index in spec.attention_layers
            layers.append(
                HybridLayerWeights(
                    input_norm=self._norm(layer.input_norm),
                    mixer=None if mixer is None else _build_mixer(mixers, mixer, spec.mixer),
                    attention=self._attention(layer) if has_attention else None,
                    output=self._linear(layer.output) if has_attention else None,
                    mlp_norm=self._norm(layer.mlp_norm),
                    mlp=self._mlp(layer),
                )
            )
        lm_head = (
            self._pack(embedding, None, is_head=True)
            if decoder.lm_head is None
            else self._linear(decoder.lm_head, is_head=True)
        )
        return HybridWeights(
            embedding=embedding,
            layers=layers,
            final_norm=self._norm(decoder.final_norm),
            lm_head=lm_head,
            size_bytes=self._size_bytes + mixers.size_bytes,
        )

    def _attention(self, layer: LayerTensors) -> HeadWeights:
        assert isinstance(layer.attention, HeadTensors)
        return self._heads(layer.attention)

    def _mlp(self, layer: LayerTensors) -> DenseWeights | MixtureWeights:
        if isinstance(layer.mlp, DenseTensors):
            return self._dense(layer.mlp)
        return self._mixture(layer.mlp)
