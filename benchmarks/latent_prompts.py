"""How fast prompts over a latent cache are, expanded and absorbed, in one run.

One model with the attention of DeepSeek-V2-Lite and made-up weights, in two engines: as it is, and
with `deterministic`, under which a prompt is computed as decoding is. That setting changes nothing
else on the CPU. A figure is a prompt's tokens over the time until its first token.

Of a pair of tokens and a head, attention multiplies 2R + P = 1088 numbers absorbed and
plain + P + value = 320 expanded; the projections between the latent and the heads are as many in
both.

python benchmarks/latent_prompts.py
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from quire.benchmarks.recording import Measurement, Ratio, Record

_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 8192,
    "max_position_embeddings": 16384, "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "rms_norm_eps": 1e-6,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "first_k_dense_replace": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 256, "topk_method": "greedy",
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def main(
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    lengths: Annotated[str, typer.Option(help="comma-separated")] = "128,512,2048,4096",
    rounds: Annotated[int, typer.Option()] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Computes prompts in both forms in turn; prints tokens a second."""
    sizes = [int(length) for length in lengths.split(",")]
    record = Record(
        name=f"latent_prompts_{device}",
        settings={"device": device, "dtype": dtype, "lengths": sizes, "rounds": rounds},
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**_CONFIG, "dtype": dtype}))
        llms = {
            "expanded": _start(folder, device, dtype, max(sizes)),
            "absorbed": _start(folder, device, dtype, max(sizes), deterministic=True),
        }
        for length in sizes:
            _compare(record, llms, length, rounds)
        for llm in llms.values():
            llm.close()
    print(f"written to {record.write(out)}")
    record.show()


def _start(folder: str, device: str, dtype: str, longest: int, **settings: Any) -> Any:
    from quire import LLM

    return LLM(
        model=folder, device=device, dtype=dtype, load_format="dummy", model_impl="native",
        max_num_seqs=4, max_model_len=longest + 16, max_num_batched_tokens=2048,
        enable_prefix_caching=False, cache_memory_bytes=1 << 29, **settings,
    )  # fmt: skip


def _compare(record: Record, llms: dict[str, Any], length: int, rounds: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in llms}
    for round_number in range(rounds + 1):
        for name, llm in llms.items():
            rates[name].append(length / _first_token(llm, length, round_number))
    work = f"a prompt of {length}"
    for name, values in rates.items():
        record.measurements.append(
            Measurement(work=work, subject=name, unit="tokens/s", values=tuple(values[1:]))
        )
    pairs = zip(rates["expanded"][1:], rates["absorbed"][1:], strict=True)
    record.ratios.append(
        Ratio(work=work, better="expanded", worse="absorbed", values=tuple(a / b for a, b in pairs))
    )


def _first_token(llm: Any, length: int, seed: int) -> float:
    """Seconds until one token of a prompt of `length` is there."""
    from quire import SamplingParams

    tokens = np.random.default_rng(seed).integers(10, 1000, size=length).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    typer.run(main)
