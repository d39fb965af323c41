"""The table of families, by the names in a config's `architectures`. Packages may add theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from quire.core.errors import CheckpointError
from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.weights.weight_layout import WeightNames


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to read the checkpoints of one architecture."""

    architecture: str
    describe: Callable[[Any], DecoderSpec]
    """A pure function of the Hugging Face config."""
    names: WeightNames = field(default_factory=WeightNames)
    model_types: tuple[str, ...] = ()
    """`model_type`s of configs that name no architecture."""


_FAMILIES: dict[str, Family] = {}


def register_family(
    architecture: str,
    *,
    describe: Callable[[Any], DecoderSpec],
    names: WeightNames | None = None,
    model_types: tuple[str, ...] = (),
) -> None:
    """Adds an architecture, or replaces it: the last one wins."""
    _FAMILIES[architecture] = Family(
        architecture=architecture,
        describe=describe,
        names=names or WeightNames(),
        model_types=model_types,
    )


def known_architectures() -> tuple[str, ...]:
    """The architectures in the table, sorted."""
    return tuple(sorted(_FAMILIES))


def find_family(raw_config: dict[str, Any]) -> Family | None:
    """The family of a config.json; None: the table has none."""
    architectures = raw_config.get("architectures") or []
    for architecture in architectures:
        if architecture in _FAMILIES:
            return _FAMILIES[architecture]
    model_type = raw_config.get("model_type")
    if not architectures:
        for family in _FAMILIES.values():
            if model_type in family.model_types:
                return family
    return None


def family_of(raw_config: dict[str, Any], *, where: object) -> Family:
    """The family of a config.json that was read from `where`.

    Raises: CheckpointError that lists the known architectures.
    """
    family = find_family(raw_config)
    if family is not None:
        return family
    architectures = raw_config.get("architectures") or []
    asked = ", ".join(architectures) or f"model_type {raw_config.get('model_type')!r}"
    raise CheckpointError(
        f"{where} holds a model of architecture {asked}, which Quire does not know; "
        f"known are {', '.join(known_architectures())}"
    )
