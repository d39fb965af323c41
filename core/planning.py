"""What would run where, before any weight is loaded: needs held against claims.

`make_plan` answers with a Plan, or with every Reason why there is none. The engine starts from the
same Plan that `quire plan` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire.core.config import ConfigChange, EngineConfig, resolve
from quire.core.discovery import ChosenDevice, choose_device, list_backends
from quire.core.errors import ConfigError, Reason, UnsupportedError
from quire.core.interface.op_specs import OP_SPECS
from quire.core.interface.worker import WorkerConfig
from quire.core.models.description import size_of_dtype
from quire.core.models.registry import TRANSFORMERS, describe
from quire.core.models.weights.quantization_spec import group_reasons
from quire.core.models.weights.source import resolve_model_directory
from quire.core.option_names import unread_options

if TYPE_CHECKING:
    from quire.core.interface.attention import AttentionSpec
    from quire.core.interface.backend import Device
    from quire.core.interface.capabilities import Capabilities
    from quire.core.models.description import AttentionGroup, ModelDescription

_ACTIVATION_COPIES = 12
"""Tensors of [tokens, hidden] that a step holds at once, the wide ones of the MLP counted in; an
estimate.
"""
_BITS = {"int8": 8.0, "int4": 4.5, "fp8": 8.0}
"""Of a weight that is quantized at load, scales and zeros counted in."""
_LOGIT_COPIES = 3
"""Tensors of [requests, vocabulary] float32 that sampling holds at once; an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """One cache group."""

    group: str
    kind: str
    num_layers: int
    layout: str
    """How one layer keeps keys and values."""
    attention: str
    """Who serves it."""
    bytes_per_token: int
    """Of all the group's layers together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One use of the device's memory."""

    tag: str
    size_bytes: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is decided before weights load."""

    model: str
    directory: Path
    architecture: str
    implementation: str
    """Who runs the model: `native`, `transformers`, or the package that brings it."""
    num_parameters: int
    device: ChosenDevice
    config: EngineConfig
    """Resolved: nothing is left to choose."""
    changes: tuple[ConfigChange, ...]
    worker_config: WorkerConfig
    kernels: dict[str, str]
    """Operator to who serves it."""
    cache: tuple[CacheRow, ...]
    memory: tuple[MemoryRow, ...]
    notes: tuple[str, ...]
    """Slower paths that were taken, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEngine:
    """A plan and the device that was opened for it."""

    plan: Plan
    device: Device
    description: ModelDescription


def plan_engine(user: EngineConfig) -> PlannedEngine:
    """Chooses and opens the device, reads the model's description and plans. Loads no weights.

    Raises: ConfigError, PluginError, CheckpointError; UnsupportedError with every reason.
    """
    chosen = choose_device(user.device)
    directory = resolve_model_directory(user.model, user.revision)
    device = chosen.backend.open(chosen.index)
    try:
        plan, description = make_plan(user, directory, chosen, device)
    except BaseException:
        device.close()
        raise
    return PlannedEngine(plan=plan, device=device, description=description)


def make_plan(
    user: EngineConfig, directory: Path, chosen: ChosenDevice, device: Device
) -> tuple[Plan, ModelDescription]:
    """Holds what the model and the configuration need against what `device` claims.

    Raises: UnsupportedError with every reason; ConfigError; CheckpointError.
    """
    as_saved = describe(
        directory,
        model_impl=user.model_impl,
        trust_remote_code=user.trust_remote_code,
        task=user.task,
    )
    resolved = resolve(user, device.capabilities, as_saved)
    config = resolved.config
    worker_config = make_worker_config(config, directory)
    what = f"{user.model} on {chosen.name}"
    settings = _setting_reasons(config, worker_config, device.capabilities)
    groups = group_reasons(config.quantization, config.options)
    _refuse([*_unread_options(config, chosen, device), *settings, *groups], what)
    description = as_saved.laid_out(
        dtype=config.dtype,
        cache_dtype=config.cache_dtype,
        block_size=worker_config.block_size,
    )
    memory = _memory(description, config, worker_config, device)
    reasons = _model_reasons(description, memory, worker_config, device)
    _refuse([*reasons, *_speculation_reasons(config, description, device.capabilities)], what)
    cache = _cache_rows(description, device)
    kernels = _kernels(device, cache)
    plan = Plan(
        model=user.model,
        directory=directory,
        architecture=description.architecture,
        implementation=description.implementation,
        num_parameters=description.num_parameters,
        device=chosen,
        config=config,
        changes=resolved.changes,
        worker_config=worker_config,
        kernels=kernels,
        cache=cache,
        memory=memory,
        notes=(*description.notes, *_notes(chosen, kernels)),
    )
    return plan, description


