"""Encoder-decoders in one flat row beside request by request: one engine, one model, in one run.

python benchmarks/encoder_decoder.py --model-type t5

The model is of random weights. Both engines are Quire; the second keeps to transformers' own cache
for each request, as families do for which a flat row is not known to be sound. Sources are of mixed
lengths, and every request generates the same number of tokens. Rounds alternate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from quire.benchmarks.recording import Measurement, Ratio, Record

_FLAT, _CACHED = "quire", "quire, request by request"
_BART = {
    "d_model": 256, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "vocab_size": 8000,
}  # fmt: skip
_T5 = {
    "d_model": 256, "num_layers": 4, "num_heads": 4, "d_kv": 64, "d_ff": 1024, "vocab_size": 8000,
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {"bart": _BART, "t5": _T5}


def main(
    model_type: Annotated[str, typer.Option(help="bart or t5")] = "t5",
    requests: Annotated[int, typer.Option(help="at once, in each round")] = 16,
    tokens: Annotated[int, typer.Option(help="that each generates")] = 24,
    rounds: Annotated[int, typer.Option()] = 3,
    threads: Annotated[int, typer.Option(help="of the host")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints tokens/s of both and the ratio, round by round."""
    torch.set_num_threads(threads)
    record = Record(
        name=f"encoder_decoder_{model_type}",
        settings={
            "model_type": model_type, "shape": _SHAPES[model_type], "requests": requests,
            "tokens": tokens, "rounds": rounds, "threads": threads, "dtype": "float32",
            "weights": "random",
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        _write_config(Path(name), model_type)
        rates = measure(Path(name), requests, tokens, rounds, threads)
    work = f"{requests} requests of mixed lengths"
    for subject, values in rates.items():
        record.measurements.append(
            Measurement(work=work, subject=subject, unit="tokens/s", values=tuple(values))
        )
    pairs = zip(rates[_FLAT], rates[_CACHED], strict=True)
    values = tuple(ours / theirs for ours, theirs in pairs)
    record.ratios.append(Ratio(work=work, better=_FLAT, worse=_CACHED, values=values))
    record.show()
    print(f"written to {record.write(out)}")


def measure(
    directory: Path, requests: int, tokens: int, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Tokens/s of each way in each round."""
    from quire import LLM, SamplingParams

    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "num_threads": threads, "load_format": "dummy",
        "max_model_len": 512, "max_num_seqs": requests, "enable_prefix_caching": False,
        "cache_memory_bytes": 512 << 20,
    }  # fmt: skip
    engines = {_FLAT: LLM(model=str(directory), **settings)}
    with _without_flat_rows():
        engines[_CACHED] = LLM(model=str(directory), **settings)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    rates: dict[str, list[float]] = {_FLAT: [], _CACHED: []}
    for number in range(rounds + 1):  # the first warms up
        prompts = [{"prompt_token_ids": ids} for ids in _sources(requests, number)]
        for subject, llm in engines.items():
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if number:
                rates[subject].append(requests * tokens / (time.perf_counter() - begin))
    for llm in engines.values():
        llm.close()
    return rates


@contextmanager
def _without_flat_rows() -> Iterator[None]:
    from quire.core.models.seq2seq import loading

    original = loading.flat_run
    loading.flat_run = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield
    finally:
        loading.flat_run = original


def _sources(count: int, number: int) -> list[list[int]]:
    rng = np.random.default_rng(number)
    return [rng.integers(10, 7_000, size=n).tolist() for n in rng.integers(8, 128, size=count)]


def _write_config(directory: Path, model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(model_type, **_SHAPES[model_type])
    mapped: Any = AutoModelForSeq2SeqLM._model_mapping[type(config)]  # noqa: SLF001
    config.architectures = [mapped.__name__]
    config.save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"decoder_start_token_id": 0}')


if __name__ == "__main__":
    typer.run(main)
