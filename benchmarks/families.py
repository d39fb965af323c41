"""How fast each native family is for the weights that a token moves, beside the Llama path.

A family's figure is (steps/s * bytes that a step moves), over that of the Llama row measured in the
same round. A step reads the weights that are active, and it reads and writes the states of
recurrent layers, whose size does not depend on the text; keys and values of these short texts are
left out. With `running` requests decoded at once, one token each, the bytes are

    itemsize * (parameters outside of experts + parameters of experts * share)
    share = 1 - (1 - chosen / experts) ** running

of weights, which is what tokens touch that choose their experts evenly; for one request the share
is chosen / experts, the active weights of a token. Tables that are only looked up do not count; an
embedding table that is the head too counts once.

With `--quantization` a weight counts as its codes with their scales and zeros, the head in 8 bits.

Layers are as wide as those of a model with 1B parameters; there are few of them.

python benchmarks/families.py --families qwen2,mixtral,mamba
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from quire.benchmarks.recording import Measurement, Ratio, Record
from quire.core.interface import QuireError

_BASE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 8192,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 2816,
}  # fmt: skip
_GROUPED: dict[str, Any] = {
    **_EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "moe_intermediate_size": 1920,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_GROUPED, "num_key_value_heads": 32, "kv_lora_rank": 512, "q_lora_rank": 1024,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "mistral": ("mistral", {"sliding_window": 1024}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"head_dim": 64}),
    "gemma3": ("gemma3_text", {"head_dim": 64}),
    "mixtral": (
        "mixtral", {"intermediate_size": 2816, "num_local_experts": 8, "num_experts_per_tok": 2}
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {**_EXPERTS, "moe_intermediate_size": 1920, "shared_expert_intermediate_size": 1920},
    ),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 64}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 2816}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64,
            "intermediate_size": 2816,
        },
    ),
    "glm4-moe": ("glm4_moe", {**_GROUPED, "head_dim": 64}),
    "deepseek-v2": (
        "deepseek_v2", {**_LATENT, "topk_method": "group_limited_greedy", "q_lora_rank": None}
    ),
    "deepseek-v3": ("deepseek_v3", {**_LATENT}),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 64, "intermediate_size_mlp": 5632, "intermediate_size": 2816,
            "num_local_experts": 8, "num_experts_per_tok": 1,
        },
    ),
    "mamba": ("mamba", {"num_hidden_layers": 10, "state_size": 16}),
    "mamba2": (
        "mamba2",
        {
            "num_hidden_layers": 10, "state_size": 128, "num_heads": 64, "head_dim": 64,
            "n_groups": 1,
        },
    ),
    "jamba": (
        "jamba",
        {
            "num_experts": 4, "num_experts_per_tok": 1, "attn_layer_period": 3,
            "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        },
    ),
    "falcon-h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 2048, "mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 64,
            "head_dim": 64,
        },
    ),
    "bamba": (
        "bamba",
        {
            "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1,
            "attn_layer_indices": [1, 4],
        },
    ),
    "qwen3-next": (
        "qwen3_next",
        {
            **_EXPERTS, "moe_intermediate_size": 1920, "shared_expert_intermediate_size": 1920,
            "head_dim": 64, "full_attention_interval": 3, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
    ),
    "qwen3.5": (
        "qwen3_5_text",
        {
            "head_dim": 64, "full_attention_interval": 3, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
    ),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        {
            **_EXPERTS, "moe_intermediate_size": 1920, "shared_expert_intermediate_size": 1920,
            "head_dim": 64, "full_attention_interval": 3, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
    ),
}  # fmt: skip
"""A row: `model_type`, and what differs from the base. A family more is a line more."""

_LLAMA = "llama"
_BITS = {"int8": 8.0, "int4": 4.0 + (16 + 8) / 64}
"""Of a weight: of int4, groups of 64 have a scale of 16 bits and a zero of 8."""
_EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")


def main(
    families: Annotated[str, typer.Option(help="comma-separated; none: all")] = "",
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    quantization: Annotated[str | None, typer.Option(help="int8, int4; none: as made")] = None,
    prompt: Annotated[int, typer.Option(help="tokens of each prompt")] = 16,
    tokens: Annotated[int, typer.Option(help="output tokens of each")] = 32,
    rounds: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int | None, typer.Option(help="of the host; none: the backend's")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Decodes with each family and with Llama in turn; prints bytes a second."""
    names = [name for name in families.split(",") if name] or list(FAMILIES)
    record = Record(
        name=f"families_{device}_{quantization or dtype}",
        settings={
            "families": names, "device": device, "dtype": dtype, "quantization": quantization,
            "prompt": prompt, "tokens": tokens, "rounds": rounds, "threads": threads,
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start = partial(
            _Subject,
            folder=Path(folder),
            device=device,
            dtype=dtype,
            quantization=quantization,
            threads=threads,
        )
        llama = start(_LLAMA)
        for name in names:
            if name == _LLAMA:
                continue
            try:
                subject = start(name)
            except (QuireError, ValueError) as error:  # ValueError: transformers, of a shape
                record.facts[name] = f"did not take part: {error}"
                continue
            for running in (1, 8):
                _compare(record, subject, llama, running, prompt, tokens, rounds)
            subject.close()
            # After each: a run over all takes long, and what was measured stays if it is ended.
            print(f"{name} is in {record.write(out)}", flush=True)
        llama.close()
    record.show()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """Sizes of a model's weights, in bytes."""

    expert_bytes: int
    other_bytes: int
    chosen_share: float
    """Of the experts, by one token."""
    state_bytes: int = 0
    """Of all recurrent layers, for one request."""

    def moved_bytes(self, running: int) -> float:
        """What a step of so many tokens moves; the module says how it is reckoned."""
        chosen = 1 - (1 - self.chosen_share) ** running
        states = 2 * self.state_bytes * running
        return self.other_bytes + self.expert_bytes * chosen + states


class _Subject:
    """A family's model with made-up weights, and what its figure needs."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        device: str,
        dtype: str,
        quantization: str | None,
        threads: int | None,
    ) -> None:
        from quire import LLM

        self.name = name
        place = folder / name
        place.mkdir()
        weights = _write_config(name, place, dtype, quantization)
        self._weights = replace(weights, state_bytes=_state_bytes(place))
        self._llm: Any = LLM(
            model=str(place), device=device, dtype=dtype, quantization=quantization,
            load_format="dummy",
            model_impl="native", max_num_seqs=8, max_model_len=256, num_threads=threads,
            enable_prefix_caching=False, cache_memory_bytes=1 << 30,
        )  # fmt: skip

    def moved_bytes(self, running: int) -> float:
        """By a step of so many requests."""
        return self._weights.moved_bytes(running)

    def rate(self, running: int, prompt: int, tokens: int, round_number: int) -> float:
        """Decoding steps/s * bytes moved, in GB/s.

        The time of prompts alone, with one token each, is taken off.
        """
        short = self._wave(running, prompt, 1, round_number)
        whole = self._wave(running, prompt, tokens + 1, round_number)
        return tokens * self.moved_bytes(running) / (whole - short) / 1e9

    def _wave(self, running: int, prompt: int, tokens: int, round_number: int) -> float:
        from quire import SamplingParams

        rng = np.random.default_rng(round_number)
        prompts = [
            {"prompt_token_ids": rng.integers(10, 1000, size=prompt).tolist()}
            for _ in range(running)
        ]
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    def close(self) -> None:
        """Ends its engine."""
        self._llm.close()


def _compare(
    record: Record,
    subject: _Subject,
    llama: _Subject,
    running: int,
    prompt: int,
    tokens: int,
    rounds: int,
) -> None:
    """Rounds in turn, so that whatever else the machine does meets both."""
    rates: dict[str, list[float]] = {subject.name: [], llama.name: []}
    for round_number in range(rounds + 1):
        for one in (subject, llama):
            rates[one.name].append(one.rate(running, prompt, tokens, round_number))
    work = f"{running} at once, {subject.moved_bytes(running) / 1e6:.0f} MB a step"
    mine, theirs = (tuple(rates[name][1:]) for name in (subject.name, llama.name))
    record.measurements.append(
        Measurement(work=work, subject=subject.name, unit="GB/s", values=mine)
    )
    record.ratios.append(
        Ratio(
            work=work,
            better=subject.name,
            worse=llama.name,
            values=tuple(a / b for a, b in zip(mine, theirs, strict=True)),
        )
    )


def _write_config(name: str, place: Path, dtype: str, quantization: str | None = None) -> _Weights:
    """Writes config.json of a family; the sizes of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differences = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**_BASE, **differences})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    settings = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype}
    (place / "config.json").write_text(json.dumps(settings))
    bits = _BITS.get(quantization or "", getattr(torch, dtype).itemsize * 8)
    return _weights_of(model, config, bits, 8 if quantization else bits)


def _state_bytes(place: Path) -> int:
    import torch

    from quire.core.models.registry import describe

    def size_of(name: str) -> int:
        return int(getattr(torch, name).itemsize)

    groups = describe(place).attention_groups
    return sum(
        group.bytes_per_token(size_of) * group.spec.block_size
        for group in groups
        if group.spec.kind == "recurrent"
    )


def _weights_of(model: Any, config: Any, bits: float, head_bits: float) -> _Weights:
    counts = (getattr(config, key, None) for key in _EXPERT_COUNTS)
    num_experts = next((count for count in counts if count), 1)
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    expert_bits = other_bits = 0.0
    for key, parameter in model.named_parameters():
        if ".experts." in key:
            expert_bits += parameter.numel() * bits
        elif parameter is head:
            other_bits += parameter.numel() * head_bits
        elif parameter is not table:
            other_bits += parameter.numel() * bits
    return _Weights(
        expert_bytes=int(expert_bits / 8),
        other_bytes=int(other_bits / 8),
        chosen_share=getattr(config, "num_experts_per_tok", num_experts) / num_experts,
    )


if __name__ == "__main__":
    typer.run(main)
