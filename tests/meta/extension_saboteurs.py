"""Backends whose extensions are broken on purpose, each in one way."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch
from saboteurs import Saboteur, make_device, with_worker

from quire.backends.reference import ReferenceAttention, ReferenceOps
from quire.backends.reference.cache_codec import CacheCodec
from quire.core.models.weights.quantization import quantize_int4
from quire.core.worker.worker import DefaultWorker

CLAIMS = {
    "features": frozenset(
        {
            "lora",
            "moe",
            "quantized_experts",
            "recurrent",
            "speculation",
            "state_slots",
            "cache_rows",
        }
    ),
    "quantizations": frozenset({"int8", "int4", "fp8"}),
    "attention_kinds": frozenset({"causal", "sliding_window", "chunked", "mla"}),
    "cache_dtypes": ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"),
}


class OneAdapterForAll(ReferenceOps):
    def add_lora(self, out, x, down, up, adapter_ids):
        super().add_lora(out, x, down, up, adapter_ids.clamp(max=0))


class PlainIsTheFirst(ReferenceOps):
    def add_lora(self, out, x, down, up, adapter_ids):
        super().add_lora(out, x, down, up, adapter_ids.clamp(min=0))


class SharesTheFirstHead(ReferenceOps):
    def head_linear(self, x, weight):
        return super().head_linear(x, weight[:1].expand_as(weight))


class TiesToTheHighestExpert(ReferenceOps):
    def route_experts(self, logits, spec, correction_bias):
        bias = None if correction_bias is None else correction_bias.flip(-1)
        weights, ids = super().route_experts(logits.flip(-1), spec, bias)
        return weights, spec.num_experts - 1 - ids


class WeighsWithTheBias(ReferenceOps):
    def route_experts(self, logits, spec, correction_bias):
        weights, ids = super().route_experts(logits, spec, correction_bias)
        return (weights if correction_bias is None else weights + correction_bias[ids]), ids


class IgnoresGroups(ReferenceOps):
    def route_experts(self, logits, spec, correction_bias):
        free = replace(spec, num_groups=1, num_kept_groups=1)
        return super().route_experts(logits, free, correction_bias)


class ForgetsRenormalising(ReferenceOps):
    def route_experts(self, logits, spec, correction_bias):
        return super().route_experts(logits, replace(spec, is_renormalised=False), correction_bias)


class DropsCrowdedTokens(ReferenceOps):
    def experts(self, x, packed, weights, expert_ids, *, weighs_input=False):
        capacity = 2 * expert_ids.numel() // packed.num_experts // 2
        kept = weights.clone()
        for expert in range(packed.num_experts):
            tokens, slots = (expert_ids == expert).nonzero(as_tuple=True)
            kept[tokens[capacity:], slots[capacity:]] = 0
        return super().experts(x, packed, kept, expert_ids, weighs_input=weighs_input)


class SwapsGateAndUp(ReferenceOps):
    def pack_experts(self, weights):
        gate, up = weights.gate_up.chunk(2, dim=1)
        return super().pack_experts(replace(weights, gate_up=torch.cat((up, gate), dim=1)))


class RoundsTheFirstInputsAlone(ReferenceOps):
    def pack_quantized_experts(self, weights, dtype):
        down = [replace(weight, activations="none") for weight in weights.down]
        return super().pack_quantized_experts(replace(weights, down=down), dtype)


class ReadsTheFirstBlockScaleAlone(ReferenceOps):
    def pack_quantized_experts(self, weights, dtype):
        gate_up = [
            replace(weight, scales=weight.scales[:, :1].expand_as(weight.scales))
            if weight.encoding == "float8_e4m3fn"
            else weight
            for weight in weights.gate_up
        ]
        return super().pack_quantized_experts(replace(weights, gate_up=gate_up), dtype)


class LooksAcrossSequences(ReferenceOps):
    def causal_conv1d(self, x, weight, bias, states, sequences, *, activation=""):
        states[1:] = states[:1].expand_as(states[1:]).clone()
        return super().causal_conv1d(x, weight, bias, states, sequences, activation=activation)


class StateBackToFront(ReferenceOps):
    def causal_conv1d(self, x, weight, bias, states, sequences, *, activation=""):
        out = super().causal_conv1d(x, weight, bias, states, sequences, activation=activation)
        states.copy_(states.flip(-1))
        return out


class StartsFromNothing(ReferenceOps):
    def selective_scan(self, x, dt, a, b, c, d, states, sequences):
        states.zero_()
        return super().selective_scan(x, dt, a, b, c, d, states, sequences)


class StaysInItsBlock(ReferenceOps):
    def gated_delta_rule(self, q, k, v, decay, beta, states, sequences):
        if (slots := sequences.slots) is not None:
            targets = torch.where(slots.sources < 0, slots.targets, slots.sources)
            sequences = replace(sequences, slots=replace(slots, targets=targets))
        return super().gated_delta_rule(q, k, v, decay, beta, states, sequences)


class KeepsHalfStates(ReferenceOps):
    def ssd_scan(self, x, dt, a, b, c, d, states, sequences):
        out = super().ssd_scan(x, dt, a, b, c, d, states, sequences)
        states.copy_(states.bfloat16())
        return out


class GroupsInTurn(ReferenceOps):
    def ssd_scan(self, x, dt, a, b, c, d, states, sequences):
        repeats = x.shape[1] // b.shape[1]
        b, c = (y.repeat(1, repeats, 1) for y in (b, c))
        return super().ssd_scan(x, dt, a, b, c, d, states, sequences)


class RecallsBeforeDecay(ReferenceOps):
    def gated_delta_rule(self, q, k, v, decay, beta, states, sequences):
        late = torch.cat((decay[1:], torch.zeros_like(decay[:1])))
        return super().gated_delta_rule(q, k, v, late, beta, states, sequences)


class ScalesByTheLatent(ReferenceAttention):
    def __init__(self, spec, torch_device="cpu"):
        is_latent = spec.kind == "mla"
        scale = spec.v_head_size**-0.5 if is_latent else spec.scale
        super().__init__(replace(spec, scale=scale), torch_device)


class WritesOneSlotOn(ReferenceAttention):
    def write(self, k, v, cache, slot_mapping):
        is_last = slot_mapping == slot_mapping.max()
        super().write(k, v, cache, torch.where(is_last, slot_mapping + 1, slot_mapping))


class ReadsInTheOrderOfSlots(ReferenceAttention):
    def read_keys(self, cache, slots):
        return super().read_keys(cache, slots.sort().values)


class SwapsNibbles(ReferenceOps):
    def pack_quantized_linear(self, weight, bias, dtype):
        if weight.bits == 4:
            weight = replace(weight, codes=weight.codes >> 4 | weight.codes << 4)
        return super().pack_quantized_linear(weight, bias, dtype)


class KeepsActivations(ReferenceOps):
    def pack_quantized_linear(self, weight, bias, dtype):
        return super().pack_quantized_linear(replace(weight, activations="none"), bias, dtype)


class RoundsFloatsToWholeNumbers(ReferenceOps):
    """Takes the scale of int8 for the activations of 8-bit floats."""

    def linear(self, x, packed):
        if getattr(packed.payload, "encoding", "integer") != "integer":
            packed = replace(packed, payload=replace(packed.payload, encoding="integer"))
        return super().linear(x, packed)


class ReadsTheOtherFlavour(ReferenceOps):
    """The bits as AMD's own floats have them: half of every number."""

    def pack_quantized_linear(self, weight, bias, dtype):
        if weight.encoding != "integer":
            weight = replace(weight, scales=weight.scales / 2)
        return super().pack_quantized_linear(weight, bias, dtype)