def _refuse(reasons: Iterable[Reason], what: str) -> None:
    """Raises UnsupportedError if there is a reason."""
    found = list(reasons)
    if found:
        raise UnsupportedError(found, what=what)


def make_worker_config(config: EngineConfig, directory: Path) -> WorkerConfig:
    """What the worker is built with. `config` is resolved."""
    if config.max_model_len is None or config.block_size is None:
        raise ConfigError("the configuration must be resolved before a worker is built from it")
    return WorkerConfig(
        model=str(directory),
        dtype=config.dtype,
        cache_dtype=config.cache_dtype,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        device_memory_fraction=config.device_memory_fraction,
        cache_memory_bytes=config.cache_memory_bytes,
        load_format=config.load_format,
        model_impl=config.model_impl,
        task=config.task,
        trust_remote_code=config.trust_remote_code,
        quantization=config.quantization,
        deterministic=config.deterministic,
        seed=config.seed,
        logits_processors=dict(config.logits_processors),
        options=dict(config.options),
        num_threads=config.num_threads,
    )


def _unread_options(config: EngineConfig, chosen: ChosenDevice, device: Device) -> Iterable[Reason]:
    """What nobody would read; a device that no backend has brought may read anything."""
    if chosen.backend is None:
        return ()
    return unread_options(
        config.options,
        device=chosen.backend.name,
        of_device=device.option_names,
        backends=[entry.name for entry in list_backends()],
    )


def _setting_reasons(
    config: EngineConfig, worker_config: WorkerConfig, capabilities: Capabilities
) -> Iterator[Reason]:
    asked: list[tuple[str, object, Sequence[object]]] = [
        ("dtype", config.dtype, capabilities.dtypes),
        ("cache_dtype", config.cache_dtype, capabilities.cache_dtypes),
        ("block_size", worker_config.block_size, capabilities.block_sizes),
    ]
    if config.quantization is not None:
        asked.append(("quantization", config.quantization, sorted(capabilities.quantizations)))
    for setting, value, claimed in asked:
        if value not in claimed:
            yield Reason(
                code=f"config.{setting}",
                need=f"{setting} {value}",
                have=", ".join(map(str, claimed)) or "none",
                remedy=f"choose one of these, or leave {setting} out",
            )


def _model_reasons(
    description: ModelDescription,
    memory: Sequence[MemoryRow],
    worker_config: WorkerConfig,
    device: Device,
) -> Iterator[Reason]:
    """What the model needs and the device lacks.

    The settings have passed already: what a refused one needs of memory could not be said.
    """
    for group in description.attention_groups:
        if group.is_own:
            continue
        yield from _attention_reasons(group.spec, device.capabilities)
    yield from _extension_reasons(description, device.capabilities)
    yield from _determinism_reasons(description, worker_config, device.capabilities)
    yield from device.reasons_against(worker_config)
    yield from _memory_reasons(memory, device)


