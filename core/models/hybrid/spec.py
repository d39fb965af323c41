"""Hybrid models as their configs describe them, and the tensors of their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.state_space.mixer_spec import MixerSpec
from quire.core.models.weights.weight_layout import (
    DecoderTensors,
    ExpertNames,
    LayerTensors,
    TensorShape,
    WeightNames,
    lay_out,
    standard_name,
)


def _rename_mamba(name: str) -> str | None:
    """As elsewhere; what Falcon-H1 computes from its config needs no loading."""
    return None if name.endswith("mup_vector") else standard_name(name)


MAMBA_NAMES = WeightNames(
    final_norm="model.final_layernorm",
    mlp_norm="pre_ff_layernorm",
    gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
    experts=ExpertNames(
        router="feed_forward.router",
        gate="feed_forward.experts.{expert}.gate_proj",
        up="feed_forward.experts.{expert}.up_proj",
        down="feed_forward.experts.{expert}.down_proj",
    ),
    rename=_rename_mamba,
)
"""Bamba, Falcon-H1 and Jamba call their tensors alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridSpec:
    """A decoder whose layers have attention, a mixer with a state, or both side by side."""

    decoder: DecoderSpec
    """Embedding, attention, norms, MLPs and head; its attention is in some layers alone."""
    mixer: MixerSpec
    attention_layers: tuple[int, ...]
    mixer_layers: tuple[int, ...]
    names: WeightNames = MAMBA_NAMES
    merged_names: WeightNames | None = None
    """Of checkpoints that have the experts of a layer in one tensor, where there are such too."""
    mixer_name: str = "mamba."
    """Before the tensors of a mixer, in a layer."""
    ignored_prefixes: tuple[str, ...] = ()
    """Of tensors that no text depends on: they are left out, and logged."""
    has_rope: bool = True
    logit_scale: float = 1.0
    """Multiplies the logits."""
    weight_scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    """Name in a layer to what the tensor is multiplied by: one number, or one for each row."""


class HybridTensors:
    """The tensors of a checkpoint, by what they are for."""

    def __init__(self, spec: HybridSpec) -> None:
        self.decoder: DecoderTensors = lay_out(spec.decoder, spec.names)
        """Of all layers; those without attention lack the tensors of attention."""
        self._attending = frozenset(spec.attention_layers)
        self.mixers: dict[int, dict[str, TensorShape]] = {
            layer: spec.mixer.tensors(spec.names.layer.format(layer=layer) + spec.mixer_name)
            for layer in spec.mixer_layers
        }

    def __iter__(self) -> Iterator[TensorShape]:
        yield self.decoder.embedding
        for index, layer in enumerate(self.decoder.layers):
            yield from self._layer(index, layer)
        yield self.decoder.final_norm
        yield from self.decoder.lm_head or ()

    def _layer(self, index: int, layer: LayerTensors) -> Iterator[TensorShape]:
        yield from (layer.input_norm, layer.mlp_norm)
        yield from layer.mlp
        yield from self.mixers.get(index, {}).values()
        if index in self._attending:
            yield from layer.attention
            yield from layer.output