class ForgetsZeros(ReferenceOps):
    def pack_quantized_linear(self, weight, bias, dtype):
        return super().pack_quantized_linear(replace(weight, zeros=None), bias, dtype)


class TakesTheWholeRange(ReferenceOps):
    def quantize_linear(self, weight, bits, group_size):
        if bits == 8:
            return None
        quantized = quantize_int4(weight, group_size)
        grouped = weight.float().unflatten(1, (-1, group_size))
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        return replace(quantized, scales=((high - low) / 15).bfloat16())


class WrapsAround(CacheCodec):
    def write(self, tensors, name, slots, new):
        limit = torch.finfo(self._dtype).max
        super().write(tensors, name, slots, torch.where(new.abs() > limit, -new / 8, new))


class OneScaleForAllHeads(CacheCodec):
    def write(self, tensors, name, slots, new):
        super().write(tensors, name, slots, new)
        scales = tensors[f"{name}_scale"].flatten(0, 1)
        scales[slots] = scales[slots].amax(-1, keepdim=True).expand(-1, scales.shape[-1])


class BelievesEveryGuess(DefaultWorker):
    def execute(self, batch):
        result = super().execute(batch)
        for name, tokens in zip(batch.request_ids, result.sampled_token_ids, strict=True):
            guessed = batch.draft_token_ids.get(name)
            if guessed and len(tokens) == 1:
                tokens[:] = [guessed[0]]
        return result


