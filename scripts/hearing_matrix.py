#!/usr/bin/env python3
"""Try every decoder of transformers that takes sound among its tokens on the real engine.

    python scripts/hearing_matrix.py --markdown docs/multimodal.md [NAME ...]

Of each architecture of the speech-to-text mapping that is no encoder-decoder a tiny random model is
made and run in float32 with concurrent requests (chunked, preempted, prefixes shared), and compared
token by token with `generate`: prompts with sound where the engine serves the family's sound, and
prompts of text alone elsewhere, where a request that brings sound must be refused.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import matrix_pages
import model_matrix
import vision_matrix

LABELS = {
    "exact": "exact, with sound and without",
    "text_only": "exact with text; sound is refused",
    **{key: value for key, value in model_matrix.LABELS.items() if key != "exact"},
}
DEFAULT_JSON = "docs/reports/hearing.json"
HEARERS = (
    "audioflamingo3", "fun_asr_nano", "glmasr", "granite_speech", "granite_speech_plus",
    "kyutai_speech_to_text", "moss_transcribe_diarize", "musicflamingo", "nemo_speechlm",
    "qwen2_audio", "qwen3_asr", "vibevoice", "vibevoice_asr", "voxtral", "voxtral_realtime",
)  # fmt: skip


def main() -> int:
    """Runs the matrix; 1 if an architecture gave a wrong token."""
    arguments = matrix_pages.parse(__doc__.split("\n", 1)[0], DEFAULT_JSON)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_matrix.import_everything()
    return matrix_pages.run_matrix(arguments, list(HEARERS), run_hearing, LABELS)


def run_hearing(name: str) -> dict[str, Any]:
    """What became of one architecture."""
    from quire.core.models.transformers_adapter.hearing import HEARS

    if name in HEARS:
        return run_with_sound(name)
    from tiny_hearing import make_hearer

    row = model_matrix.run_architecture(name, make_hearer, is_sound_refused)
    is_refusing = row.pop("also", None)
    if row["status"] == "exact":
        if not is_refusing:
            return {**row, "status": "failed", "detail": "a prompt with sound is not refused"}
        return {**row, "status": "text_only"}
    return row


def is_sound_refused(llm: Any) -> bool:
    """Whether a prompt with sound ends in an error of the request that names what it brings."""
    import numpy as np

    from quire import SamplingParams
    from quire.core.errors import RequestError

    sound = (np.zeros(4_000, np.float32), 16_000)
    asked = {"prompt_token_ids": [5, 6, 7], "multi_modal_data": {"audio": sound}}
    try:
        llm.generate([asked], SamplingParams(max_tokens=1), use_tqdm=False)
    except RequestError as error:
        return "audio" in str(error)
    return False


def run_with_sound(name: str) -> dict[str, Any]:
    """A family that is served with sound: tokens in chunks, again from prefixes, preempted."""
    from hearing_cases import sound_cases
    from tiny_hearing import make_hearing_model

    from quire.core.errors import UnsupportedError

    with tempfile.TemporaryDirectory() as folder:
        directory = make_hearing_model(name, Path(folder))
        asked, expected, margins = sound_cases(directory)
        try:
            runs, num_preemptions = vision_matrix.run_engine(directory, asked)
        except UnsupportedError as error:
            return matrix_pages.refused(error)
    status = model_matrix.compare(runs, expected, margins)
    return {"status": status, "num_preemptions": num_preemptions}


if __name__ == "__main__":
    sys.exit(main())
