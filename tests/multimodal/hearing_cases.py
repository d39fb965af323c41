"""Prompts with sound for tiny models, and what transformers' own generation makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_hearing import MARK, RATE, make_sound

MAX_NUM_TOKENS = 24
_ONE_SOUND = (
    "AudioFlamingo3Processor",
    "GlmAsrProcessor",
    "MusicFlamingoProcessor",
    "Qwen3ASRProcessor",
)
"""Whose processors take one sound for each text."""


def sound_cases(directory: Path) -> tuple[list[Any], list[list[int]], list[list[float]]]:
    """Prompts with one, two and no sounds, their tokens of `generate`, and its margins."""
    import torch
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    texts = [
        (f"a cat {MARK} what is said", [make_sound(1)]),
        (f"the dog {MARK} and {MARK} tell me", [make_sound(2, 9_000), make_sound(3, 4_000)]),
        (f"a cat {MARK} what is said", [make_sound(4)]),
        ("who is the cat and why the dog", []),
        (f"a cat {MARK} what is said", [make_sound(1)]),
    ]
    if type(processor).__name__ in _ONE_SOUND:
        texts = [text for text in texts if len(text[1]) < 2]
    asked, rows, margins = [], [], []
    for text, sounds in texts:
        inputs = processor(text=[text], audio=sounds or None, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=MAX_NUM_TOKENS, do_sample=False, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        ids = inputs["input_ids"][0].tolist()
        rows.append(out.sequences[0, len(ids) :].tolist())
        best = [step[0].float().topk(2).values for step in out.logits]
        margins.append([float(two[0] - two[1]) for two in best])
        data = {"multi_modal_data": {"audio": [(one, RATE) for one in sounds]}}
        asked.append({"prompt": text, **data} if sounds else {"prompt_token_ids": ids})
    return asked, rows, margins