def _speculation_reasons(
    config: EngineConfig, description: ModelDescription, capabilities: Capabilities
) -> Iterator[Reason]:
    """A wrong guess is written over in a cache of tokens; a state it has changed for good."""
    if not config.num_speculative_tokens:
        return
    need = f"num_speculative_tokens {config.num_speculative_tokens}"
    remedy = "leave num_speculative_tokens out"
    if "speculation" not in capabilities.features:
        have = ", ".join(sorted(capabilities.features)) or "no feature"
        yield Reason(code="feature.speculation", need=need, have=have, remedy=remedy)
    if any(
        group.is_own or group.spec.kind == "recurrent" for group in description.attention_groups
    ):
        have = "a model that keeps more than keys and values, which a wrong guess may change"
        yield Reason(code="model.speculation", need=need, have=have, remedy=remedy)


def _determinism_reasons(
    description: ModelDescription, worker_config: WorkerConfig, capabilities: Capabilities
) -> Iterator[Reason]:
    """The device promises for its operators; code that calls others is nobody's promise."""
    if not worker_config.deterministic:
        return
    if capabilities.determinism != "invariant":
        yield Reason(
            code="config.deterministic",
            need="logits that depend on no batch, chunk or prefix hit",
            have=f"a device whose claim is {capabilities.determinism}",
            remedy="use a device that claims invariant, or leave deterministic out",
        )
    if description.implementation == TRANSFORMERS:
        yield Reason(
            code="model.deterministic",
            need="logits that depend on no batch, chunk or prefix hit",
            have=f"{description.architecture} in transformers' own code, whose products may",
            remedy="use a model of a native family, or leave deterministic out",
        )


def _extension_reasons(
    description: ModelDescription, capabilities: Capabilities
) -> Iterator[Reason]:
    """Extensions of the contract whose operators the model needs."""
    served = {"", *capabilities.features, *capabilities.attention_kinds}
    needed = {spec.extension for spec in OP_SPECS if spec.name in description.ops}
    for extension in sorted(needed - served):
        yield Reason(
            code=f"feature.{extension}",
            need=extension,
            have=", ".join(sorted(capabilities.features)) or "no feature",
            remedy="use a device that claims it",
        )


def _attention_reasons(spec: AttentionSpec, capabilities: Capabilities) -> Iterator[Reason]:
    remedy = "use a device that claims it"
    if spec.kind not in capabilities.attention_kinds:
        have = ", ".join(sorted(capabilities.attention_kinds))
        yield Reason(code="attention.kind", need=spec.kind, have=have, remedy=remedy)
    wanted = {
        "soft_cap": spec.soft_cap is not None,
        "sinks": spec.has_sinks,
        "alibi": spec.has_alibi,
    }
    for feature, is_needed in wanted.items():
        if is_needed and feature not in capabilities.attention_features:
            have = ", ".join(sorted(capabilities.attention_features)) or "no feature"
            yield Reason(code="attention.feature", need=feature, have=have, remedy=remedy)
    sizes = capabilities.head_sizes
    for size in sorted({spec.head_size, spec.v_head_size}):
        if sizes is not None and size not in sizes:
            have = ", ".join(map(str, sizes))
            yield Reason(code="attention.head_size", need=str(size), have=have, remedy=remedy)


def _memory(
    description: ModelDescription,
    config: EngineConfig,
    worker_config: WorkerConfig,
    device: Device,
) -> tuple[MemoryRow, ...]:
    weights = _weight_bytes(description, config, device.capabilities)
    activations = _activation_bytes(description, config)
    rows = [
        MemoryRow(
            tag="weights", size_bytes=weights, note=f"{description.num_parameters:,} parameters"
        ),
        MemoryRow(tag="activations", size_bytes=activations, note="estimated; measured at start"),
    ]
    allowed = int(device.memory().free_bytes * config.device_memory_fraction)
    cache = config.cache_memory_bytes or max(allowed - weights - activations, 0)
    per_token = sum(g.bytes_per_token(size_of_dtype) for g in description.attention_groups)
    useful = 2 * config.max_num_seqs * worker_config.max_model_len * per_token
    note = f"at most; {min(cache, useful) // max(per_token, 1):,} tokens"
    if not description.attention_groups:
        note = "none: texts are computed whole and nothing is kept"
    rows.append(MemoryRow(tag="cache", size_bytes=min(cache, useful), note=note))
    return tuple(rows)


