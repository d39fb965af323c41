"""A model whose layers attend, carry a state, or do both side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.backend import Device
from quire.core.interface.fusion import FusedLayer, FusedLayers, LayerParts, Mixing, MixingPlace
from quire.core.interface.op_specs import OP_SPECS
from quire.core.interface.ops import PackedLinear
from quire.core.models.description import ModelDescription
from quire.core.models.gated_attention import GatedAttention
from quire.core.models.hybrid.spec import HybridSpec
from quire.core.models.mlp import DenseMlp, DenseWeights, MixtureMlp, MixtureWeights, Mlp
from quire.core.models.rotary import RotaryTable
from quire.core.models.self_attention import HeadAttention, HeadWeights, SelfAttention
from quire.core.models.state_space.delta_mixer import DeltaMixer, DeltaWeights
from quire.core.models.state_space.delta_spec import DeltaSpec
from quire.core.models.state_space.mixers import Mixer, MixerWeights, make_mixer, scans_in_pages
from quire.core.models.state_space.rounds import Round, cut
from quire.core.models.state_space.spec import StateSpaceSpec
from quire.core.models.step_context import StepContext
from quire.core.models.transformers_adapter.pages import PagesPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HybridLayerWeights:
    """The weights of one layer, on the device. Norms are [H]."""

    input_norm: Tensor
    mixer: MixerWeights | DeltaWeights | None
    attention: HeadWeights | None
    output: PackedLinear | None
    """Of the attention."""
    mlp_norm: Tensor
    mlp: DenseWeights | MixtureWeights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HybridWeights:
    """All weights, on the device."""

    embedding: Tensor
    layers: Sequence[HybridLayerWeights]
    final_norm: Tensor
    lm_head: PackedLinear
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """What all layers of a step share."""

    angles: tuple[Tensor, Tensor]
    keys: AttentionPlan
    out: Tensor
    """[T, Hq, D]: scratch of the attention."""
    rounds: Sequence[Round]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """One layer, with the places of its caches."""

    weights: HybridLayerWeights
    mixer: Mixer | None
    attention: SelfAttention | None
    mlp: Mlp
    keys_index: int
    state_index: int


class HybridModel:
    """A `LanguageModel` with keys and values in one group of caches and states in another."""

    can_be_recorded = True

    def __init__(
        self,
        spec: HybridSpec,
        description: ModelDescription,
        weights: HybridWeights,
        device: Device,
        backends: Sequence[AttentionBackend],
        *,
        max_model_len: int,
    ) -> None:
        self.description = description
        self.attention_groups = description.attention_groups
        self.attention_backends = tuple(backends)
        self.max_model_len = max_model_len
        self.num_parameters = description.num_parameters
        self._spec = spec
        self._weights = weights
        self._ops = device.ops()
        self._scans_in_pages = scans_in_pages(device)
        self._ropes = [
            RotaryTable(rope, max_model_len=max_model_len, device=str(device.torch_device))
            for rope in spec.decoder.ropes
        ]
        self.weight_bytes = weights.size_bytes + sum(rope.size_bytes for rope in self._ropes)
        self._layers = [self._make_layer(index) for index in range(len(weights.layers))]
        self._chain = self._make_chain()

    def forward(self, step: StepContext) -> Tensor:
        """Runs the T tokens of a step; hidden states [T, H], final norm applied.

        Writes keys and values, and the states of the blocks in which the step ends.
        """
        decoder, ops, weights = self._spec.decoder, self._ops, self._weights
        residual = ops.embedding(step.token_ids, weights.embedding)
        if decoder.embedding_scale != 1.0:
            residual *= decoder.embedding_scale
        shared = self._start(step, residual)
        x = ops.rms_norm(residual, weights.layers[0].input_norm, decoder.norm_eps)
        if self._chain is not None:
            rounds = [one.pieces for one in shared.rounds]
            return self._chain(x, residual, [shared.angles], step.caches, [shared.keys, rounds])
        for layer, norm in zip(self._layers, self._following_norms, strict=True):
            mixed = self._mix(layer, x, step.caches, shared)
            x = ops.add_rms_norm(mixed, residual, layer.weights.mlp_norm, decoder.norm_eps)
            x = ops.add_rms_norm(layer.mlp(x), residual, norm, decoder.norm_eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, V] of rows [R, H] that `forward` returned."""
        logits = self._ops.linear(hidden, self._weights.lm_head).float()
        return logits if self._spec.logit_scale == 1.0 else logits * self._spec.logit_scale

    def providers(self) -> dict[str, str]:
        """Who serves each operator."""
        names = [spec.name for spec in OP_SPECS if spec.name in self.description.ops]
        serving = {name: self._ops.provider(name) for name in names if name != "paged_attention"}
        return {**serving, "paged_attention": self.attention_backends[0].provider()}

    def _start(self, step: StepContext, residual: Tensor) -> _Step:
        decoder, states = self._spec.decoder, step.plans[1]
        assert isinstance(states, PagesPlan), states
        return _Step(
            angles=self._angles(step.positions),
            keys=step.plans[0],
            out=residual.new_empty((len(residual), decoder.num_heads, decoder.head_size)),
            rounds=cut(states),
        )

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the model's RoPE; without one, the rotation that changes nothing."""
        if self._spec.has_rope:
            return self._ropes[0].gather(positions)
        shape = (len(positions), self._spec.decoder.head_size // 2)
        ones = self._weights.final_norm.new_ones(shape).float()
        return ones, ones.new_zeros(shape)

    def _mix(self, layer: _Layer, x: Tensor, caches: Sequence[LayerCache], step: _Step) -> Tensor:
        """What the tokens of a step tell one another in this layer, [T, H]."""
        mixed = None
        if layer.mixer is not None:
            mixed = layer.mixer(x, caches[layer.state_index], step.rounds)
        if layer.attention is None or layer.weights.output is None:
            assert mixed is not None, "a layer of neither kind"
            return mixed
        cache = caches[layer.keys_index]
        attended = layer.attention(x, step.angles, cache, step.keys, step.out)
        attended = self._ops.linear(attended, layer.weights.output)
        return attended if mixed is None else mixed + attended

    @property
    def _following_norms(self) -> list[Tensor]:
        """Of each layer: the first norm of the next one, or the last of the model."""
        weights = self._weights
        return [layer.input_norm for layer in weights.layers[1:]] + [weights.final_norm]

    def _make_chain(self) -> FusedLayers | None:
        """The device's one call for all layers, if it has one."""
        if not self._scans_in_pages:
            return None
        following = self._following_norms
        fused = [
            self._fuse(layer, norm) for layer, norm in zip(self._layers, following, strict=True)
        ]
        known = [one for one in fused if one is not None]
        if len(known) != len(fused):
            return None
        return self._ops.chain_layers(known, [self._places(layer) for layer in self._layers])

    def _fuse(self, layer: _Layer, following_norm: Tensor) -> FusedLayer | None:
        mixings: list[Mixing] = []
        if layer.mixer is not None:
            mixings.append(layer.mixer.parts())
        if layer.attention is not None and layer.weights.output is not None:
            rope = self._spec.decoder.ropes[0].rotary_size if self._spec.has_rope else 0
            mixings.append(layer.attention.parts(layer.weights.output, rope))
        parts = LayerParts(
            mixings=mixings,
            mlp=layer.mlp.parts(),
            mlp_norm=layer.weights.mlp_norm,
            following_norm=following_norm,
            eps=self._spec.decoder.norm_eps,
        )
        return self._ops.fuse_layer(parts, self.attention_backends[0])

    def _places(self, layer: _Layer) -> list[MixingPlace]:
        """As `_fuse` has the mixings: keys and values are the first group, states the second."""
        places = []
        if layer.mixer is not None:
            places.append(MixingPlace(cache=layer.state_index, plan=1))
        if layer.attention is not None:
            places.append(MixingPlace(cache=layer.keys_index, plan=0))
        return places

    def _make_layer(self, index: int) -> _Layer:
        spec, weights = self._spec, self._weights.layers[index]
        heads, mixer = weights.attention, weights.mixer
        attending, mixing = spec.attention_layers, spec.mixer_layers
        return _Layer(
            weights=weights,
            mixer=None if mixer is None else self._make_mixer(mixer),
            attention=None if heads is None else self._make_attention(heads),
            mlp=self._make_mlp(weights.mlp),
            keys_index=attending.index(index) if index in attending else -1,
            state_index=len(attending) + mixing.index(index) if index in mixing else -1,
        )

    def _make_mixer(self, weights: MixerWeights | DeltaWeights) -> Mixer:
        spec, in_pages = self._spec.mixer, self._scans_in_pages
        if isinstance(weights, DeltaWeights):
            assert isinstance(spec, DeltaSpec), spec
            return DeltaMixer(spec, weights, self._ops, scans_in_pages=in_pages)
        assert isinstance(spec, StateSpaceSpec), spec
        return make_mixer(spec, weights, self._ops, scans_in_pages=in_pages)

    def _make_attention(self, weights: HeadWeights) -> SelfAttention:
        decoder = self._spec.decoder
        kind = GatedAttention if decoder.has_attention_gate else HeadAttention
        return kind(decoder, weights, self._ops, self.attention_backends[0])

    def _make_mlp(self, weights: DenseWeights | MixtureWeights) -> Mlp:
        decoder = self._spec.decoder
        if isinstance(weights, DenseWeights):
            return DenseMlp(decoder.activation, weights, self._ops)
        assert decoder.mixture is not None
        return MixtureMlp(decoder.mixture, decoder.activation, weights, self._ops)
