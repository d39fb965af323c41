"""Builds a model on a device: weights read, merged, packed and dropped one layer at a time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quire.core.errors import DeviceOutOfMemory, Reason, UnsupportedError
from quire.core.interface.attention import AttentionBackend
from quire.core.interface.backend import Device
from quire.core.interface.experts import PackedExperts, QuantizedExperts
from quire.core.interface.ops import PackedLinear
from quire.core.interface.quantization import QuantizedWeight
from quire.core.interface.worker import WorkerConfig
from quire.core.models.decoder import CausalLM, DecoderWeights, make_attention_backends
from quire.core.models.decoder_spec import MixtureSpec
from quire.core.models.description import ModelDescription, describe_config
from quire.core.models.families import Family
from quire.core.models.gated_attention import gates_last
from quire.core.models.latent_attention import LatentWeights
from quire.core.models.latent_prompts import PromptExpansion, expand_prompts
from quire.core.models.layers import LayerWeights
from quire.core.models.mlp import DenseWeights, MixtureWeights
from quire.core.models.model_config import ModelConfig, read_model_config
from quire.core.models.self_attention import HeadWeights
from quire.core.models.weights.checkpoint_files import CheckpointFiles
from quire.core.models.weights.dummy_weights import DummyWeights
from quire.core.models.weights.expert_loading import (
    quantize_experts,
    read_experts,
    size_of_experts,
)
from quire.core.models.weights.gguf_files import GGUF_NAME, GgufFiles
from quire.core.models.weights.quantization import linear_inputs, quantize
from quire.core.models.weights.quantization_spec import (
    QuantizationSpec,
    check_group_size,
    parse_quantization,
)
from quire.core.models.weights.quantized_files import (
    QuantizedFiles,
    move_quantized,
    move_rows,
    read_codes,
    stack_quantized,
)
from quire.core.models.weights.staging import Staging
from quire.core.models.weights.weight_layout import (
    DecoderTensors,
    DenseTensors,
    HeadTensors,
    LatentTensors,
    LayerTensors,
    LinearTensors,
    MixtureTensors,
    TensorShape,
    lay_out,
)

_LOGGER = logging.getLogger(__name__)
_SHOW_PROGRESS_FROM_BYTES = 512 * 2**20


class WeightSource(Protocol):
    """Where tensors come from."""

    def read(self, tensor: TensorShape) -> Tensor:
        """One tensor on the host, in any floating dtype."""
        ...

    def read_into(self, tensor: TensorShape, target: Tensor) -> None:
        """Writes one tensor to `target`, of its shape, on any device and in any floating dtype."""
        ...


def load_model(config: WorkerConfig, device: Device, family: Family | None = None) -> CausalLM:
    """Loads `config.model` onto `device`, as a native model; `family`: one from outside the table.

    The peak of memory is the packed weights and one layer more.
    Raises: CheckpointError, UnsupportedError, DeviceOutOfMemory.
    """
    quantization = parse_quantization(config.quantization, config.options)
    directory = Path(config.model)
    model_config = read_model_config(directory, family)
    description = describe_config(
        model_config,
        dtype=config.dtype,
        cache_dtype=config.cache_dtype,
        block_size=config.block_size,
    )
    assert description.decoder is not None, f"{config.model} has no native decoder"
    backends = _attention_of(description, device, config)
    tensors = lay_out(description.decoder, model_config.family.names)
    if quantization is not None:
        check_group_size(quantization, linear_inputs(tensors))
    source = _open_source(config, model_config, tensors)
    with _memory_errors(description):
        builder = WeightBuilder(source, description, device, quantization)
        builder.heads_at_once = _heads_at_once(backends)
        weights = builder.build(tensors)
        return CausalLM(description, weights, device, backends, max_model_len=config.max_model_len)


def _attention_of(
    description: ModelDescription, device: Device, config: WorkerConfig
) -> list[AttentionBackend]:
    """The attention of each group, prompts over a latent expanded.

    Not where logits must depend on no chunk: the two forms round differently.
    """
    backends = make_attention_backends(description, device)
    latent = None if description.decoder is None else description.decoder.latent
    if latent is None or config.deterministic:
        return backends
    limits = {
        "max_step_tokens": config.max_num_batched_tokens,
        "max_model_len": config.max_model_len,
    }
    return [expand_prompts(backend, latent, device, **limits) for backend in backends]


def _heads_at_once(backends: Sequence[AttentionBackend]) -> int | None:
    found = [backend for backend in backends if isinstance(backend, PromptExpansion)]
    return found[0].heads.spec.num_heads if found else None


def _open_source(
    config: WorkerConfig, model_config: ModelConfig, tensors: DecoderTensors
) -> WeightSource:
    """The files, checked against the config; or random numbers."""
    if config.load_format == "dummy":
        return DummyWeights(config.seed, norm_offset=model_config.decoder.norm_offset)
    names = model_config.family.names
    files = _open_files(Path(config.model), model_config)
    # Some tied checkpoints store the head all the same.
    tied = (f"{names.lm_head}.weight",) if tensors.lm_head is None else ()
    files.check(tensors, may_have=tied)
    return files


def _open_files(directory: Path, model_config: ModelConfig) -> CheckpointFiles:
    rename = model_config.family.names.rename
    if (directory / GGUF_NAME).is_file():
        return GgufFiles(directory / GGUF_NAME, rename)
    if model_config.stored is None:
        return CheckpointFiles(directory, rename)
    return QuantizedFiles(directory, rename, model_config.stored)


class WeightBuilder:
    """Turns tensors of a source into what the layers multiply with."""

    def __init__(
        self,
        source: WeightSource,
        description: ModelDescription,
        device: Device,
        quantization: QuantizationSpec | None = None,
    ) -> None:
        self._source = source
        self._quantization = quantization
        self._description = description
        self._ops = device.ops()
        claimed = device.capabilities.quantizations
        self._kept_formats = claimed if quantization is None else frozenset[str]()
        self._features = device.capabilities.features
        self._has_told = False
        self._device = device.torch_device
        self._dtype: torch.dtype = getattr(torch, description.dtype)
        assert description.decoder is not None
        self._decoder = description.decoder
        self._size_bytes = 0
        self._embedding: Tensor | None = None
        self._staging = Staging()
        self.heads_at_once: int | None = None
        """In groups of so many heads keys and values are made of a latent; None: they are not."""

    def build(self, tensors: DecoderTensors) -> DecoderWeights:
        """All weights; a progress bar on a terminal if the model is large."""
        with self._progress(len(tensors.layers)) as advance:
            embedding = self._embedding = self._stack((tensors.embedding,))
            self._size_bytes += embedding.nbytes
            # First: what stands beside it while it is packed is as large, and gone before the rest.
            lm_head = (
                self._pack(embedding, None, is_head=True)
                if tensors.lm_head is None
                else self._linear(tensors.lm_head, is_head=True)
            )
            self._staging = Staging()
            layers = []
            for layer in tensors.layers:
                layers.append(self._layer(layer))
                advance()
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
            attention=self._heads(layer.attention)
            if isinstance(layer.attention, HeadTensors)
            else self._latent(layer.attention),
            output=self._linear(layer.output),
            attention_output_norm=self._optional_norm(layer.attention_output_norm),
            mlp_norm=self._norm(layer.mlp_norm),
            mlp=self._dense(layer.mlp)
            if isinstance(layer.mlp, DenseTensors)
            else self._mixture(layer.mlp),
            mlp_output_norm=self._optional_norm(layer.mlp_output_norm),
        )

    def _heads(self, tensors: HeadTensors) -> HeadWeights:
        has_gate = self._decoder.has_attention_gate
        return HeadWeights(
            qkv=self._gated(tensors.qkv) if has_gate else self._linear(tensors.qkv),
            q_norm=self._optional_norm(tensors.q_norm),
            k_norm=self._optional_norm(tensors.k_norm),
            sinks=None if tensors.sinks is None else self._float32(tensors.sinks),
        )

    def _gated(self, linear: LinearTensors) -> PackedLinear:
        """Queries, keys and values, and the gates after them."""
        bias = gates_last(self._decoder, self._stack(linear.biases)) if linear.biases else None
        stored = self._stored_codes(linear.weights)
        if stored is not None:
            moved = move_rows(stored, partial(gates_last, self._decoder))
            return self._pack_codes(moved, bias)
        return self._pack(gates_last(self._decoder, self._stack(linear.weights)), bias)

    def _latent(self, tensors: LatentTensors) -> LatentWeights:
        latent = self._decoder.latent
        assert latent is not None
        kv_up = self._stack((tensors.kv_up,)).view(self._decoder.num_heads, -1, latent.kv_rank)
        value_size = latent.value_size
        # Apart, so that each is read in one run.
        key_up = kv_up[:, :-value_size].contiguous()
        value_up = kv_up[:, -value_size:].contiguous()
        self._size_bytes += kv_up.nbytes
        return LatentWeights(
            q_down=None if tensors.q_down is None else self._linear(tensors.q_down),
            q_norm=self._optional_norm(tensors.q_norm),
            q_up=self._linear(tensors.q_up),
            kv_down=self._linear(tensors.kv_down),
            kv_norm=self._norm(tensors.kv_norm),
            key_up=key_up.transpose(1, 2),
            value_up=value_up,
            heads_up=self._heads_up(kv_up),
        )

    def _heads_up(self, kv_up: Tensor) -> tuple[PackedLinear, ...]:
        """kv_up [Hq, plain + value, R] once more, as products that give all of some heads."""
        if self.heads_at_once is None:
            return ()
        groups = [group.flatten(0, 1).clone() for group in torch.split(kv_up, self.heads_at_once)]
        packed = tuple(self._ops.pack_linear(group, None) for group in groups)
        self._size_bytes += sum(
            one.size_bytes or group.nbytes for one, group in zip(packed, groups, strict=True)
        )
        return packed

    def _dense(self, tensors: DenseTensors) -> DenseWeights:
        return DenseWeights(gate_up=self._linear(tensors.gate_up), down=self._linear(tensors.down))

    def _mixture(self, tensors: MixtureTensors) -> MixtureWeights:
        """The router in float32, the experts packed together."""
        mixture = self._decoder.mixture
        assert mixture is not None
        router = [self._float32(tensor) for tensor in tensors.router]
        packed = self._experts(tensors, mixture)
        correction = tensors.correction_bias
        gate = tensors.shared_gate
        return MixtureWeights(
            router=self._ops.pack_router(router[0], router[1] if len(router) > 1 else None),
            correction_bias=None if correction is None else self._float32(correction),
            experts=packed,
            shared=None if tensors.shared is None else self._dense(tensors.shared),
            shared_gate=None if gate is None else self._linear(gate),
        )

    def _experts(self, tensors: MixtureTensors, mixture: MixtureSpec) -> PackedExperts:
        """In codes, as they are stored or as was asked for, where the device multiplies by them."""
        takes_codes = "quantized_experts" in self._features
        codes = self._stored_experts(tensors, mixture) if takes_codes else None
        experts = None
        if codes is None:
            experts = read_experts(
                tensors, mixture, self._source, dtype=self._dtype, device=str(self._device)
            )
            if self._quantization is not None and takes_codes:
                codes = quantize_experts(experts, self._quantization, self._ops)
        if codes is not None:
            packed = self._ops.pack_quantized_experts(codes, self._description.dtype)
        else:
            assert experts is not None
            packed = self._ops.pack_experts(experts)
            self._tell_of_wide_experts()
        self._size_bytes += packed.size_bytes or (
            0 if experts is None else size_of_experts(experts)
        )
        return packed

    def _stored_experts(
        self, tensors: MixtureTensors, mixture: MixtureSpec
    ) -> QuantizedExperts | None:
        """The experts as a quantized checkpoint has them; None: not each for itself in codes."""
        if tensors.is_merged or tensors.is_interleaved or tensors.gate_up_bias is not None:
            return None
        sides: list[list[QuantizedWeight]] = []
        for parts, per_expert in ((tensors.gate_up, 2), (tensors.down, 1)):
            side = []
            for first in range(0, len(parts), per_expert):
                codes = self._stored_codes(parts[first : first + per_expert])
                if codes is None:
                    return None
                side.append(codes)
            sides.append(side)
        return QuantizedExperts(
            gate_up=sides[0],
            down=sides[1],
            activation=mixture.activation,
            alpha=mixture.alpha,
            limit=mixture.limit,
        )

    def _tell_of_wide_experts(self) -> None:
        if self._quantization is None or self._has_told:
            return
        self._has_told = True
        _LOGGER.warning(
            "experts stay in %s: the device does not multiply by those in %s; all other layers are "
            "quantized",
            self._description.dtype,
            self._quantization.scheme,
        )

    def _float32(self, tensor: TensorShape) -> Tensor:
        """What is kept in full precision whatever the model's dtype."""
        weight = self._source.read(tensor).to(self._device, torch.float32)
        self._size_bytes += weight.nbytes
        return weight

    def _optional_norm(self, tensor: TensorShape | None) -> Tensor | None:
        return None if tensor is None else self._norm(tensor)

    def _norm(self, tensor: TensorShape) -> Tensor:
        """The weight with the family's offset folded in; the sum is rounded once."""
        weight = self._source.read(tensor).float() + self._decoder.norm_offset
        weight = weight.to(self._device, self._dtype)
        self._size_bytes += weight.nbytes
        return weight

    def _linear(self, linear: LinearTensors, *, is_head: bool = False) -> PackedLinear:
        bias = self._stack(linear.biases) if linear.biases else None
        stored = self._stored_codes(linear.weights)
        if stored is not None:
            return self._pack_codes(stored, bias)
        return self._pack(self._stack(linear.weights), bias, is_head=is_head)

    def _pack_codes(self, codes: QuantizedWeight, bias: Tensor | None) -> PackedLinear:
        packed = self._ops.pack_quantized_linear(codes, bias, self._description.dtype)
        self._size_bytes += packed.size_bytes
        return packed

    def _stored_codes(self, parts: tuple[TensorShape, ...]) -> QuantizedWeight | None:
        """A layer as a quantized checkpoint has it, if the device multiplies by such codes."""
        codes = read_codes(self._source, parts, self._kept_formats)
        stacked = None if codes is None else stack_quantized(codes)
        return None if stacked is None else move_quantized(stacked, str(self._device))

    def _pack(self, weight: Tensor, bias: Tensor | None, *, is_head: bool = False) -> PackedLinear:
        if self._quantization is None:
            packed = self._ops.pack_linear(weight, bias)
        else:
            quantized = quantize(weight, self._quantization, is_head=is_head, ops=self._ops)
            packed = self._ops.pack_quantized_linear(quantized, bias, self._description.dtype)
        # 0: it keeps what it was given, which counts here unless it is the embedding.
        given = 0 if weight is self._embedding else weight.nbytes
        given += 0 if bias is None else bias.nbytes
        self._size_bytes += packed.size_bytes or given
        return packed

    def _stack(self, parts: tuple[TensorShape, ...]) -> Tensor:
        """The parts below one another, in the model's dtype, each read straight into its rows."""
        num_rows = sum(part.shape[0] for part in parts)
        shape = (num_rows, *parts[0].shape[1:])
        stacked = self._staging.take(shape, self._dtype, self._device)
        row = 0
        for part in parts:
            self._source.read_into(part, stacked[row : row + part.shape[0]])
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
