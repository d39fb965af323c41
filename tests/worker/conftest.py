"""Tiny models, and what transformers says they produce; made once for all tests of the worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, by variant."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def make(variant: str = "llama") -> Path:
        if variant not in made:
            root = tmp_path_factory.mktemp("tiny")
            made[variant] = make_tiny_model(variant, root, with_tokenizer=False)
        return made[variant]

    return make


@pytest.fixture(scope="session")
def prompts() -> dict[str, list[int]]:
    """Prompts of many lengths: one token, around a block's size, longer than a window."""
    rng = np.random.default_rng(11)
    lengths = (50, 7, 33, 1, 8, 17)
    return {f"r{n}": rng.integers(4, 512, n).tolist() for n in lengths}


@pytest.fixture(scope="session")
def oracle(tiny, prompts) -> Callable[[str], dict[str, list[int]]]:
    """The greedy tokens of transformers, ten for each prompt, by variant."""
    made: dict[str, dict[str, list[int]]] = {}

    def ask(variant: str = "llama") -> dict[str, list[int]]:
        if variant not in made:
            made[variant] = _greedy(tiny(variant), prompts)
        return made[variant]

    return ask


def _greedy(directory: Path, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    model.generation_config.eos_token_id = None
    answers = {}
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            eos_token_id=None,
            do_sample=False,
        )
        answers[name] = output[0, len(prompt) :].tolist()
    return answers
