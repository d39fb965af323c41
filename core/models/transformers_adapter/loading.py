"""Loads a transformers model onto a device, in the best way that is right."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.core.errors import DeviceOutOfMemory, QuireError, Reason, UnsupportedError
from quire.core.models.loading import refuse_quantization
from quire.core.models.transformers_adapter.adapted_model import AdaptedModel
from quire.core.models.transformers_adapter.cached import CachedModel
from quire.core.models.transformers_adapter.checkpoint import (
    load_weights,
    make_dummy_model,
    model_class_of,
    read_config,
)
from quire.core.models.transformers_adapter.describing import Way, describe_way, find_ways
from quire.core.models.transformers_adapter.paged import PagedModel
from quire.core.models.transformers_adapter.pages import OwnPages
from quire.core.models.transformers_adapter.probing import Probe
from quire.core.models.transformers_adapter.recomputed import RecomputedModel
from quire.core.models.transformers_adapter.ropes import fix_frequencies
from quire.core.models.transformers_adapter.routing import Watch, route_layers
from quire.core.models.transformers_adapter.selection import choosing_few
from quire.core.models.transformers_adapter.self_check import OwnRun, deviation, run_own, tolerance
from quire.core.models.transformers_adapter.text_model import TextModel

if TYPE_CHECKING:
    from quire.core.interface.attention import AttentionBackend
    from quire.core.interface.backend import Device
    from quire.core.interface.worker import WorkerConfig
    from quire.core.models.description import ModelDescription
    from quire.core.models.language_model import LanguageModel


def load_adapted(config: WorkerConfig, device: Device) -> LanguageModel:
    """Loads `config.model` onto `device`, and holds it against transformers' own run.

    Raises: CheckpointError, DeviceOutOfMemory; UnsupportedError with what was found in each way if
    none is right.
    """
    refuse_quantization(config)
    directory = Path(config.model)
    hf_config = read_config(directory, trust_remote_code=config.trust_remote_code)
    text_model = TextModel(_load(config, directory, hf_config, device))
    _refuse_more_than_text(text_model, directory)
    _refuse_changed_inputs(text_model, directory)
    text_model.part()
    fix_frequencies(text_model.model, config.max_model_len)
    ways, found = find_ways(
        text_model,
        dtype=config.dtype,
        cache_dtype=config.cache_dtype,
        block_size=config.block_size,
    )
    with choosing_few(text_model.model):
        return _first_right_way(text_model, ways, found, hf_config, config, device)


def _first_right_way(
    text_model: TextModel,
    ways: list[Way],
    found: Probe,
    hf_config: Any,
    config: WorkerConfig,
    device: Device,
) -> LanguageModel:
    """Layers handed to the device, and the first way whose logits are the model's own.

    Raises: UnsupportedError with why each way was left.
    """
    directory = Path(config.model)
    rejected: list[Reason] = []
    watch = Watch(text_model.model)
    with watch.watching():
        own = _own_run(text_model, found.logits_size or int(text_model.config.vocab_size))
    # The self-check of every way sees what the device computes in place of the model's layers.
    routed = route_layers(text_model, device.ops(), watch.free())
    for way in ways:
        description = describe_way(text_model, way, found, hf_config, directory, dtype=config.dtype)
        description = replace(description, cache_dtype=config.cache_dtype)
        model = _first_right(_made(way, text_model, description, config, device), own, rejected)
        if model is not None:
            told = (reason.have for reason in rejected)
            notes = (*model.description.notes, *(f"left aside: {what}" for what in told))
            model.description = replace(model.description, notes=notes)
            model.routed_providers = routed.providers()
            return model
    raise UnsupportedError(rejected, what=f"running {type(text_model.model).__name__}")


def _refuse_more_than_text(text_model: TextModel, directory: Path) -> None:
    """Raises UnsupportedError if the model runs no text alone."""
    tokens = torch.arange(3, 10, device=text_model.device)
    try:
        with torch.no_grad():
            text_model.run(tokens, torch.arange(7, device=text_model.device))
    except torch.OutOfMemoryError:
        raise
    # The model's own code, which may want anything.
    except Exception as error:
        reason = Reason(
            code="model.inputs",
            need=f"more than a text ({type(error).__name__}: {error})"[:400],
            have="text, in which images may stand",
            remedy="use a model that answers texts",
        )
        raise UnsupportedError(
            [reason], what=f"a text with the checkpoint in {directory}"
        ) from None


def _refuse_changed_inputs(text_model: TextModel, directory: Path) -> None:
    """Raises UnsupportedError if the model's generation adds tokens that nobody wrote."""
    ids = torch.arange(3, 8, device=text_model.device).unsqueeze(0)
    try:
        prepared = text_model.model.prepare_inputs_for_generation(
            ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
    # It may want what `generate` alone hands to it; then it changes nothing for us.
    except Exception:
        return
    given = prepared.get("input_ids")
    if given is not None and given.shape != ids.shape:
        reason = Reason(
            code="model.generation",
            need=f"{given.shape[1]} tokens for a text of {ids.shape[1]}, some of them the model's",
            have="the text's own tokens",
            remedy="use a model that predicts the next token of a text",
        )
        raise UnsupportedError([reason], what=f"generation with the checkpoint in {directory}")
    if prepared.get("position_ids") is None:
        _refuse_other_positions(text_model, ids[0], directory)


def _refuse_other_positions(text_model: TextModel, ids: torch.Tensor, directory: Path) -> None:
    """Raises UnsupportedError if positions from 0 give other logits than `generate` has."""
    own = text_model.run(ids, torch.arange(len(ids), device=ids.device)).hidden[-1].float()
    try:
        generated = text_model.model.generate(
            ids.unsqueeze(0), attention_mask=torch.ones_like(ids).unsqueeze(0), max_new_tokens=1,
            do_sample=False, output_logits=True, return_dict_in_generate=True,
        ).logits[0][0].float()  # fmt: skip
    # It may want what a request with images alone has.
    except Exception:
        return
    if own.shape == generated.shape and (own - generated).abs().max() > 0.2 * generated.std():
        reason = Reason(
            code="model.positions",
            need="positions that the model counts by itself",
            have="positions from 0, which give other logits than its own generation",
            remedy="use a model that takes its positions",
        )
        raise UnsupportedError([reason], what=f"generation with the checkpoint in {directory}")


def _load(config: WorkerConfig, directory: Path, hf_config: Any, device: Device) -> Any:
    trust = config.trust_remote_code
    model_class = model_class_of(hf_config, directory, trust_remote_code=trust)
    if config.load_format == "dummy":
        model = make_dummy_model(model_class, hf_config, dtype=config.dtype, seed=config.seed)
    else:
        model = load_weights(
            directory, model_class, hf_config, dtype=config.dtype, trust_remote_code=trust
        )
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


def _own_run(text_model: TextModel, vocab_size: int) -> OwnRun | Exception:
    try:
        return run_own(text_model, vocab_size)
    # The model's own code; without a run of its own nothing can be held against it.
    except Exception as error:
        return error


def _made(
    way: Way,
    text_model: TextModel,
    description: ModelDescription,
    config: WorkerConfig,
    device: Device,
) -> Iterator[tuple[str, AdaptedModel | Exception]]:
    """The models of a way, best first, with their names."""
    settings: dict[str, Any] = {"max_model_len": config.max_model_len}
    try:
        backends = _backends(way, device)
    except UnsupportedError as error:
        yield way.name, error
        return
    arguments: tuple[Any, ...] = (text_model, description, backends)
    if way.name == "paged":
        yield way.name, PagedModel(*arguments, **settings)
    elif way.name == "cached":
        for runs_chunks in (True, False):
            name = "cached" if runs_chunks else "cached, a token at a time"
            assert way.form is not None, way
            model = CachedModel(
                text_model, description, backends, way.form, **settings,
                runs_later_chunks=runs_chunks,
            )  # fmt: skip
            yield name, model
    else:
        yield way.name, RecomputedModel(*arguments, **settings)


def _backends(way: Way, device: Device) -> list[AttentionBackend]:
    """Raises UnsupportedError with the reasons of all groups."""
    backends: list[AttentionBackend] = []
    reasons: list[Reason] = []
    for group in way.groups:
        if group.is_own:
            backends.append(OwnPages(group, device.torch_device))
            continue
        try:
            backends.append(device.attention(group.spec))
        except UnsupportedError as error:
            reasons.extend(error.reasons)
    if reasons:
        raise UnsupportedError(reasons, what="attention")
    return backends


def _first_right(
    made: Iterator[tuple[str, AdaptedModel | Exception]],
    own: OwnRun | Exception,
    rejected: list[Reason],
) -> AdaptedModel | None:
    """The first model that gives the logits of its own run; why not goes to `rejected`."""
    for name, model in made:
        found = _objection(model, own)
        if found is None and isinstance(model, AdaptedModel):
            return model
        rejected.append(
            Reason(
                code=f"model.{name.split(',')[0]}",
                need="the logits of the model's own run",
                have=f"{name}: {found}",
                remedy="report the architecture, or use a native family",
            )
        )
        if isinstance(model, PagedModel):
            model.release()
    return None


def _objection(model: AdaptedModel | Exception, own: OwnRun | Exception) -> str | None:
    """Why a model must not be used; None: it is right."""
    if isinstance(model, UnsupportedError):
        return "; ".join(reason.need for reason in model.reasons)
    if isinstance(model, Exception) or isinstance(own, Exception):
        return f"transformers itself cannot run it: {own}"
    try:
        found = deviation(model, own)
    except QuireError as error:
        return str(error)
    # The model's own code, in a way that its authors may not have thought of.
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    if found <= tolerance(model.description.dtype):
        return None
    return f"its logits are off by {found:.2g} of their spread"
