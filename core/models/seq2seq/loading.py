"""Loads an encoder-decoder onto a device, and holds it against transformers' own run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.core.errors import CheckpointError, DeviceOutOfMemory, Reason, UnsupportedError
from quire.core.models.loading import refuse_quantization
from quire.core.models.model_config import read_json
from quire.core.models.seq2seq.cross_pages import CrossPages
from quire.core.models.seq2seq.describing import (
    class_of,
    describe_form,
    find_form,
    groups_of,
    perceive,
)
from quire.core.models.seq2seq.flat_run import flat_run
from quire.core.models.seq2seq.self_check import deviation_of
from quire.core.models.seq2seq.seq2seq_model import Seq2SeqModel
from quire.core.models.seq2seq.source_model import AUDIO, TOKENS, SourceModel
from quire.core.models.seq2seq.timestamps import timestamp_rules
from quire.core.models.transformers_adapter.checkpoint import (
    load_weights,
    make_dummy_model,
    read_config,
)
from quire.core.models.transformers_adapter.pages import OwnPages
from quire.core.models.transformers_adapter.self_check import tolerance

if TYPE_CHECKING:
    from quire.core.interface.backend import Device
    from quire.core.interface.worker import WorkerConfig


def is_seq2seq(directory: Path, *, trust_remote_code: bool = False) -> bool:
    """Whether a checkpoint is of an encoder-decoder that transformers knows."""
    raw = read_json(directory / "config.json")
    if not raw.get("is_encoder_decoder", True):
        return False
    try:
        config = read_config(directory, trust_remote_code=trust_remote_code)
    except (CheckpointError, UnsupportedError):
        return False  # whoever loads it says what is wrong
    return class_of(config) is not None


def load_seq2seq(config: WorkerConfig, device: Device) -> Seq2SeqModel:
    """Loads `config.model` onto `device`.

    Raises: CheckpointError, DeviceOutOfMemory; UnsupportedError if it would give other logits than
    transformers' own run.
    """
    refuse_quantization(config)
    directory = Path(config.model)
    hf_config = read_config(directory, trust_remote_code=config.trust_remote_code)
    source_model = SourceModel(_load(config, directory, hf_config, device))
    perceive(source_model, hf_config, directory)
    form = find_form(source_model, hf_config)
    groups = groups_of(
        form,
        hf_config,
        config.max_model_len,
        dtype=config.dtype,
        cache_dtype=config.cache_dtype,
        block_size=config.block_size,
    )
    described = describe_form(source_model, form, groups, hf_config, directory, dtype=config.dtype)
    backends = [
        (OwnPages if group.max_tokens is None else CrossPages)(group, device.torch_device)
        for group in groups
    ]
    model = Seq2SeqModel(
        source_model,
        replace(described, cache_dtype=config.cache_dtype),
        backends,
        max_model_len=config.max_model_len,
        max_encoded_tokens=max(config.max_num_batched_tokens, groups[1].max_tokens or 0),
        logits_processors=timestamp_rules(directory) if source_model.input_kind == AUDIO else {},
    )
    source_model.flat = flat_run(source_model.model, reads_text=source_model.input_kind == TOKENS)
    if source_model.flat is not None and _deviates(deviation_of(model, hf_config), model):
        source_model.flat = None
    _check(model, hf_config)
    return model


def _load(config: WorkerConfig, directory: Path, hf_config: Any, device: Device) -> Any:
    model_class = class_of(hf_config)
    if config.load_format == "dummy":
        model = make_dummy_model(model_class, hf_config, dtype=config.dtype, seed=config.seed)
    else:
        model = load_weights(
            directory, model_class, hf_config, dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
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


def _deviates(found: float | str, model: Seq2SeqModel) -> bool:
    return isinstance(found, str) or found > tolerance(model.description.dtype)


def _check(model: Seq2SeqModel, hf_config: Any) -> None:
    """Falls back to a token at a time where chunks give other logits than the model's own run.

    Raises: UnsupportedError if that gives others too.
    """
    found = deviation_of(model, hf_config)
    if not _deviates(found, model):
        return
    if model.source_model.flat is None:
        model.source_model.goes_singly = True
        if not _deviates(deviation_of(model, hf_config), model):
            return
    have = found if isinstance(found, str) else f"logits off by {found:.2g} of their spread"
    reason = Reason(
        code="model.seq2seq",
        need="the logits of the model's own run",
        have=have,
        remedy="report the architecture",
    )
    raise UnsupportedError([reason], what=f"running {model.description.architecture}")
