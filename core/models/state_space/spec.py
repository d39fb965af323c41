"""A state-space model as its config describes it, and the tensors of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quire.core.models.attention_groups import PageTensor
from quire.core.models.families.reading import unsupported
from quire.core.models.weights.weight_layout import TensorShape

ARCHITECTURES = ("MambaForCausalLM", "Mamba2ForCausalLM")
CONV, STATE = "conv", "state"
"""Names of the two pages of a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpaceSpec:
    """Sizes of a model whose layers all are mixers with a state."""

    architecture: str
    vocab_size: int
    hidden_size: int
    inner_size: int
    state_size: int
    conv_width: int
    num_layers: int
    norm_eps: float
    num_heads: int | None
    """None: Mamba, where each channel has its own decay; else Mamba-2."""
    num_groups: int
    rank: int
    """Of Mamba's time steps."""
    has_bias: bool
    has_conv_bias: bool
    has_tied_embeddings: bool
    keeps_residual_in_float32: bool
    has_output_bias: bool | None = None
    """Of the last projection; None: as `has_bias`."""
    has_inner_norms: bool = False
    """Mamba's time steps, B and C are normalised, as in Jamba."""
    has_gated_norm: bool = True
    """Mamba-2's gated channels are normalised."""
    is_norm_before_gate: bool = False
    """They are normalised before the gate, not after it."""

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: in Mamba-2 also those of B and C."""
        shared = 0 if self.num_heads is None else 2 * self.num_groups * self.state_size
        return self.inner_size + shared

    @property
    def projected_size(self) -> int:
        """Outputs of the first projection."""
        if self.num_heads is None:
            return 2 * self.inner_size
        return self.inner_size + self.conv_size + self.num_heads

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one sequence."""
        if self.num_heads is None:
            return (self.inner_size, self.state_size)
        return (self.num_heads, self.inner_size // self.num_heads, self.state_size)

    @property
    def scan(self) -> str:
        """The operator that carries the state."""
        return "selective_scan" if self.num_heads is None else "ssd_scan"

    @property
    def pages(self) -> tuple[PageTensor, ...]:
        """What a layer keeps for each block."""
        conv = (self.conv_size, self.conv_width - 1)
        return (
            PageTensor(name=CONV, shape=conv, is_per_token=False),
            PageTensor(name=STATE, shape=self.state_shape, is_per_token=False, dtype="float32"),
        )

    def tensors(self, prefix: str) -> dict[str, TensorShape]:
        """The tensors of one mixer, by the names that follow `prefix`."""
        shapes: dict[str, tuple[int, ...]] = {
            "in_proj.weight": (self.projected_size, self.hidden_size),
            "conv1d.weight": (self.conv_size, 1, self.conv_width),
            "out_proj.weight": (self.hidden_size, self.inner_size),
            **(_first_shapes(self) if self.num_heads is None else _second_shapes(self)),
        }
        if self.has_conv_bias:
            shapes["conv1d.bias"] = (self.conv_size,)
        if self.has_bias:
            shapes["in_proj.bias"] = (self.projected_size,)
        if self.has_bias if self.has_output_bias is None else self.has_output_bias:
            shapes["out_proj.bias"] = (self.hidden_size,)
        return {name: TensorShape(name=prefix + name, shape=s) for name, s in shapes.items()}


def read_spec(config: Any) -> StateSpaceSpec:
    """From a Hugging Face config.

    Raises: UnsupportedError for what the operators do not compute.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise unsupported("activation", f"activation {config.hidden_act!r}", "silu")
    is_second = config.model_type == "mamba2"
    limits = tuple(getattr(config, "time_step_limit", ()) or (0.0, float("inf")))
    if is_second and limits != (0.0, float("inf")):
        raise unsupported("time_step_limit", f"time steps limited to {limits}", "no limit")
    return StateSpaceSpec(
        architecture="Mamba2ForCausalLM" if is_second else "MambaForCausalLM",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        inner_size=int(config.expand * config.hidden_size)
        if is_second
        else config.intermediate_size,
        state_size=config.state_size,
        conv_width=config.conv_kernel,
        num_layers=config.num_hidden_layers,
        norm_eps=config.layer_norm_epsilon,
        num_heads=config.num_heads if is_second else None,
        num_groups=config.n_groups if is_second else 1,
        rank=0 if is_second else int(config.time_step_rank),
        has_bias=config.use_bias,
        has_conv_bias=config.use_conv_bias,
        has_tied_embeddings=config.tie_word_embeddings,
        keeps_residual_in_float32=config.residual_in_fp32,
    )


class StateSpaceTensors:
    """The tensors of a checkpoint, by what they are for."""

    def __init__(self, spec: StateSpaceSpec) -> None:
        self._spec = spec
        self.embedding = _weight("backbone.embeddings", spec.vocab_size, spec.hidden_size)
        self.final_norm = _weight("backbone.norm_f", spec.hidden_size)
        self.lm_head = _weight("lm_head", spec.vocab_size, spec.hidden_size)

    def norm(self, layer: int) -> TensorShape:
        """Before a mixer."""
        return _weight(f"backbone.layers.{layer}.norm", self._spec.hidden_size)

    def mixer(self, layer: int) -> dict[str, TensorShape]:
        """Of one mixer, by the names that they have in it."""
        return self._spec.tensors(f"backbone.layers.{layer}.mixer.")

    def __iter__(self) -> Iterator[TensorShape]:
        yield self.embedding
        for layer in range(self._spec.num_layers):
            yield self.norm(layer)
            yield from self.mixer(layer).values()
        yield self.final_norm
        if not self._spec.has_tied_embeddings:
            yield self.lm_head


def _first_shapes(spec: StateSpaceSpec) -> dict[str, tuple[int, ...]]:
    """What Mamba alone has."""
    norms = {
        "dt_layernorm.weight": (spec.rank,),
        "b_layernorm.weight": (spec.state_size,),
        "c_layernorm.weight": (spec.state_size,),
    }
    return {
        **(norms if spec.has_inner_norms else {}),
        "x_proj.weight": (spec.rank + 2 * spec.state_size, spec.inner_size),
        "dt_proj.weight": (spec.inner_size, spec.rank),
        "dt_proj.bias": (spec.inner_size,),
        "A_log": (spec.inner_size, spec.state_size),
        "D": (spec.inner_size,),
    }


def _second_shapes(spec: StateSpaceSpec) -> dict[str, tuple[int, ...]]:
    """What Mamba-2 alone has."""
    heads = spec.num_heads or 0
    norm = {"norm.weight": (spec.inner_size,)} if spec.has_gated_norm else {}
    return {"dt_bias": (heads,), "A_log": (heads,), "D": (heads,), **norm}


def _weight(name: str, *shape: int) -> TensorShape:
    return TensorShape(name=f"{name}.weight", shape=shape)
