"""Loads a model that makes numbers of texts, and holds it against its own run of each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.core.errors import DeviceOutOfMemory, Reason, UnsupportedError
from quire.core.models.loading import refuse_quantization
from quire.core.models.pooling.batch import TextBatch
from quire.core.models.pooling.describing import (
    describe_model_class,
    layout_of,
    model_class_of,
    pooler_arguments,
    without_pooler,
)
from quire.core.models.pooling.heads import VectorHead
from quire.core.models.pooling.model import BY_LENGTH, FLAT, PoolingModel
from quire.core.models.transformers_adapter.checkpoint import (
    load_weights,
    make_dummy_model,
    read_config,
)
from quire.core.models.transformers_adapter.self_check import relative_difference, tolerance

if TYPE_CHECKING:
    from quire.core.interface.backend import Device
    from quire.core.interface.worker import WorkerConfig

_SHORT = 7
_MOST = 700
"""Tokens of the longest text with which a model is checked."""


def load_pooling(config: WorkerConfig, device: Device) -> PoolingModel:
    """Loads `config.model` onto `device`.

    Raises: CheckpointError, DeviceOutOfMemory; UnsupportedError for a model that transformers
    itself cannot run.
    """
    refuse_quantization(config)
    directory = Path(config.model)
    hf_config = read_config(directory, trust_remote_code=config.trust_remote_code)
    model = _load(config, directory, hf_config, device)
    layout = layout_of(model, hf_config, directory)
    description = describe_model_class(model, hf_config, layout)
    description = replace(description, dtype=config.dtype, cache_dtype=config.cache_dtype)
    makes_vectors = bool(description.pooling and description.pooling.vector_size)
    dtype = getattr(torch, config.dtype)
    vectors = VectorHead(layout, device=device.torch_device, dtype=dtype) if makes_vectors else None
    pooling = PoolingModel(model, description, vectors, max_model_len=config.max_model_len)
    with torch.inference_mode():
        _choose_way(pooling, config)
    return pooling


def _load(config: WorkerConfig, directory: Path, hf_config: Any, device: Device) -> Any:
    model_class = model_class_of(hf_config, directory, config.task)
    trust = config.trust_remote_code
    if config.load_format == "dummy":
        model = make_dummy_model(
            without_pooler(model_class), hf_config, dtype=config.dtype, seed=config.seed
        )
    else:
        model = load_weights(
            directory, model_class, hf_config, dtype=config.dtype, trust_remote_code=trust,
            **pooler_arguments(model_class),
        )  # fmt: skip
    try:
        return model.to(device.torch_device)
    except torch.OutOfMemoryError as error:
        size = sum(p.nbytes for p in model.parameters())
        raise DeviceOutOfMemory(
            f"the weights take {size / 2**30:.2f} GiB, which the device refused ({error}); use a "
            "smaller dtype or model, or a device with more memory",
            requested_bytes=size,
            tag="weights",
        ) from error


def _choose_way(pooling: PoolingModel, config: WorkerConfig) -> None:
    """The flat way if it gives what the model gives of each text alone.

    Raises: UnsupportedError if the model's own code gives nothing.
    """
    batch = _check_batch(pooling)
    try:
        own = pooling.raw(batch)
    # The model's own code may fail in any way on a text alone.
    except Exception as error:
        reason = Reason(
            code="model.pooling", need="numbers of a text of plain tokens",
            have=f"transformers itself: {type(error).__name__}: {error}",
            remedy="use a model of texts alone",
        )  # fmt: skip
        raise UnsupportedError(
            [reason], what=f"running {pooling.description.architecture}"
        ) from error
    first = TextBatch(token_ids=batch.rows(batch.token_ids, 0), lengths=batch.lengths[:1])
    limit = tolerance(config.dtype)
    try:
        pooling.flat.learn_positions(lambda: pooling.raw(first), batch.lengths[0])
        pooling.way = FLAT
        for reads in _reads(pooling):
            pooling.head_reads = reads
            if _deviation(pooling, batch, own) <= limit:
                return
    # Some model's code takes no flat batch: then it runs as its authors wrote it.
    except Exception:  # noqa: S110
        pass
    pooling.way = BY_LENGTH


def _reads(pooling: PoolingModel) -> tuple[str, ...]:
    description = pooling.description.pooling
    assert description is not None, pooling.description
    if description.vector_size:
        return ("all",)
    return ("each",) if "token_classify" in description.tasks else ("first", "last", "all")


def _check_batch(pooling: PoolingModel) -> TextBatch:
    """Texts of different lengths: longer than a window, and together than any position."""
    limit = pooling.max_model_len
    config = pooling.model.config
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    longest = min(limit, _MOST, 13 + (window if isinstance(window, int) else 0))
    lengths = [min(limit, _SHORT), longest]
    while sum(lengths) <= min(limit, _MOST):
        lengths.append(longest)
    generator = torch.Generator().manual_seed(11)
    high = max(6, pooling.description.vocab_size)
    ids = torch.randint(5, high, (sum(lengths),), generator=generator)
    device = next(pooling.model.parameters()).device
    return TextBatch(token_ids=ids.to(device), lengths=tuple(lengths))


def _deviation(pooling: PoolingModel, batch: TextBatch, own: list[Tensor]) -> float:
    """The largest difference of a text's numbers, relative to their spread."""
    found = pooling.raw(batch)
    return max(_difference(one, two) for one, two in zip(found, own, strict=True))


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    if want.shape[-1] > 1:
        return relative_difference(got.float(), want.float())
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-9))
