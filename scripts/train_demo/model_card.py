"""The model card, filled from the record of the training and nothing else."""
# ruff: noqa: E501  (a Markdown table has one line a row)

from __future__ import annotations

from typing import Any

CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [demo, python]
---

# Quire demo model

A Llama of {parameters:.2f} million parameters, small enough to ship with Quire, so that the
engine can be tried without downloading anything. It is real but tiny: it has learned how Python looks (indentation, brackets, idioms of the standard library), not what it
means. Do not use it for anything but trying the engine.

## How it was made

`scripts/train_demo` in Quire's repository trained it; `training.json` beside this file holds
the command, versions, machine and measurements, written by that script.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} layers, {hidden} wide, {heads} heads, {kv_heads} key-value heads, tied embeddings |
| vocabulary | {vocabulary} tokens, byte-level BPE, single digits |
| context | {context} tokens, trained at that length throughout |
| text | the standard library of CPython {python} without its tests, its `help()` pages, and conversations rendered from both |
| tokens seen | {tokens:.1f} million, about {epochs:.1f} passes over {corpus:.2f} million tokens of files |
| training | {minutes:.0f} minutes on {processor}{finished} |
| optimizer | Muon for matrices, AdamW for the rest; warm-up, plateau, linear decay to zero over the last {decay:.0%} |

## What was measured

On {held_out_files} source files and some `help()` pages held out by a hash of their names, never trained on:

| held-out text | nats per token | bits per byte |
|---|---|---|
| files and pages | {nats:.3f} | {bits:.3f} |
| conversations about them | {chat_nats:.3f} | {chat_bits:.3f} |

Weights are rounded to bfloat16; before rounding the first figure was {nats_before:.3f}.

Completed greedily (`scripts/train_demo/completions.py` has the prompts and what counts):

| task | done |
|---|---|
| held-out source cut after a bracket: finish the line as a correct statement | {line} |
| indent the block that a short prompt opens | {block} |
| close the bracket of a short prompt without context (`print(`) | {bracket} |
| short prompt and completion parse as Python up to their last whole line | {parse} |
| end the turn of a conversation | {turn} |

Greedy completions soon repeat themselves; a temperature of 0.5 to 0.8 helps.

## Chat format

`<|bos|><|user|>...<|end|><|assistant|>...<|end|>`, with an optional `<|system|>...<|end|>` in
front; `chat_template.jinja` renders it. Generation ends at `<|end|>` or `<|eos|>`. It knows
requests like "Write the function `name`: what it does", "Explain this code: ..." and
"Complete: ...".

## Samples

Greedy, unedited, the first ones of the fixed prompts.

{samples}

## Licence

The weights are part of Quire, Apache-2.0. The training text is CPython's, under the PSF
License; passages that the model reproduces from it remain under that licence.
"""


def render_model_card(record: dict[str, Any], samples: list[tuple[str, str]]) -> str:
    """Markdown of the card for one training record and (prompt, completion) samples."""
    recipe, loss = record["recipe"], record["held_out_loss"]
    completions, text = record["completions"], record["text"]
    return CARD.format(
        parameters=record["num_parameters"] / 1e6,
        layers=recipe["num_layers"],
        hidden=recipe["hidden_size"],
        heads=recipe["num_heads"],
        kv_heads=recipe["num_kv_heads"],
        vocabulary=recipe["vocab_size"],
        context=recipe["context"],
        python=text["python"],
        tokens=record["tokens_seen"] / 1e6,
        epochs=record["epochs"],
        corpus=text["train_tokens"]["documents"] / 1e6,
        minutes=record["wall_time_s"] / 60,
        processor=record["machine"]["processor"],
        finished="" if record["is_finished"] else " (not finished)",
        decay=recipe["decay_fraction"],
        held_out_files=len(text["held_out_files"]),
        nats=loss["documents"]["nats_per_token"],
        bits=loss["documents"]["bits_per_byte"],
        chat_nats=loss["conversations"]["nats_per_token"],
        chat_bits=loss["conversations"]["bits_per_byte"],
        nats_before=loss["documents_before_rounding_to_bfloat16"]["nats_per_token"],
        line=completions["finish_a_held_out_line"],
        block=completions["indent_the_block"],
        bracket=completions["close_brackets_without_context"],
        parse=completions["parse_as_python"],
        turn=completions["end_the_turn"],
        samples="\n".join(_render_sample(*sample) for sample in samples),
    )


def _render_sample(prompt: str, completion: str) -> str:
    return f"Prompt:\n\n{_indented(prompt)}\n\nModel:\n\n{_indented(completion)}\n"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.strip("\n").split("\n"))
