"""The operators of a device: the class that a backend fills in.

The table `OP_SPECS` in `op_specs` is the specification. Every operator has a reference in plain
torch (`quire.backends.reference.ReferenceOps`), so a backend overrides those that it accelerates
and no others.

Shapes: T tokens of the step, R sampled rows, V vocabulary, H hidden size, D head size. All tensors
live on the ops' device. Operators compute in float32 and round once to the dtype of the result,
unless said otherwise. Results are safe to read in the order of the device's queue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.core.interface.contract import check_contract

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quire.core.interface.attention import AttentionBackend
    from quire.core.interface.experts import (
        ExpertWeights,
        PackedExperts,
        QuantizedExperts,
        RoutingSpec,
    )
    from quire.core.interface.fusion import (
        DeltaMixerParts,
        FusedLayer,
        FusedLayers,
        FusedMixer,
        LayerParts,
        MixerParts,
        MixingPlace,
    )
    from quire.core.interface.quantization import QuantizedWeight
    from quire.core.interface.recurrence import Sequences


@dataclass(slots=True, kw_only=True)
class PackedLinear:
    """The weights of one linear layer in the form that a device multiplies fastest.

    Made once at load by `Ops.pack_linear`; opaque to everyone else.
    """

    num_inputs: int
    num_outputs: int
    dtype: str
    """Of the activations that go in and come out."""
    format: str
    """How the weights are kept, shown by `quire plan`: `dense`, `onednn-blocked`, `int8`."""
    size_bytes: int
    """Memory that the packed weights hold, beyond tensors that they share with others."""
    payload: object = field(repr=False)
    """The backend's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledLogprobs:
    """Log-probabilities for R rows, on the device."""

    selected: Tensor
    """float32 [R]: of the chosen tokens."""
    ranks: Tensor
    """int64 [R]: 1 for the most likely token; ties share the better rank."""
    top_ids: Tensor
    """int64 [R, n]: the n most likely, best first; ties by lowest id."""
    top_logprobs: Tensor
    """float32 [R, n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTensors:
    """Settings of R rows, on the device; a row of temperature 0 is greedy and ignores the rest."""

    temperature: Tensor
    """float32 [R]."""
    top_k: Tensor
    """int64 [R]; V: no limit."""
    top_p: Tensor
    """float32 [R] in (0, 1]."""
    min_p: Tensor
    """float32 [R] in [0, 1]."""
    uniform: Tensor
    """float32 [R] in [0, 1): the row's own random number, drawn on the host from its seed and
    position, so that a token does not depend on who else is in the batch or on which device it
    runs.
    """
    is_all_greedy: bool
    """Host fact: no row samples."""
    needs_filter: bool
    """Host fact: some row uses top_k, top_p or min_p."""


class Ops(ABC):
    """The operators of one device.

    Subclass `quire.backends.reference.ReferenceOps`, not this class.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, Ops)

    @abstractmethod
    def provider(self, op: str) -> str:
        """Who serves operator `op` here, as `quire plan` shows it: `reference`, `native:avx512`."""

    # --- layers ---------------------------------------------------------------------------------

    @abstractmethod
    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of a table. token_ids int64 [T]; weight [V, H]; returns [T, H] in weight's dtype."""

    @abstractmethod
    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Packs a linear layer for `linear`. weight [N, K]; bias [N] or None. Neither is mutated.

        The packed form may keep a reference to `weight`; the caller does not change it afterwards.
        Called at load, once a layer; may allocate.
        """

    @abstractmethod
    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """X @ weight.T + bias. x [T, K] in the packed dtype; returns [T, N] in the same dtype.

        Accumulates in float32.
        """

    def pack_quantized_linear(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: str
    ) -> PackedLinear:
        """Packs a quantized linear layer for `linear`, with activations of `dtype`.

        bias [N] in `dtype`, or None. Mutates nothing; the packed form may keep references to the
        tensors. `linear` then gives x' @ weight.T + bias, where x' is x as `weight.activations`
        rounds it. Called at load, once a layer; may allocate.
        Source: Dettmers et al. 2022, section 2; Frantar et al. 2022 and Lin et al. 2023 for groups.
        """
        raise NotImplementedError

    def quantize_linear(self, weight: Tensor, bits: int, group_size: int) -> QuantizedWeight | None:
        """Quantizes weights [N, K] at load; None: the core does it in plain torch, more slowly.

        weight in any floating dtype; mutates nothing. `bits` 8 with group_size 0: `int8`; 4 with a
        group_size that divides K: `int4`. The numbers are part of the arithmetic: each operation is
        in float32 and rounded once, nothing is fused, and every device gives the same bits.

        8 bits, activations `token`, no zeros: scale = max |w| / 127 of each row, code =
        round(w / scale) + 128, halves to even; a scale of 0 gives the code 128. scales float32.

        4 bits, activations `group`: low = min(w, 0) and high = max(w, 0) over each group. For each
        part p of 1, 0.95, 0.9, 0.85, 0.8, 0.75: scale = (high - low) * (p / 15) rounded to
        bfloat16, 0 below the least normal float32; inverse = 1 / scale, or 0; zero = round(-low * p
        * inverse) and code = round(w * inverse) + zero, both clamped to 0..15; error = sum of
        ((code - zero) * scale - w)^2, summed by adding the second half of the terms to the first
        until one is left. The first part of the least error is kept. scales bfloat16, zeros uint8.
        Source: Dettmers et al. 2022, section 2; Frantar et al. 2022 for groups.
        """
        return None

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight over the last dimension.

        x [..., H]; weight [H]; returns x's shape and dtype.


        Source: Zhang & Sennrich 2019, eq. 4.
        """

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds `x` [T, H] into `residual` [T, H], in place, and returns the RMS norm of the sum.

        The sum is rounded to residual's dtype before it is normalised. Mutates `residual` alone.
        """

    @abstractmethod
    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        """act(x[:, :I]) * x[:, I:] for x [T, 2I]; returns [T, I].

        `kind` is `silu`, `gelu_tanh` or `gelu`.

        Source: Shazeer 2020 (GLU variants), eq. 5; Hendrycks & Gimpel 2016 for both forms of GELU.
        """

    @abstractmethod
    def rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool
    ) -> None:
        """Rotates the first 2F features of every head of q [T, Hq, D] and k [T, Hk, D], in place.

        cos, sin float32 [T, F], 2F <= D. Pairs are (i, i + F), or (2i, 2i + 1) where
        `is_interleaved`. Heads may be strided views; the last dimension is dense. Source: Su et al.
        2021, eq. 34.
        """

    @abstractmethod
    def soft_cap(self, x: Tensor, cap: float) -> None:
        """X = cap * tanh(x / cap), in place. Source: Gemma 2 report, section 2."""

    def fuse_layer(
        self, parts: LayerParts, attention: AttentionBackend | None
    ) -> FusedLayer | None:
        """A whole layer for one call; None: it is computed operator by operator. Asked at load.

        Its result is what this device's operators give one by one, and `fuse_mixer` of its mixers:
        bit for bit, but for sigmoids of gates, which may be rounded otherwise. `attention` is what
        this device gave for the layer, None where no mixing attends. Layers with mixers are for
        devices that claim `state_slots`; their caches hold `conv` and `state`, as pages of
        `FusedMixer`.
        """
        return None

    def chain_layers(
        self, layers: Sequence[FusedLayer], places: Sequence[Sequence[MixingPlace]]
    ) -> FusedLayers | None:
        """One call for layers that follow each other, all from the call above.

        places: of each layer, for each of its mixings. None: operator by operator. Asked at load;
        the result serves every step.
        """
        return None

    def fuse_mixer(self, parts: MixerParts) -> FusedMixer | None:
        """One call for a mixer; None: it is computed operator by operator. Asked at load.

        For devices that claim `state_slots`. Where it is there, it serves every step.
        """
        return None

    def fuse_delta_mixer(self, parts: DeltaMixerParts) -> FusedMixer | None:
        """As `fuse_mixer`, for a mixer of a gated delta net."""
        return None

    # --- adapters (extension `lora`) ------------------------------------------------------------

    def add_lora(
        self, out: Tensor, x: Tensor, down: Tensor, up: Tensor, adapter_ids: Tensor
    ) -> None:
        """Adds what each token's adapter contributes to a linear layer's result, in place.

        out [T, N], x [T, K], down [A, r, K] and up [A, N, r] of A adapters, scaling included, all
        of one dtype; adapter_ids int64 [T], -1: none. out[t] += up[a] @ (down[a] @ x[t]). Both
        products accumulate in float32, the one between is rounded to the dtype. Rows without an
        adapter keep their bits. Source: Hu et al. 2021, eq. 3.
        """
        raise NotImplementedError

    # --- latent attention (extension `mla`) -----------------------------------------------------

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """A projection of its own for each head: out[t, m] = weight[m] @ x[t, m].

        x [T, M, K], a view with a dense last dimension; weight [M, N, K]; returns [T, M, N],
        contiguous, of x's dtype. Accumulates in float32. Source: DeepSeek-V2 report, appendix C.
        """
        raise NotImplementedError

    # --- experts (extension `moe`) --------------------------------------------------------------

    def route_experts(
        self, logits: Tensor, spec: RoutingSpec, correction_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which experts each token goes to: (weights float32 [T, k], expert ids int64 [T, k]).

        logits float32 [T, E]; correction_bias float32 [E] or None. The order of a token's k experts
        is free.
        """
        raise NotImplementedError

    def pack_router(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """As `pack_linear`, for float32 [E, H] of few outputs that every step multiplies by."""
        return self.pack_linear(weight, bias)

    def pack_experts(self, weights: ExpertWeights) -> PackedExperts:
        """Packs the experts of a layer for `experts`, at load. Mutates nothing; may keep them."""
        raise NotImplementedError

    def pack_quantized_experts(self, weights: QuantizedExperts, dtype: str) -> PackedExperts:
        """As `pack_experts` from codes, for activations of `dtype`; claimed as `quantized_experts`.

        `experts` rounds the inputs of both products as the weights say, those of the second after
        the activation was rounded to the dtype. Mutates nothing.
        """
        raise NotImplementedError

    def experts(
        self,
        x: Tensor,
        packed: PackedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        *,
        weighs_input: bool = False,
    ) -> Tensor:
        """The weighted sum of each token's experts: [T, H] in x's dtype.

        x [T, H]; weights float32 [T, k]; expert_ids int64 [T, k], distinct in a row. out[t] = sum_i
        w[t, i] * down(act(gate_up(x[t]))) of expert e[t, i]; with `weighs_input` the weight
        multiplies x[t] instead. Products accumulate in float32, the activation is rounded to the
        dtype, and the sum over experts is in float32.
        Source: Shazeer et al. 2017, eq. 1.
        """
        raise NotImplementedError

    # --- recurrence (extension `recurrent`) -----------------------------------------------------

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        sequences: Sequences,
        *,
        activation: str = "",
    ) -> Tensor:
        """A convolution over the last W tokens of each channel of each sequence: [T, C].

        x [T, C]; weight [C, W]; bias [C] or None; states [S, C, W - 1] of x's dtype: the inputs
        before each sequence's first, oldest first (zeros at a beginning); overwritten by the last
        W - 1 inputs. out[t] = act(sum_w weight[:, w] * input[t - W + 1 + w] + bias); `activation`
        is empty or `silu`. Source: Gu & Dao 2023, section 3.4.
        """
        raise NotImplementedError

    def selective_scan(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        states: Tensor,
        sequences: Sequences,
    ) -> Tensor:
        """The scan of Mamba: [T, C] in x's dtype.

        x [T, C]; dt float32 [T, C], positive; a float32 [C, N]; b, c [T, N]; d float32 [C] or None;
        states float32 [S, C, N], overwritten by those after the last tokens. For each sequence:
        h = exp(dt[t] a) h + dt[t] b[t] x[t]; out[t] = h . c[t] + d x[t].
        Source: Gu & Dao 2023, eq. 2 and Algorithm 2.
        """
        raise NotImplementedError

    def ssd_scan(
        self,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        states: Tensor,
        sequences: Sequences,
    ) -> Tensor:
        """The scan of Mamba-2: [T, M, P] in x's dtype, for M heads of P channels.

        x [T, M, P]; dt float32 [T, M], positive; a float32 [M]; b, c [T, G, N], head m reads group
        m // (M // G); d float32 [M] or None; states float32 [S, M, P, N], overwritten.
        h = exp(dt[t] a) h + dt[t] x[t] b[t]^T; out[t] = h c[t] + d x[t].
        Source: Dao & Gu 2024, section 2.
        """
        raise NotImplementedError

    def gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor,
        states: Tensor,
        sequences: Sequences,
    ) -> Tensor:
        """Linear attention that overwrites what it recalls: [T, M, Dv] in v's dtype.

        q, k [T, G, D] and v [T, M, Dv], head m reads group m // (M // G); q comes scaled, q and k
        normalised where the model does so; decay float32 [T, M], the logarithm of what is kept;
        beta float32 [T, M]; states float32 [S, M, D, Dv], overwritten. h = exp(decay[t]) h;
        h = h + k[t] (beta[t] (v[t] - h^T k[t]))^T; out[t] = h^T q[t].
        Source: Yang, Kautz & Hatamizadeh 2024 (Gated DeltaNet), eq. 10.
        """
        raise NotImplementedError

    # --- logits ---------------------------------------------------------------------------------

    @abstractmethod
    def apply_penalties(
        self,
        logits: Tensor,
        rows: Tensor,
        token_ids: Tensor,
        output_counts: Tensor,
        settings: Tensor,
    ) -> None:
        """Penalises tokens that a row has seen, in place. logits float32 [R, V].

        One entry for each distinct (row, token) seen in prompt or output: rows, token_ids int64 [M]
        and output_counts float32 [M], how often the token stands in the output (0: in the prompt
        alone). settings float32 [R, 3] holds (repetition, frequency, presence). In this order: l =
        l / repetition if l > 0 else l * repetition; l -= frequency * count; l -= presence where
        count > 0.
        Source: Keskar et al. 2019, section 4.1; OpenAI's API reference for the other two.
        """

    @abstractmethod
    def add_bias(self, logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
        """logits[rows, token_ids] += bias, in place; entries are distinct. -inf forbids a token.

        logits float32 [R, V]; rows, token_ids int64 [M]; bias float32 [M].
        """

    @abstractmethod
    def keep_only(
        self, logits: Tensor, rows: Tensor, row_of_entry: Tensor, token_ids: Tensor
    ) -> None:
        """Sets -inf everywhere in `rows` but at (row_of_entry, token_ids), in place.

        logits float32 [R, V]; rows int64 [K], distinct; row_of_entry, token_ids int64 [M].
        """

    def apply_token_mask(self, logits: Tensor, rows: Tensor, mask: Tensor) -> None:
        """Sets -inf where a row's mask forbids a token, in place.

        logits float32 [R, V]; rows int64 [K], distinct; mask int32 [K, ceil(V / 32)]: bit i % 32 of
        word i // 32 is set where token i is allowed. Other rows stay as they are.
        """
        raise NotImplementedError

    def most_likely(self, logits: Tensor, out: Tensor, is_broken: Tensor) -> bool:
        """The greedy choice straight from the head's logits; False: not offered, nothing written.

        For steps in which every row is greedy and nobody changes or reports a logit. logits [R, V]
        in the model's dtype, not mutated; out int64 [R] becomes the id of the largest, the lowest
        on a tie; is_broken bool [R] becomes whether a logit is NaN or the largest is not finite,
        whose id is 0. Where this is not offered, the core widens logits, looks at the largest and
        calls `sample`: three passes instead of one.
        """
        return False

    @abstractmethod
    def sample(self, logits: Tensor, settings: SamplingTensors) -> Tensor:
        """One token a row: int64 [R]. logits float32 [R, V] may be overwritten.

        A row of temperature 0 takes the largest logit, the lowest id on a tie. Others: p =
        softmax(logits / temperature); keep the top_k largest (all that tie with the last), then of
        these, renormalised, the smallest set of largest probabilities whose sum reaches top_p (ties
        by lowest id), then those of at least min_p times the largest; the answer is the first id,
        in the order of ids, at which the running sum of the kept p exceeds uniform * their sum.
        Source: Fan et al. 2018 (top-k), Holtzman et al. 2019 (top-p), Nguyen et al. 2024 (min-p).
        """

    @abstractmethod
    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> SampledLogprobs:
        """Log-probabilities of the chosen tokens, their ranks, and the num_top best.

        log_softmax of logits float32 [R, V] at token_ids int64 [R]. Mutates nothing.
        """
