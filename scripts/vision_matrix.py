#!/usr/bin/env python3
"""Try every image-text-to-text model of transformers on the real engine, and write the result down.

    python scripts/vision_matrix.py --markdown docs/multimodal.md [NAME ...]

Of each architecture a tiny random model is made and run in float32 with concurrent requests
(chunked, preempted, prefixes shared), and compared token by token with `generate`: prompts with
images where the engine serves the family's images, and prompts of text alone elsewhere, where a
request that brings an image must be refused. What is in the JSON file already is not run again.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import matrix_pages
import model_matrix

sys.path.insert(0, str(model_matrix.ROOT / "tests" / "multimodal"))

LABELS = {
    "exact": "exact, with images and without",
    "text_only": "exact with text; images are refused",
    "elsewhere": "no decoder of text alone; not tried here",
    **{key: value for key, value in model_matrix.LABELS.items() if key != "exact"},
}
DEFAULT_JSON = "docs/reports/vision.json"
PICTURES_ENCODED = ("vision-encoder-decoder", "pp_formulanet")
"""Whose encoder takes pictures, and whose decoder tokens alone."""
NUM_TOKENS = 8
MAX_NUM_TOKENS = 24
"""Of the run in a cache that is too small for all requests."""


def main() -> int:
    """Runs the matrix; 1 if an architecture gave a wrong token."""
    arguments = matrix_pages.parse(__doc__.split("\n", 1)[0], DEFAULT_JSON)
    import torchvision_beside

    # Before transformers looks for it.
    torchvision_beside.use()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from tiny_image_text import image_text_architectures

    model_matrix.import_everything()
    return matrix_pages.run_matrix(arguments, image_text_architectures(), run_vision, LABELS)


def run_vision(name: str) -> dict[str, Any]:
    """What became of one architecture."""
    from tiny_vision import MARKS

    from quire.core.models.transformers_adapter.seeing import SIGHTS

    if name in SIGHTS and name in MARKS:
        return run_with_images(name)
    from tiny_image_text import make_tiny_image_text

    if name in PICTURES_ENCODED:
        import seq2seq_matrix

        return seq2seq_matrix.run_seq2seq(name, _make_encoder_of_pictures)
    row = model_matrix.run_architecture(name, make_tiny_image_text, image_refusal)
    if row["status"] == "no_reference":
        return refusal_at_load(name) or row
    cause = row.pop("also", None)
    if row["status"] == "exact":
        if not cause:
            return {**row, "status": "failed", "detail": "a prompt with an image is not refused"}
        return {**row, "status": "text_only", "detail": cause}
    return row


def _make_encoder_of_pictures(name: str) -> Any:
    from tiny_image_text import make_tiny_image_text
    from tiny_seq2seq import make_tiny_seq2seq, seq2seq_architectures, sign_last_norms

    if name in seq2seq_architectures():
        return make_tiny_seq2seq(name)
    model = make_tiny_image_text(name)
    sign_last_norms(model)
    return model


def refusal_at_load(name: str) -> dict[str, Any] | None:
    """The row of a model that answers no text alone, in transformers neither, if it is refused."""
    from tiny_image_text import make_tiny_image_text
    from tiny_models import make_tiny_tokenizer

    from quire import LLM
    from quire.core.errors import UnsupportedError

    try:
        model = make_tiny_image_text(name)
    # transformers' own code, on a shrunk config or without a library that it wants.
    except Exception:
        return None
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        make_tiny_tokenizer().save_pretrained(directory)
        try:
            LLM(model=directory, device="cpu", dtype="float32", num_threads=1).close()
        except UnsupportedError as error:
            return matrix_pages.refused(error)
    return None


def image_refusal(llm: Any) -> str:
    """The cause that a prompt with an image is refused for; empty: it is not, or without one."""
    import numpy as np

    from quire import SamplingParams
    from quire.core.errors import RequestError

    image = np.zeros((32, 32, 3), np.uint8)
    asked = {"prompt_token_ids": [5, 6, 7], "multi_modal_data": {"image": image}}
    try:
        llm.generate([asked], SamplingParams(max_tokens=1), use_tqdm=False)
    except RequestError as error:
        return str(error).partition(" takes none: ")[2]
    return ""


def run_with_images(name: str) -> dict[str, Any]:
    """A family that is served with images: tokens in chunks, again from prefixes, preempted."""
    from tiny_vision import make_vision_model

    from quire.core.errors import UnsupportedError

    with tempfile.TemporaryDirectory() as folder:
        directory = make_vision_model(name, Path(folder))
        asked, expected, margins = image_cases(directory, name)
        try:
            runs, num_preemptions = run_engine(directory, asked)
        except UnsupportedError as error:
            return matrix_pages.refused(error)
    status = model_matrix.compare(runs, expected, margins)
    return {"status": status, "num_preemptions": num_preemptions}


def image_cases(
    directory: Path, name: str
) -> tuple[list[dict[str, Any]], list[list[int]], list[list[float]]]:
    """Prompts with one, two and no images, what `generate` makes of them, and its margins."""
    import torch
    import transformers
    from tiny_vision import MARKS, make_config, make_image

    from quire.core.engine.image_reader import load_processor

    processor, mark = load_processor(directory), MARKS[name]
    model_class = getattr(transformers, make_config(name).architectures[0])
    model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    texts = [
        (f"a cat {mark} what is in this picture", [make_image(1)]),
        (f"the dog {mark} and {mark} tell me", [make_image(2, (64, 40)), make_image(3)]),
        (f"a cat {mark} what is in this picture", [make_image(4)]),
        ("the red cat sees the blue dog and that is it", []),
        (f"a cat {mark} what is in this picture", [make_image(1)]),
    ]
    if name == "paligemma":
        # Its processor takes no text without an image.
        texts = [text for text in texts if text[1]]
    asked, rows, margins = [], [], []
    for text, images in texts:
        with warnings.catch_warnings():
            # PaliGemma's processor makes arrays of tensors in a way that numpy has left.
            warnings.simplefilter("ignore", DeprecationWarning)
            inputs = processor(
                text=[text], images=[images] if images else None, return_tensors="pt"
            )
        for unused in ("num_crops", "labels"):
            inputs.pop(unused, None)
        # Llama 4's processor makes images in bfloat16, whatever the model is in.
        inputs = inputs.to(torch.float32)
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=MAX_NUM_TOKENS, do_sample=False, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        ids = inputs["input_ids"][0].tolist()
        rows.append(out.sequences[0, len(ids) :].tolist())
        best = [step[0].float().topk(2).values for step in out.logits]
        margins.append([float(two[0] - two[1]) for two in best])
        data = {"multi_modal_data": {"image": images}} if images else {}
        asked.append({"prompt": text, **data} if images else {"prompt_token_ids": ids})
    return asked, rows, margins


def run_engine(directory: Path, asked: list[dict[str, Any]]) -> tuple[list[list[list[int]]], int]:
    """Tokens in chunks that end within images, again from prefixes, and in a scarce cache."""
    from quire import LLM, SamplingParams
    from quire.core.errors import ConfigError

    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "model_impl": "transformers", "max_num_seqs": 4,
        "block_size": 16, "num_threads": 1, "model": str(directory),
    }  # fmt: skip
    runs = []
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(
        **settings, max_model_len=160, max_num_batched_tokens=7, cache_memory_bytes=1 << 22
    ) as llm:
        runs += [_tokens(llm, asked, params) for _ in range(2)]
        block_bytes = llm.statistics().memory_bytes["cache"] // llm.facts.num_blocks[0]
    params = SamplingParams(temperature=0, max_tokens=MAX_NUM_TOKENS, ignore_eos=True)
    # States take as much as many tokens, so that ten blocks may hold no request at all.
    for num_blocks in (10, 20, 40):
        size = num_blocks * block_bytes
        try:
            llm = LLM(
                **settings, max_model_len=128, cache_memory_bytes=size, enable_prefix_caching=False
            )
        except ConfigError:
            continue
        with llm:
            runs.append(_tokens(llm, asked, params))
            return runs, llm.statistics().num_preemptions
    return runs, 0


def _tokens(llm: Any, asked: list[dict[str, Any]], params: Any) -> list[list[int]]:
    outputs = llm.generate(asked, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    sys.exit(main())