class RefusesEveryGuess(DefaultWorker):
    def submit(self, batch):
        counts = [
            count - len(batch.draft_token_ids.get(name, ()))
            for name, count in zip(batch.request_ids, batch.num_new_tokens, strict=True)
        ]
        plain = msgspec.structs.replace(batch, draft_token_ids={}, num_new_tokens=counts)
        return super().submit(plain)


def _with_codec(codec: type[CacheCodec]) -> type[ReferenceAttention]:
    class Attention(ReferenceAttention):
        def __init__(self, spec, torch_device="cpu"):
            super().__init__(spec, torch_device)
            self._codec = codec(spec.cache_dtype)

    return Attention


_EXT = "test_extensions.py::test_"


def _ops(cls: type[ReferenceOps], test: str, words: str) -> Saboteur:
    return Saboteur(
        name=cls.__name__,
        device=lambda: make_device(ops=cls, **CLAIMS),
        test=f"{_EXT}{test}",
        words=words,
    )


_QUANTIZED = "quantization_numerics[pack_quantized_linear"
_ROUTE = "moe_numerics[route_experts"
EXTENSION_SABOTEURS: tuple[Saboteur, ...] = (
    _ops(SwapsNibbles, f"{_QUANTIZED}-int4-float32-normal]", "low half of byte j"),
    _ops(KeepsActivations, f"{_QUANTIZED}-int8-float32-normal]", "rounded as the weight says"),
    _ops(ForgetsZeros, f"{_QUANTIZED}-int4-zeros-bfloat16-large]", "Codes are unsigned"),
    _ops(
        RoundsFloatsToWholeNumbers,
        "fp8_weights_numerics[groups-float32-normal]",
        "rounded to e4m3 as the weight says",
    ),
    _ops(ReadsTheOtherFlavour, "fp8_weights_numerics[rows-bfloat16-normal]", "AMD's own flavour"),
    _ops(
        TakesTheWholeRange,
        "quantization_quantizes_to_the_defined_bits[int4-g32-float32-normal]",
        "of the definition",
    ),
    _ops(OneAdapterForAll, "lora_numerics[add_lora-mixed-float32-normal]", "its own adapter"),
    _ops(
        PlainIsTheFirst,
        "lora_rows_without_an_adapter_keep_their_bits[float32]",
        "requests of the plain model",
    ),
    _ops(SharesTheFirstHead, "mla_numerics[head_linear-up-float32-normal]", "weight[m] of its own"),
    _ops(TiesToTheHighestExpert, f"{_ROUTE}-softmax-float32-normal]", "ties go to the lowest id"),
    _ops(WeighsWithTheBias, f"{_ROUTE}-corrected-float32-normal]", "does not weigh"),
    _ops(IgnoresGroups, f"{_ROUTE}-grouped-float32-normal]", "the scale comes last"),
    _ops(ForgetsRenormalising, f"{_ROUTE}-softmax-float32-large]", "route_experts"),
    _ops(DropsCrowdedTokens, "moe_numerics[experts-crowded-float32-normal]", "Every token's"),
    _ops(SwapsGateAndUp, "moe_numerics[experts-silu-bfloat16-normal]", "gate rows come before"),
    _ops(
        RoundsTheFirstInputsAlone,
        "moe_experts_in_codes[float32]",
        "The inputs of both products are rounded",
    ),
    _ops(
        ReadsTheFirstBlockScaleAlone,
        "moe_experts_in_float8[float32]",
        "The inputs of both products are rounded",
    ),
    _ops(
        LooksAcrossSequences,
        "recurrent_numerics[causal_conv1d-mixed-float32-normal]",
        "sequences do not see each other",
    ),
    _ops(
        StateBackToFront, "recurrent_numerics[causal_conv1d-decode-float16-normal]", "oldest first"
    ),
    _ops(
        StartsFromNothing,
        "recurrent_numerics[selective_scan-mixed-float32-normal]",
        "decays before the new input",
    ),
    _ops(
        KeepsHalfStates,
        "recurrent_numerics[ssd_scan-decode-bfloat16-normal]",
        "the state is float32",
    ),
    _ops(
        StaysInItsBlock,
        "recurrent_states_in_pages[gated_delta_rule-float32]",
        "leaves its last in states[targets[s]]",
    ),
    _ops(GroupsInTurn, "recurrent_numerics[ssd_scan-mixed-float32-normal]", "m // (heads"),
    _ops(
        RecallsBeforeDecay,
        "recurrent_numerics[gated_delta_rule-mixed-float32-normal]",
        "Decay first",
    ),
    Saboteur(
        name="ScalesByTheLatent",
        device=lambda: make_device(attention=ScalesByTheLatent, **CLAIMS),
        test=f"{_EXT}mla_mixed_batch[r32-p16-float32]",
        words="all of it is multiplied by the query",
    ),
    Saboteur(
        name="WritesOneSlotOn",
        device=lambda: make_device(attention=WritesOneSlotOn, **CLAIMS),
        test=f"{_EXT}mla_rows_without_attention[r32-p16-float32]",
        words="does not give the keys that were written",
    ),
    Saboteur(
        name="ReadsInTheOrderOfSlots",
        device=lambda: make_device(attention=ReadsInTheOrderOfSlots, **CLAIMS),
        test=f"{_EXT}mla_rows_without_attention[r32-p16-float32]",
        words="in the order asked",
    ),
    Saboteur(
        name="WrapsAround",
        device=lambda: make_device(attention=_with_codec(WrapsAround), **CLAIMS),
        test=f"{_EXT}fp8_cache_saturates[e4m3-float32]",
        words="saturate",
    ),
    Saboteur(
        name="OneScaleForAllHeads",
        device=lambda: make_device(attention=_with_codec(OneScaleForAllHeads), **CLAIMS),
        test=f"{_EXT}int8_cache_mixed_batch[float32]",
        words="the token's own scale",
    ),
    Saboteur(
        name="BelievesEveryGuess",
        device=lambda: with_worker(BelievesEveryGuess, **CLAIMS),
        test=f"{_EXT}speculation_changes_no_token[wrong-greedy-float32]",
        words="kept only where the worker would have",
    ),
    Saboteur(
        name="RefusesEveryGuess",
        device=lambda: with_worker(RefusesEveryGuess, **CLAIMS),
        test=f"{_EXT}speculation_changes_no_token[right-greedy-float32]",
        words="right guesses saved no step",
    ),
)
"""Each is caught by its test, with its words."""
