"""Who runs a model: a native family, a package from outside, or transformers' own code.

A package brings a family by an entry point of the group `quire.models`, named as the architecture
and naming a `Family` (a reader of configs for the one decoder) or a `ModelImplementation` (a model
of its own). Listing reads metadata alone, and an entry is loaded only for a checkpoint of its
architecture, so that a broken package harms nobody else.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from stevedore.driver import DriverManager

from quire.core.errors import CheckpointError, PluginError, Reason, UnsupportedError
from quire.core.models.description import ModelDescription, describe_model
from quire.core.models.families import Family, known_architectures
from quire.core.models.families.registry import find_family
from quire.core.models.hybrid import describe_hybrid, is_hybrid
from quire.core.models.model_config import read_json
from quire.core.models.pooling_purpose import is_for_pooling
from quire.core.models.state_space import describe_state_space, is_state_space

if TYPE_CHECKING:
    from quire.core.interface.backend import Device
    from quire.core.interface.worker import WorkerConfig
    from quire.core.models.language_model import LanguageModel
    from quire.core.models.pooling.model import PoolingModel

NAMESPACE = "quire.models"
NATIVE, TRANSFORMERS = "native", "transformers"


@runtime_checkable
class ModelImplementation(Protocol):
    """A way to run models, complete: what the registry asks of native families and others alike."""

    @property
    def name(self) -> str:
        """`native`, `transformers`, or the name of a distribution."""

    def describe(self, directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
        """The model in `directory` before its weights.

        Raises: CheckpointError, UnsupportedError.
        """

    def load(self, config: WorkerConfig, device: Device) -> LanguageModel:
        """The model of `config.model` on `device`.

        Raises: CheckpointError, UnsupportedError, DeviceOutOfMemory.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One entry point of `quire.models`; nothing of it has been imported."""

    architecture: str
    target: str
    """`module:attribute`."""
    distribution: str


@dataclass(frozen=True, slots=True)
class NativeImplementation:
    """Families that run through the one decoder; `family`: one from outside the table."""

    family: Family | None = None
    name: str = NATIVE

    def describe(self, directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
        """From the JSON files alone; no remote code is ever run."""
        return replace(describe_model(directory, family=self.family), implementation=self.name)

    def load(self, config: WorkerConfig, device: Device) -> LanguageModel:
        """Weights read, merged and packed for the device."""
        from quire.core.models.loading import load_model

        return load_model(config, device, self.family)


class Seq2SeqImplementation:
    """Encoder-decoders, in transformers' own code."""

    name = TRANSFORMERS

    def describe(self, directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
        """From a dry run without weights."""
        from quire.core.models.seq2seq import describe_seq2seq

        return describe_seq2seq(directory, trust_remote_code=trust_remote_code)

    def load(self, config: WorkerConfig, device: Device) -> LanguageModel:
        """Weights into transformers' modules, held against their own uncached forward."""
        from quire.core.models.seq2seq import load_seq2seq

        return load_seq2seq(config, device)


class StateSpaceImplementation:
    """Mamba and Mamba-2, whose layers keep states."""

    name = NATIVE

    def describe(self, directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
        """From the JSON files alone; no remote code is ever run."""
        return describe_state_space(directory)

    def load(self, config: WorkerConfig, device: Device) -> LanguageModel:
        """Weights read and packed for the device."""
        from quire.core.models.state_space.loading import load_state_space

        return load_state_space(config, device)


class HybridImplementation:
    """Bamba, Falcon-H1, Jamba, Qwen3-Next and Qwen3.5: states beside keys and values."""

    name = NATIVE

    def describe(self, directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
        """From the JSON files alone; no remote code is ever run."""
        return describe_hybrid(directory)

    def load(self, config: WorkerConfig, device: Device) -> LanguageModel:
        """Weights read and packed for the device."""
        from quire.core.models.hybrid.loading import load_hybrid

        return load_hybrid(config, device)


class TransformersImplementation:
    """Every other architecture, in transformers' own code."""

    name = TRANSFORMERS

    def describe(self, directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
        """From a dry run without weights."""
        from quire.core.models.transformers_adapter import describe_adapted

        return describe_adapted(directory, trust_remote_code=trust_remote_code)

    def load(self, config: WorkerConfig, device: Device) -> LanguageModel:
        """Weights into transformers' modules, held against their own uncached forward."""
        from quire.core.models.transformers_adapter import load_adapted

        return load_adapted(config, device)


@dataclass(frozen=True, slots=True)
class PoolingImplementation:
    """Models that make vectors, labels or scores of texts, in transformers' own code."""

    task: str = "auto"
    name: str = TRANSFORMERS

    def describe(self, directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
        """From the JSON files and a model without weights."""
        from quire.core.models.pooling import describe_pooling

        return describe_pooling(directory, task=self.task, trust_remote_code=trust_remote_code)

    def load(self, config: WorkerConfig, device: Device) -> PoolingModel:
        """Weights into transformers' modules, held against their own run of each text alone."""
        from quire.core.models.pooling import load_pooling

        return load_pooling(config, device)


def describe(
    directory: Path,
    *,
    model_impl: str = "auto",
    trust_remote_code: bool = False,
    task: str = "auto",
) -> ModelDescription:
    """Describes the model in `directory`, whoever will run it. Loads no weights.

    Raises: CheckpointError, UnsupportedError, PluginError.
    """
    if is_for_pooling(directory, read_json(directory / "config.json"), task):
        pooling = PoolingImplementation(task)
        return pooling.describe(directory, trust_remote_code=trust_remote_code)
    return _chosen(directory, model_impl, trust_remote_code)[1]


def load_any_model(config: WorkerConfig, device: Device) -> LanguageModel | PoolingModel:
    """Loads `config.model` for what it is for: `generate`, or numbers of texts.

    Raises: as `load_language_model`.
    """
    directory = Path(config.model)
    if is_for_pooling(directory, read_json(directory / "config.json"), config.task):
        return PoolingImplementation(config.task).load(config, device)
    return load_language_model(config, device)


def load_language_model(config: WorkerConfig, device: Device) -> LanguageModel:
    """Loads `config.model` onto `device`, by whoever `describe` said would run it.

    Raises: CheckpointError, UnsupportedError, PluginError, DeviceOutOfMemory.
    """
    directory = Path(config.model)
    implementation, _ = _chosen(directory, config.model_impl, config.trust_remote_code)
    return implementation.load(config, device)


def list_model_entries() -> list[ModelEntry]:
    """Every architecture that an installed package brings, from metadata alone."""
    return sorted(
        (
            ModelEntry(
                architecture=point.name,
                target=point.value,
                distribution=point.dist.name if point.dist else "unknown",
            )
            for point in _entry_points()
        ),
        key=lambda entry: (entry.architecture, entry.distribution),
    )


def _chosen(
    directory: Path, model_impl: str, trust_remote_code: bool
) -> tuple[ModelImplementation, ModelDescription]:
    """Who runs the model, and its description by him."""
    raw = read_json(directory / "config.json")
    native = _native_for(raw)
    if model_impl == TRANSFORMERS or (native is None and model_impl == "auto"):
        return _described(_adapter_for(directory, trust_remote_code), directory, trust_remote_code)
    if model_impl == "auto" and isinstance(native, NativeImplementation | HybridImplementation):
        seeing = _seeing(directory, raw, trust_remote_code)
        if seeing is not None:
            return seeing
    if native is None:
        raise CheckpointError(
            f"{directory} holds a model of architecture {_named(raw)}, of which there is no native "
            f"family; known are {', '.join(known_architectures())}. Leave --model-impl at auto, so "
            "that transformers' own code runs it, or install a package that brings it"
        )
    try:
        return _described(native, directory, trust_remote_code)
    except UnsupportedError as error:
        if model_impl == NATIVE or not _is_of_the_family(error):
            raise
        adapted, description = _described(
            TransformersImplementation(), directory, trust_remote_code
        )
        note = f"the native family does not serve this config: {error.reasons[0].need}"
        return adapted, replace(description, notes=(note, *description.notes))


def _seeing(
    directory: Path, raw: dict[str, Any], trust_remote_code: bool
) -> tuple[ModelImplementation, ModelDescription] | None:
    """Who serves the images of a checkpoint with a tower; None: it has none, or nobody does."""
    if raw.get("vision_config") is None:
        return None
    try:
        adapted, description = _described(
            TransformersImplementation(), directory, trust_remote_code
        )
    except UnsupportedError:
        return None
    if not description.accepts or any(group.is_own for group in description.attention_groups):
        # One request after the other would cost every text more than its images are worth.
        return None
    note = "images are served; with --model-impl native it answers text alone, and faster"
    return adapted, replace(description, notes=(note, *description.notes))


def _adapter_for(directory: Path, trust_remote_code: bool) -> ModelImplementation:
    """Whose way of running transformers' code the checkpoint is for."""
    from quire.core.models.seq2seq import is_seq2seq

    if is_seq2seq(directory, trust_remote_code=trust_remote_code):
        return Seq2SeqImplementation()
    return TransformersImplementation()


def _described(
    implementation: ModelImplementation, directory: Path, trust_remote_code: bool
) -> tuple[ModelImplementation, ModelDescription]:
    return implementation, implementation.describe(directory, trust_remote_code=trust_remote_code)


def _is_of_the_family(error: UnsupportedError) -> bool:
    """Whether the family lacks a feature, which transformers' code may have."""
    return all(_is_feature(reason) for reason in error.reasons)


def _is_feature(reason: Reason) -> bool:
    return reason.code.startswith("model.") and reason.code != "model.quantization"


def _native_for(raw: dict[str, Any]) -> ModelImplementation | None:
    """A package's family before one of ours: whoever installed it wanted it."""
    for architecture in raw.get("architectures") or ():
        entries = [entry for entry in list_model_entries() if entry.architecture == architecture]
        if entries:
            return _load_entry(entries)
    if is_state_space(raw):
        return StateSpaceImplementation()
    if is_hybrid(raw):
        return HybridImplementation()
    return None if find_family(raw) is None else NativeImplementation()


def _named(raw: dict[str, Any]) -> str:
    return ", ".join(raw.get("architectures") or ()) or f"model_type {raw.get('model_type')!r}"


class _FreshDriverManager(DriverManager[Any]):
    """A DriverManager that reads the entry points as they are now."""

    def list_entry_points(self) -> list[EntryPoint]:
        return _entry_points()


def _entry_points() -> list[EntryPoint]:
    return list(entry_points(group=NAMESPACE))


def _load_entry(entries: list[ModelEntry]) -> ModelImplementation:
    """What the one entry of an architecture names.

    Raises: PluginError for a broken one, or several of one name.
    """
    entry = entries[0]
    if len(entries) > 1:
        claims = " and ".join(f"{e.distribution} ({e.target})" for e in entries)
        raise PluginError(f"{entry.architecture} is claimed by {claims}; uninstall all but one")
    try:
        manager = _FreshDriverManager(
            NAMESPACE, entry.architecture, invoke_on_load=False, on_load_failure_callback=_raise
        )
        loaded = manager.driver
    # A package may fail in any way, at exit included.
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{entry.distribution} brings {entry.architecture} and cannot be loaded: {error!r}; "
            "update it or uninstall it, or pass --model-impl transformers",
            details=traceback.format_exc(),
        ) from error
    if isinstance(loaded, Family):
        return NativeImplementation(loaded, entry.distribution)
    made = loaded() if isinstance(loaded, type) else loaded
    if isinstance(made, ModelImplementation):
        return made
    raise PluginError(
        f"{entry.target} of {entry.distribution} is {made!r}; an entry of {NAMESPACE} names a "
        "Family or a ModelImplementation"
    )


def _raise(_manager: object, _point: EntryPoint, error: BaseException) -> None:
    raise error
