#!/usr/bin/env python3
"""Try every encoder-decoder of transformers on the real engine, and write down the result.

    python scripts/seq2seq_matrix.py --markdown docs/encoder-decoder.md [NAME ...]

Of each architecture of the text-to-text and speech-to-text mappings a tiny random model is made,
run with concurrent requests (chunked, preempted, sources and prefixes shared) in float32, and
compared token by token with `generate`. What is in the JSON file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import model_matrix
from model_matrix import compare, in_a_process

LABELS = {**model_matrix.LABELS, "elsewhere": "no encoder-decoder; not tried here"}
NUM_TOKENS = 8
START, PAD = 0, 2
BEGIN_MARK, END_MARK = "<!-- matrix: begin -->", "<!-- matrix: end -->"
LENGTHS = (15, 31, 47, 4)
DEFAULT_JSON = "docs/reports/seq2seq.json"


def main() -> int:
    """Runs the matrix; 1 if an architecture gave a wrong token."""
    arguments = _parse()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from tiny_seq2seq import seq2seq_architectures

    path = Path(arguments.json)
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    missing = [name for name in seq2seq_architectures() if name not in results]
    for name in arguments.architectures or missing:
        results[name] = in_a_process(name, arguments.limit_s, run_seq2seq)
        print(f"{name:32} {results[name]['status']:14}", flush=True)
        content = {
            "transformers": transformers.__version__,
            "results": dict(sorted(results.items())),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.markdown:
        page = Path(arguments.markdown)
        page.write_text(_with_table(page.read_text(), render(results, transformers.__version__)))
    return int(any(row["status"] == "wrong" for row in results.values()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("architectures", nargs="*", help="model types; none: all that are missing")
    parser.add_argument("--json", default=DEFAULT_JSON, help="results, read and written")
    parser.add_argument("--markdown", help="a page between whose marks the table is written")
    parser.add_argument("--limit-s", type=int, default=120, help="seconds for one architecture")
    return parser.parse_args()


def run_seq2seq(name: str) -> dict[str, Any]:
    """What became of one architecture."""
    from tiny_seq2seq import make_tiny_seq2seq

    from quire.core.errors import UnsupportedError

    try:
        from transformers import GenerationConfig

        model = make_tiny_seq2seq(name)
        model.generation_config = GenerationConfig(
            decoder_start_token_id=START, bos_token_id=START, pad_token_id=PAD
        )
    except Exception as error:  # transformers' own code on a shrunk config
        return {"status": "no_reference", "detail": f"{type(error).__name__}: {error}"[:400]}
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        if not getattr(model.config, "is_encoder_decoder", False):
            detail = "a decoder that takes sound among its tokens"
            return {"status": "elsewhere", "class": type(model).__name__, "detail": detail}
        asked, given = _asked(model, Path(directory))
        try:
            expected, margins = reference(model, given)
        except Exception as error:  # a refusal counts also where the reference fails
            return _refusal(Path(directory)) or {
                "status": "no_reference",
                "detail": f"{type(error).__name__}: {error}"[:400],
            }
        try:
            runs = run_engine(Path(directory), asked)
        except UnsupportedError as error:
            detail = "; ".join(f"{r.need}: {r.have}" for r in error.reasons)
            return {"status": "refused", "class": type(model).__name__, "detail": detail[:600]}
    return {"status": compare(runs, expected, margins), "class": type(model).__name__}


def _refusal(directory: Path) -> dict[str, Any] | None:
    from quire.core.errors import QuireError, UnsupportedError
    from quire.core.models.registry import describe

    try:
        describe(directory)
    except UnsupportedError as error:
        detail = "; ".join(f"{r.need}: {r.have}" for r in error.reasons)
        return {"status": "refused", "detail": detail[:600]}
    except QuireError:
        return None
    return None


def _asked(model: Any, directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts of the engine, and what `generate` takes for the same; two of them are alike."""
    import numpy as np
    import torch

    rng = np.random.default_rng(7)
    if model.main_input_name == "input_ids":
        ids = [rng.integers(4, 400, size=length).tolist() for length in LENGTHS]
        ids.append(ids[2])
        given = [{"input_ids": torch.tensor([one])} for one in ids]
        return [{"prompt_token_ids": one} for one in ids], given
    if model.config.model_type != "whisper":
        return [], []
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=1)
    extractor.save_pretrained(directory)
    clips = [rng.standard_normal(n).astype(np.float32) for n in (16_000, 9_000, 500, 16_000)]
    made = [extractor(clip, sampling_rate=16_000, return_tensors="pt") for clip in clips]
    start = torch.tensor([[START]])
    return (
        [
            {"prompt_token_ids": [START], "multi_modal_data": {"audio": (one, 16_000)}}
            for one in clips
        ],
        [{"input_features": one["input_features"], "decoder_input_ids": start} for one in made],
    )


def reference(model: Any, given: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of `generate`, one request at a time, and the margin of each."""
    import torch
    from transformers import GenerationMixin

    if not given:
        raise ValueError("no input for its encoder is known")
    rows, margins = [], []
    for inputs in given:
        arguments = dict(inputs)
        if "input_ids" in inputs:
            arguments["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            # Whisper has a `generate` of its own, for sound of any length.
            out = GenerationMixin.generate(
                model, **arguments, max_new_tokens=NUM_TOKENS, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        rows.append(out.sequences[0, 1:].tolist())
        best = [step[0].float().topk(2).values for step in out.logits]
        margins.append([float(two[0] - two[1]) for two in best])
    return rows, margins


def run_engine(directory: Path, asked: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Tokens of the real engine, twice: the second time every source is there."""
    from quire import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 8,
        "max_model_len": 64, "block_size": 16, "num_threads": 1, "cache_memory_bytes": 8 << 20,
    }  # fmt: skip
    with LLM(model=str(directory), **settings) as llm:
        return [
            [list(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)]
            for _ in range(2)
        ]


def render(results: dict[str, Any], version: str) -> str:
    """The table."""
    by_status: dict[str, int] = {}
    for row in results.values():
        by_status[row["status"]] = by_status.get(row["status"], 0) + 1
    counts = ", ".join(f"{by_status[s]} {s.replace('_', ' ')}" for s in LABELS if s in by_status)
    lines = [
        f"With transformers {version}, {len(results)} architectures: {counts}.",
        "",
        "| architecture | result | remark |",
        "|---|---|---|",
    ]
    for name, row in sorted(results.items()):
        remark = row.get("detail", "").replace("|", "/").replace("\n", " ")
        lines.append(f"| {name} | {LABELS[row['status']]} | {remark[:240]} |")
    return "\n".join(lines)


def _with_table(page: str, table: str) -> str:
    before, _, rest = page.partition(BEGIN_MARK)
    _, _, after = rest.partition(END_MARK)
    return f"{before}{BEGIN_MARK}\n{table}\n{END_MARK}{after}"


if __name__ == "__main__":
    sys.exit(main())
