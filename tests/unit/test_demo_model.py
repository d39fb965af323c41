"""The shipped demo model: its files, what its record says, and that it continues Python."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors import safe_open
from train_demo.completions import (
    BLOCK_PROMPTS,
    CONVERSATION_PROMPTS,
    answer,
    call_prompts,
    complete,
    finishes_line,
    opens_block,
    parses,
)
from train_demo.corpus import standard_library_root
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

FOLDER = Path(__file__).resolve().parents[2] / "quire" / "demo"
MAX_WEIGHT_BYTES = 12_000_000
# Bounds for the numbers of prompts done: two thirds to four fifths of what was measured, a margin for other machines' rounding and other Pythons' sources. A random model does none.
MIN_BLOCKS, MIN_LINES_SHARE, MIN_PARSED, MIN_ENDED = 8, 0.5, 5, 2
NUM_LINE_PROMPTS = 20


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What the training script wrote about the run."""
    return json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The shipped weights in float32, so that greedy choices hardly depend on the machine."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def random_model() -> LlamaForCausalLM:
    """The same architecture before training."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))


@pytest.fixture(scope="module")
def line_prompts(record: dict[str, Any]) -> list[str]:
    """Places in the files of this Python's library that the model was never trained on."""
    root = standard_library_root()
    paths = [root / name for name in record["text"]["held_out_files"]]
    return call_prompts([path.read_text() for path in paths if path.exists()], NUM_LINE_PROMPTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Achievements:
    """How many of the prompts a model did right."""

    num_blocks: int
    num_lines: int
    num_parsed: int


def _achievements(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, line_prompts: list[str]
) -> Achievements:
    blocks = [(prompt, complete(model, tokenizer, prompt)) for prompt in BLOCK_PROMPTS]
    lines = [(prompt, complete(model, tokenizer, prompt)) for prompt in line_prompts]
    return Achievements(
        num_blocks=sum(opens_block(*pair) for pair in blocks),
        num_lines=sum(finishes_line(*pair) for pair in lines),
        num_parsed=sum(parses(*pair) for pair in blocks),
    )


def test_weights_are_small_bfloat16_and_tied() -> None:
    """A clone stays small: at most 12 MB, one embedding, two bytes a weight."""
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= MAX_WEIGHT_BYTES
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names


def test_config_names_a_plain_llama_with_grouped_queries() -> None:
    """Every loader knows it without code of ours."""
    config = AutoConfig.from_pretrained(FOLDER)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 512


def test_config_generation_and_tokenizer_agree_on_special_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Generation ends at the end of a document and at the end of a turn, wherever it is read."""
    ends = tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])
    assert model.config.eos_token_id == ends
    assert model.generation_config.eos_token_id == ends
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert not model.generation_config.do_sample


def test_record_says_how_it_was_made_and_what_was_measured(record: dict[str, Any]) -> None:
    """The run was finished, and its losses are recorded together with all they depend on."""
    assert record["is_finished"]
    assert record["num_parameters"] == 5_475_584
    assert record["tokens_seen"] > 5_000_000
    assert record["wall_time_s"] > 0
    for key in ("commands", "machine", "versions", "recipe", "text", "held_out_history"):
        assert record[key], key
    for split in ("documents", "conversations"):
        loss = record["held_out_loss"][split]
        assert 0.5 < loss["nats_per_token"] < 0.5 * math.log(4096)
        assert 0.3 < loss["bits_per_byte"] < 2.0


def test_record_rounding_to_bfloat16_costs_next_to_nothing(record: dict[str, Any]) -> None:
    """What is shipped is as good as what was trained."""
    loss = record["held_out_loss"]
    shipped = loss["documents"]["nats_per_token"]
    trained = loss["documents_before_rounding_to_bfloat16"]["nats_per_token"]
    assert shipped == pytest.approx(trained, abs=0.01)


def test_loss_on_text_of_ours_is_near_what_the_record_says(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]
) -> None:
    """The weights beside the record are those it was measured with, not a damaged copy.

    This repository's own source is text that the model has never seen on any machine.
    """
    text = (FOLDER.parents[1] / "scripts" / "train_demo" / "corpus.py").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < record["held_out_loss"]["documents"]["nats_per_token"] + 1.0


def test_completions_indent_finish_the_line_and_parse(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, line_prompts: list[str]
) -> None:
    """It has learned how Python looks: blocks, brackets, and where a statement ends."""
    done = _achievements(model, tokenizer, line_prompts)
    assert done.num_blocks >= MIN_BLOCKS
    assert done.num_lines >= MIN_LINES_SHARE * len(line_prompts)
    assert done.num_parsed >= MIN_PARSED


def test_completions_of_a_random_model_stay_under_every_bound(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, line_prompts: list[str]
) -> None:
    """The bounds measure learning: the same architecture untrained fails each of them."""
    done = _achievements(random_model, tokenizer, line_prompts)
    assert done.num_blocks <= MIN_BLOCKS // 2
    assert done.num_lines <= MIN_LINES_SHARE * len(line_prompts) / 2
    assert done.num_parsed <= MIN_PARSED // 2


def test_answers_end_their_turn(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A chat stops by itself, and says something."""
    answers = [answer(model, tokenizer, question) for question in CONVERSATION_PROMPTS]
    assert sum(has_ended for _, has_ended in answers) >= MIN_ENDED
    assert all(text.strip() for text, _ in answers)