def _weight_bytes(description: ModelDescription, config: EngineConfig, claims: Capabilities) -> int:
    """Of codes, asked for or stored, the rest after the embedding, the head and perhaps experts.

    The head is asked for in 8 bits, and stored plainly.
    """
    is_kept = description.stored_format in claims.quantizations
    stored = description.stored_format if is_kept else None
    bits = _BITS.get(config.quantization or stored or "")
    if bits is None:
        return description.weight_bytes(config.dtype)
    embedding = description.vocab_size * description.hidden_size
    mixture = description.decoder.mixture if description.decoder else None
    wide = 0
    if mixture is not None and "quantized_experts" not in claims.features:
        wide = mixture.num_expert_weights(description.hidden_size)
    others = description.num_parameters - embedding - wide
    size = size_of_dtype(config.dtype)
    head = 1 if config.quantization else size
    return int(embedding * (size + head) + wide * size + others * bits / 8)


def _activation_bytes(description: ModelDescription, config: EngineConfig) -> int:
    tokens = config.max_num_batched_tokens * description.hidden_size * _ACTIVATION_COPIES
    if description.pooling is not None:
        return config.max_num_batched_tokens * description.row_elements * 4
    logits = config.max_num_seqs * description.vocab_size * _LOGIT_COPIES * 4
    return tokens * size_of_dtype(config.dtype) + logits


def _memory_reasons(memory: Sequence[MemoryRow], device: Device) -> Iterator[Reason]:
    free = device.memory().free_bytes
    fixed = sum(row.size_bytes for row in memory if row.tag != "cache")
    if fixed >= free:
        yield Reason(
            code="memory.weights",
            need=f"{fixed / 2**30:.2f} GiB for weights and activations",
            have=f"{free / 2**30:.2f} GiB free",
            remedy="use a smaller model or dtype, or free memory",
        )


def _own_layout(group: AttentionGroup) -> str:
    """Pages that the model keeps itself, for people."""
    kept = [page.in_blocks(group.spec) for page in group.pages]
    return ", ".join(f"{t.name} {list(t.block_shape)} {t.dtype}" for t in kept)


def _cache_rows(description: ModelDescription, device: Device) -> tuple[CacheRow, ...]:
    rows = []
    for group in description.attention_groups:
        layout, provider = "the worker's own", "worker"
        if group.is_own:
            layout, provider = _own_layout(group), "model"
        elif device.torch_device is not None:
            attention = device.attention(group.spec)
            layout, provider = attention.cache_layout().description, attention.provider()
        rows.append(
            CacheRow(
                group=group.name,
                kind=group.spec.kind,
                num_layers=len(group.layers),
                layout=layout,
                attention=provider,
                bytes_per_token=group.bytes_per_token(size_of_dtype),
            )
        )
    return tuple(rows)


def _kernels(device: Device, cache: Sequence[CacheRow]) -> dict[str, str]:
    if device.torch_device is None:
        return {spec.name: "worker" for spec in OP_SPECS}
    ops = device.ops()
    kernels = {spec.name: ops.provider(spec.name) for spec in OP_SPECS if hasattr(ops, spec.name)}
    if cache:
        kernels["paged_attention"] = ", ".join(sorted({row.attention for row in cache}))
    return kernels


def _notes(chosen: ChosenDevice, kernels: dict[str, str]) -> Iterator[str]:
    portable = sorted(op for op, provider in kernels.items() if provider == "reference")
    if portable:
        yield f"served by the portable reference: {', '.join(portable)}"
    for report in chosen.considered:
        if report.error:
            yield f"backend {report.entry.name} is broken: {report.error}"
        elif report.is_left_unused:
            assert report.probe is not None, report
            name, probe = report.entry.name, report.probe
            yield f"backend {name} is left unused: {probe.problem}; {probe.remedy}"
