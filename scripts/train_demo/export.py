"""The shipped artefacts: weights in bfloat16, tokenizer, templates, record and model card."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from train_demo.batches import Mix, Tokens, cut_windows
from train_demo.completions import (
    BLOCK_PROMPTS,
    BRACKET_PROMPTS,
    CONVERSATION_PROMPTS,
    answer,
    call_prompts,
    closes_brackets,
    complete,
    finishes_line,
    opens_block,
    parses,
)
from train_demo.model_card import render_model_card
from train_demo.preparation import Preparation
from train_demo.training import Run, evaluate

RECORD_NAME = "training.json"
WEIGHTS_NAME = "model.safetensors"


def export_model(
    run: Run, preparation: Preparation, facts: dict[str, Any], to: Path
) -> dict[str, Any]:
    """Write the run's model into `to` and measure what was written, read back from there.

    Returns the record that is also written to `training.json`.
    """
    to.mkdir(parents=True, exist_ok=True)
    _save_weights(run, to)
    _save_tokenizer(run, preparation, to)
    exported = LlamaForCausalLM.from_pretrained(to, dtype=torch.float32)
    record = {
        **_run_facts(run, preparation, facts),
        "held_out_loss": {
            "documents": measure_loss(
                exported, preparation.held_out.documents, preparation.held_out_texts.documents
            ),
            "conversations": measure_loss(
                exported, preparation.held_out.conversations, _dialogue_texts(preparation)
            ),
            "documents_before_rounding_to_bfloat16": measure_loss(
                run.model, preparation.held_out.documents, preparation.held_out_texts.documents
            ),
        },
        "completions": measure_completions(exported, to, _held_out_sources(preparation)),
        "text": preparation.facts,
    }
    (to / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
    (to / "README.md").write_text(render_model_card(record, _samples(exported, to)))
    return record


def measure_loss(
    model: LlamaForCausalLM, documents: Sequence[Tokens], texts: Sequence[str]
) -> dict[str, Any]:
    """Held-out loss in float32 over windows as long as the model's context.

    Bits per byte spread the nats of all tokens, the special ones included, over the text's bytes.
    """
    windows = cut_windows(documents, context=model.config.max_position_embeddings)
    nats_per_token = evaluate(model, windows, batch_size=8, use_bfloat16=False)
    num_tokens, num_bytes = sum(map(len, documents)), sum(len(text.encode()) for text in texts)
    return {
        "nats_per_token": nats_per_token,
        "bits_per_byte": nats_per_token * num_tokens / num_bytes / math.log(2),
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
    }


def measure_completions(
    model: LlamaForCausalLM, folder: Path, sources: Sequence[str]
) -> dict[str, Any]:
    """How many greedy completions of the prompts do what Python's grammar asks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = [(prompt, complete(model, tokenizer, prompt)) for prompt in BLOCK_PROMPTS]
    brackets = [(prompt, complete(model, tokenizer, prompt)) for prompt in BRACKET_PROMPTS]
    calls = [(prompt, complete(model, tokenizer, prompt)) for prompt in call_prompts(sources)]
    answers = [answer(model, tokenizer, question) for question in CONVERSATION_PROMPTS]
    return {
        "finish_a_held_out_line": _share(finishes_line(*pair) for pair in calls),
        "indent_the_block": _share(opens_block(*pair) for pair in blocks),
        "close_brackets_without_context": _share(closes_brackets(*pair) for pair in brackets),
        "parse_as_python": _share(parses(*pair) for pair in (*blocks, *brackets)),
        "end_the_turn": _share(has_ended for _, has_ended in answers),
    }


def _share(outcomes: Any) -> str:
    results = list(outcomes)
    return f"{sum(results)} of {len(results)}"


def _save_weights(run: Run, to: Path) -> None:
    rounded = copy.deepcopy(run.model).to(torch.bfloat16)
    config = rounded.config
    rounded.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    rounded.save_pretrained(to)
    (to / WEIGHTS_NAME).chmod(0o644)  # safetensors writes files that only their owner may read


def _save_tokenizer(run: Run, preparation: Preparation, to: Path) -> None:
    preparation.tokenizer.model_max_length = run.recipe.context
    preparation.tokenizer.save_pretrained(to)


def _held_out_sources(preparation: Preparation) -> list[str]:
    """The programs among the held-out documents, which stand before the `help()` pages."""
    num_files = len(preparation.facts["held_out_files"])
    return list(preparation.held_out_texts.documents[:num_files])


def _dialogue_texts(preparation: Preparation) -> list[str]:
    return [
        "".join(message.content for message in dialogue.messages)
        for dialogue in preparation.held_out_texts.conversations
    ]


def _run_facts(run: Run, preparation: Preparation, facts: dict[str, Any]) -> dict[str, Any]:
    mix = Mix()
    document_tokens_seen = run.num_tokens * mix.document_share
    return {
        "is_finished": run.progress >= 1.0,
        "num_parameters": run.model.num_parameters(),
        "recipe": dataclasses.asdict(run.recipe),
        "steps": run.step,
        "mix": dataclasses.asdict(mix),
        "tokens_seen": run.num_tokens,
        "epochs": document_tokens_seen / preparation.train.num_document_tokens,
        "wall_time_s": round(run.trained_s),
        "started": facts["started"],
        "commands": facts["commands"],
        "machine": _machine(),
        "versions": _versions(),
        "held_out_history": facts["held_out_history"],
    }


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "has_avx512_bf16": torch.cpu.get_capabilities().get("avx512_bf16", False),
        "system": platform.system(),
    }


def _processor_name() -> str:
    """The model name, family and model of the processor; Linux tells, elsewhere the platform."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    wanted = ("model name", "cpu family", "model")
    return ", ".join(f"{name} {fields[name]}" for name in wanted if name in fields)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "safetensors": safetensors.__version__,
    }


def _samples(model: LlamaForCausalLM, folder: Path) -> list[tuple[str, str]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [(prompt, complete(model, tokenizer, prompt)) for prompt in BLOCK_PROMPTS[:3]]
    answers = [
        (question, answer(model, tokenizer, question)[0]) for question in CONVERSATION_PROMPTS
    ]
    return texts + answers
