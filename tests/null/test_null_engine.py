"""The whole engine on the device without compute: what it answers follows from lengths alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.benchmarks.shapes import SHAPES

VOCAB_SIZE = SHAPES["llama-15m"]["vocab_size"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A config alone: no weights are read, and token ids need no tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-15m"]))
    return tmp_path


@pytest.mark.parametrize("budget", [7, 2048])
def test_null_device_answers_by_position_however_the_work_is_cut(model: Path, budget: int) -> None:
    """Many requests through few seats, chunked or whole: each gets the tokens of its own lengths."""
    lengths = [1, 5, 16, 17, 40, 100] * 5
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    with LLM(
        model=str(model),
        device="null",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
    ) as llm:
        prompts = [{"prompt_token_ids": [9] * length} for length in lengths]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        statistics = llm.statistics()
    for length, output in zip(lengths, outputs, strict=True):
        expected = [position % VOCAB_SIZE for position in range(length, length + 20)]
        assert list(output.outputs[0].token_ids) == expected
    assert statistics.num_running == statistics.num_waiting == 0
