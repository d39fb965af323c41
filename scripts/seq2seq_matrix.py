#!/usr/bin/env python3
"""Try every encoder-decoder of transformers on the real engine, and write down the result.

    python scripts/seq2seq_matrix.py --markdown docs/encoder-decoder.md [NAME ...]

Of each architecture of the text-to-text and speech-to-text mappings a tiny random model is made,
run with concurrent requests (chunked, preempted, sources and prefixes shared) in float32, and
compared token by token with `generate`. What is in the JSON file already is not run again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix_pages
import model_matrix
from matrix_pages import refusal, refused
from model_matrix import compare

LABELS = {
    **model_matrix.LABELS,
    "elsewhere": "no encoder-decoder; tried on [a page of its own](hearing.md)",
}
NUM_TOKENS = 40
CACHES = (3, 4, 5, 6, 7, 8, 10, 12, 16)
"""Sizes of a scarce cache in blocks, the smallest first."""
START, PAD = 0, 2
LENGTHS = (15, 31, 47, 4)
DEFAULT_JSON = "docs/reports/seq2seq.json"


def main() -> int:
    """Runs the matrix; 1 if an architecture gave a wrong token."""
    arguments = matrix_pages.parse(__doc__.split("\n", 1)[0], DEFAULT_JSON)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from tiny_seq2seq import seq2seq_architectures

    return matrix_pages.run_matrix(arguments, seq2seq_architectures(), run_seq2seq, LABELS)


def run_seq2seq(name: str, make: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """What became of one architecture. make: its tiny model; None: as here."""
    from tiny_seq2seq import make_tiny_seq2seq

    from quire.core.errors import UnsupportedError

    try:
        from transformers import GenerationConfig

        model = (make or make_tiny_seq2seq)(name)
        model.generation_config = GenerationConfig(
            decoder_start_token_id=START, bos_token_id=START, pad_token_id=PAD
        )
    except Exception as error:  # transformers' own code on a shrunk config
        return {"status": "no_reference", "detail": f"{type(error).__name__}: {error}"[:400]}
    with tempfile.TemporaryDirectory() as directory:
        if not getattr(model.config, "is_encoder_decoder", False):
            detail = "a decoder that takes sound among its tokens"
            return {"status": "elsewhere", "class": type(model).__name__, "detail": detail}
        model.save_pretrained(directory)
        asked, given = _asked(model, Path(directory))
        try:
            expected, margins = reference(model, given)
        except Exception as error:  # a refusal counts also where the reference fails
            return refusal(Path(directory)) or {
                "status": "no_reference",
                "detail": f"{type(error).__name__}: {error}"[:400],
            }
        try:
            answer = run_tightly(Path(directory), asked)
        except UnsupportedError as error:
            return {**refused(error), "class": type(model).__name__}
    answer.pop("block_bytes")
    status = compare(answer.pop("runs"), expected, margins)
    return {"status": status, "class": type(model).__name__, **answer}


def _asked(model: Any, directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts of the engine, and what `generate` takes for the same; two of them are alike."""
    import numpy as np
    import torch
    from tiny_seq2seq import tiny_extractor

    rng = np.random.default_rng(7)
    if model.main_input_name == "input_ids":
        ids = [rng.integers(4, 400, size=length).tolist() for length in LENGTHS]
        ids.append(ids[2])
        given = [{"input_ids": torch.tensor([one])} for one in ids]
        return [{"prompt_token_ids": one} for one in ids], given
    start = torch.tensor([[START]])
    if model.main_input_name == "pixel_values":
        return _asked_of_pictures(model, directory, start)
    extractor = tiny_extractor(model)
    extractor.save_pretrained(directory)
    rate = extractor.sampling_rate
    clips = [rng.standard_normal(n).astype(np.float32) for n in (16_000, 9_600, 6_400, 16_000)]
    given = [
        {**extractor(clip, sampling_rate=rate, return_tensors="pt"), "decoder_input_ids": start}
        for clip in clips
    ]
    asked = [
        {"prompt_token_ids": [START], "multi_modal_data": {"audio": (one, rate)}} for one in clips
    ]
    return asked, given


def _asked_of_pictures(
    model: Any, directory: Path, start: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    import numpy as np
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    config = model.config
    size = (getattr(config, "encoder", None) or config.vision_config).image_size
    named = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type) or {"pil": "ViTImageProcessorPil"}
    processor_class = getattr(transformers, named.get("pil") or named["torchvision"])
    processor = processor_class(size={"height": size, "width": size})
    processor.save_pretrained(directory)
    rng = np.random.default_rng(7)
    shapes = ((40, 60, 3), (64, 32, 3), (32, 32, 3))
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    pictures.append(pictures[1])
    given = [
        {**processor(images=one, return_tensors="pt"), "decoder_input_ids": start}
        for one in pictures
    ]
    asked = [{"prompt_token_ids": [START], "multi_modal_data": {"image": one}} for one in pictures]
    return asked, given


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


def run_tightly(directory: Path, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens of a cache that holds all requests, and of one so small that one is preempted."""
    from quire.core.errors import ConfigError

    answer = run_engine(directory, asked, 8 << 20)
    for num_blocks in CACHES:
        try:
            tight = run_engine(directory, asked, num_blocks * answer["block_bytes"])
        except ConfigError:
            continue  # one request does not fit
        for key in ("runs", "num_preemptions", "num_cached_tokens"):
            answer[key] += tight[key]
        if tight["num_preemptions"]:
            break
    return answer


def run_engine(directory: Path, asked: list[dict[str, Any]], cache_bytes: int) -> dict[str, Any]:
    """Tokens of the real engine, twice: the second time every source is there."""
    from quire import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 8,
        "max_model_len": 64, "block_size": 16, "num_threads": 1, "cache_memory_bytes": cache_bytes,
    }  # fmt: skip
    with LLM(model=str(directory), **settings) as llm:
        runs, num_cached = [], 0
        for _ in range(2):
            outputs = llm.generate(asked, params, use_tqdm=False)
            runs.append([list(output.outputs[0].token_ids) for output in outputs])
            num_cached += sum(output.num_cached_tokens or 0 for output in outputs)
        statistics = llm.statistics()
        return {
            "runs": runs,
            "num_preemptions": statistics.num_preemptions,
            "num_cached_tokens": num_cached,
            "block_bytes": statistics.memory_bytes["cache"] // llm.facts.num_blocks[0],
        }


if __name__ == "__main__":
    sys.exit(main())
