"""Builds a model on a device: weights read, merged, packed and dropped one layer at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quire.core.errors import DeviceOutOfMemory, Reason, UnsupportedError
from quire.core.interface.backend import Device
from quire.core.interface.ops import PackedLinear
from quire.core.interface.worker import WorkerConfig
from quire.core.models.checkpoint_files import CheckpointFiles
from quire.core.models.decoder import CausalLM, DecoderWeights, make_attention_backends
from quire.core.models.description import ModelDescription, describe_config
from quire.core.models.dummy_weights import DummyWeights
from quire.core.models.families import Family
from quire.core.models.layers import LayerWeights
from quire.core.models.model_config import ModelConfig, read_model_config
from quire.core.models.weight_layout import (
    DecoderTensors,
    LayerTensors,
    LinearTensors,
    TensorShape,
    lay_out,
)

_SHOW_PROGRESS_FROM_BYTES = 512 * 2**20


class WeightSource(Protocol):
    """Where tensors come from."""

    def read(self, tensor: TensorShape) -> Tensor:
        """One tensor on the host, in any floating dtype."""
        ...


def load_model(config: WorkerConfig, device: Device, family: Family | None = None) -> CausalLM:
    """Loads `config.model` onto `device`, as a native model; `family`: one from outside the table.

    The peak of memory is the packed weights and one layer more.
    Raises: CheckpointError, UnsupportedError, DeviceOutOfMemory.
    """
    refuse_quantization(config)
    directory = Path(config.model)
    model_config = read_model_config(directory, family)
    description = describe_config(
        model_config,
        dtype=config.dtype,
        cache_dtype=config.cache_dtype,
        block_size=config.block_size,
    )
    backends = make_attention_backends(description, device)
    tensors = lay_out(description.decoder, model_config.family.names)
    source = _open_source(config, model_config, tensors)
    with _memory_errors(description):
        weights = _WeightBuilder(source, description, device).build(tensors)
        return CausalLM(description, weights, device, backends, max_model_len=config.max_model_len)


def _open_source(
    config: WorkerConfig, model_config: ModelConfig, tensors: DecoderTensors
) -> WeightSource:
    """The files, checked against the config; or random numbers."""
    if config.load_format == "dummy":
        return DummyWeights(config.seed, norm_offset=model_config.decoder.norm_offset)
    names = model_config.family.names
    files = CheckpointFiles(Path(config.model), names.rename)
    # Some tied checkpoints store the head all the same.
    tied = (f"{names.lm_head}.weight",) if tensors.lm_head is None else ()
    files.check(tensors, may_have=tied)
    return files


class _WeightBuilder:
    """Turns tensors of a source into what the layers multiply with."""

    def __init__(self, source: WeightSource, description: ModelDescription, device: Device) -> None:
        self._source = source
        self._description = description
        self._ops = device.ops()
        self._device = device.torch_device
        self._dtype: torch.dtype = getattr(torch, description.dtype)
        self._size_bytes = 0
        self._embedding: Tensor | None = None

    def build(self, tensors: DecoderTensors) -> DecoderWeights:
        """All weights; a progress bar on a terminal if the model is large."""
        with self._progress(len(tensors.layers)) as advance:
            embedding = self._embedding = self._stack((tensors.embedding,))
            self._size_bytes += embedding.nbytes
            layers = []
            for layer in tensors.layers:
                layers.append(self._layer(layer))
                advance()
            lm_head = (
                self._pack(embedding, None)
                if tensors.lm_head is None
                else self._linear(tensors.lm_head)
            )
            final_norm = self._norm(tensors.final_norm)
        return DecoderWeights(
            embedding=embedding,
            layers=layers,
            final_norm=final_norm,
            lm_head=lm_head,
            size_bytes=self._size_bytes,
        )

    def _layer(self, layer: LayerTensors) -> LayerWeights:
        return LayerWeights(
            input_norm=self._norm(layer.input_norm),
            qkv=self._linear(layer.qkv),
            q_norm=self._optional_norm(layer.q_norm),
            k_norm=self._optional_norm(layer.k_norm),
            output=self._linear(layer.output),
            attention_output_norm=self._optional_norm(layer.attention_output_norm),
            mlp_norm=self._norm(layer.mlp_norm),
            gate_up=self._linear(layer.gate_up),
            down=self._linear(layer.down),
            mlp_output_norm=self._optional_norm(layer.mlp_output_norm),
        )

    def _optional_norm(self, tensor: TensorShape | None) -> Tensor | None:
        return None if tensor is None else self._norm(tensor)

    def _norm(self, tensor: TensorShape) -> Tensor:
        """The weight with the family's offset folded in; the sum is rounded once."""
        weight = self._source.read(tensor).float() + self._description.decoder.norm_offset
        weight = weight.to(self._device, self._dtype)
        self._size_bytes += weight.nbytes
        return weight

    def _linear(self, linear: LinearTensors) -> PackedLinear:
        bias = self._stack(linear.biases) if linear.biases else None
        return self._pack(self._stack(linear.weights), bias)

    def _pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        packed = self._ops.pack_linear(weight, bias)
        # 0: it keeps what it was given, which counts here unless it is the embedding.
        given = 0 if weight is self._embedding else weight.nbytes
        given += 0 if bias is None else bias.nbytes
        self._size_bytes += packed.size_bytes or given
        return packed

    def _stack(self, parts: tuple[TensorShape, ...]) -> Tensor:
        """The parts below one another, in the model's dtype, each read straight into its rows."""
        num_rows = sum(part.shape[0] for part in parts)
        shape = (num_rows, *parts[0].shape[1:])
        stacked = torch.empty(shape, dtype=self._dtype, device=self._device)
        row = 0
        for part in parts:
            stacked[row : row + part.shape[0]].copy_(self._source.read(part))
            row += part.shape[0]
        return stacked

    def _progress(self, num_layers: int) -> AbstractContextManager[_Advance]:
        if sys.stderr.isatty() and self._description.weight_bytes() >= _SHOW_PROGRESS_FROM_BYTES:
            return _progress_bar(self._description.architecture, num_layers)
        return nullcontext(lambda: None)


class _Advance(Protocol):
    def __call__(self) -> None: ...


@contextmanager
def _progress_bar(name: str, num_layers: int) -> Iterator[_Advance]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"Loading {name}", total=num_layers)
        yield lambda: progress.advance(task)


@contextmanager
def _memory_errors(description: ModelDescription) -> Iterator[None]:
    """torch's refusals to allocate, as ours."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(description, error) from error
    except RuntimeError as error:
        # The host's allocator has no type of its own.
        if "can't allocate memory" not in str(error):
            raise
        raise _out_of_memory(description, error) from error


def _out_of_memory(description: ModelDescription, error: BaseException) -> DeviceOutOfMemory:
    size = description.weight_bytes()
    return DeviceOutOfMemory(
        f"the weights of {description.architecture} take {size / 2**30:.2f} GiB in "
        f"{description.dtype}, which the device refused ({error}); use a smaller dtype or model, "
        "or a device with more memory",
        requested_bytes=size,
        tag="weights",
    )


def refuse_quantization(config: WorkerConfig) -> None:
    """Raises UnsupportedError if the config asks for quantized weights."""
    if config.quantization is None:
        return
    reason = Reason(
        code="model.quantization",
        need=f"quantization {config.quantization}",
        have="weights in float32, float16 and bfloat16",
        remedy="leave --quantization out",
    )
    raise UnsupportedError([reason], what=f"loading {config.model}")
