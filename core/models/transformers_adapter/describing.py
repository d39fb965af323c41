"""A transformers model before its weights: made on the meta device, and probed there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.core.models.attention_groups import AttentionGroup
from quire.core.models.description import ModelDescription
from quire.core.models.model_config import dtype_of, eos_token_ids_of
from quire.core.models.transformers_adapter.cached import (
    CacheForm,
    NotPageable,
    cached_groups,
    find_form,
)
from quire.core.models.transformers_adapter.checkpoint import (
    make_empty_model,
    model_class_of,
    read_config,
)
from quire.core.models.transformers_adapter.hearing import (
    hearing_of,
    refuse_sound_at_each_token,
)
from quire.core.models.transformers_adapter.paged import paged_groups
from quire.core.models.transformers_adapter.probing import Probe, probe
from quire.core.models.transformers_adapter.recomputed import recomputed_groups
from quire.core.models.transformers_adapter.seeing import Sight, sight_of
from quire.core.models.transformers_adapter.selection import (
    indexers_of,
    refuse_unseen_selection,
)
from quire.core.models.transformers_adapter.text_model import TextModel, use_attention

IMPLEMENTATION = "transformers"
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_WITHOUT_LENGTH = 32768
"""For models whose states know no length."""
_SAMPLED_OPS = ("softmax", "sample", "log_softmax")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run a model, as far as a dry run tells."""

    name: str
    """`paged`, `cached`, `recomputed`."""
    groups: tuple[AttentionGroup, ...]
    note: str
    """For the user; empty: there is nothing to say."""
    form: CacheForm | None = None


def describe_adapted(directory: Path, *, trust_remote_code: bool = False) -> ModelDescription:
    """Describes the model in `directory` from a dry run without weights.

    Raises: CheckpointError, UnsupportedError.
    """
    config = read_config(directory, trust_remote_code=trust_remote_code)
    model_class = model_class_of(config, directory, trust_remote_code=trust_remote_code)
    dtype = dtype_of(config)
    with without_expert_loops(config):
        text_model = TextModel(make_empty_model(model_class, config))
        # The one kind of attention whose masks are made without a look at the numbers.
        use_attention(text_model.model, "eager")
        ways, found = find_ways(text_model, dtype=dtype, cache_dtype=dtype, block_size=16)
    return describe_way(text_model, ways[0], found, config, directory, dtype=dtype)


def find_ways(
    text_model: TextModel, *, dtype: str, cache_dtype: str, block_size: int
) -> tuple[list[Way], Probe]:
    """The ways that may be right, best first; the last always may.

    Raises: UnsupportedError if no check could tell.
    """
    settings: dict[str, Any] = {
        "dtype": dtype, "cache_dtype": cache_dtype, "block_size": block_size,
    }  # fmt: skip
    refuse_sound_at_each_token(text_model.model)
    found = probe(text_model)
    refuse_unseen_selection(text_model.model, found.selections)
    ways = []
    objections = list(found.objections)
    if indexers_of(text_model.model):
        note = "the whole text is computed anew for every token, since tokens choose what they see"
        return [Way(name="recomputed", groups=recomputed_groups(**settings), note=note)], found
    if not objections:
        ways.append(Way(name="paged", groups=paged_groups(found, **settings), note=""))
    why = "; ".join(objections) or "the paged way gives other logits"
    try:
        with torch.no_grad():
            form = find_form(text_model)
        note = f"requests run one after the other with a cache each, since {why}"
        ways.append(
            Way(name="cached", groups=cached_groups(form, **settings), note=note, form=form)
        )
    except NotPageable as answer:
        why = f"{why}; {answer}"
    # A model's own cache may fail in any way without weights.
    except Exception as error:
        why = f"{why}; its cache fails with {type(error).__name__}: {error}"
    note = f"the whole text is computed anew for every token, since {why}"
    ways.append(Way(name="recomputed", groups=recomputed_groups(**settings), note=note))
    return ways, found


def describe_way(
    text_model: TextModel, way: Way, found: Probe, config: Any, directory: Path, *, dtype: str
) -> ModelDescription:
    """The description of a model that runs in this way."""
    text_config = config.get_text_config(decoder=True)
    hidden_size = int(_first(text_config, ("hidden_size", "n_embd", "d_model", "dim")) or 1)
    vocab_size = int(found.logits_size or text_config.vocab_size)
    sight = _sight_in(way, config)
    parameters = {id(p): p.numel() for p in text_model.model.parameters()}
    return ModelDescription(
        architecture=type(text_model.model).__name__,
        checkpoint_dtype=dtype_of(config),
        dtype=dtype,
        cache_dtype=dtype,
        vocab_size=vocab_size,
        max_model_len=int(_first(text_config, _LENGTHS) or _WITHOUT_LENGTH),
        hidden_size=hidden_size,
        num_layers=sum(len(group.layers) for group in way.groups),
        num_parameters=sum(parameters.values()),
        attention_groups=way.groups,
        ops=_SAMPLED_OPS,
        eos_token_ids=eos_token_ids_of(directory, config),
        row_elements=24 * hidden_size + (vocab_size if not text_model.is_parted else 0),
        implementation=IMPLEMENTATION,
        notes=(way.note,) if way.note else (),
        accepts=_accepted(config, way),
        needs_whole_prompts=sight is not None
        and (sight.is_bidirectional or sight.sees_whole_prompt),
        sees_whole_prompts=sight is not None and sight.sees_whole_prompt,
    )


def _accepted(config: Any, way: Way) -> tuple[str, ...]:
    """What prompts may bring besides text."""
    if _sight_in(way, config) is not None:
        return ("image",)
    return ("audio",) if way.name == "paged" and hearing_of(config) is not None else ()


def _sight_in(way: Way, config: Any) -> Sight | None:
    """How a model sees that runs in this way; None: it takes no images."""
    sight = sight_of(config)
    if sight is None or way.name == "paged":
        return sight
    return sight if way.name == "cached" and sight.sees_cached else None


def _first(config: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


class without_expert_loops:  # noqa: N801 - used as a context
    """Experts multiplied in one batch, since a loop over chosen experts needs real numbers."""

    def __init__(self, config: Any) -> None:
        self._configs = [config, config.get_text_config(decoder=True)]
        self._before: list[Any] = []

    def __enter__(self) -> None:
        """Sets it."""
        self._before = [getattr(c, "_experts_implementation_internal", None) for c in self._configs]
        for config in self._configs:
            config._experts_implementation_internal = "batched_mm"  # noqa: SLF001 - no setter

    def __exit__(self, *unused: object) -> None:
        """Sets it back."""
        for config, before in zip(self._configs, self._before, strict=True):
            config._experts_implementation_internal = before  # noqa: SLF001 - no setter
