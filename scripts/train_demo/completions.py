"""Prompts for the demo model and what may be measured of its answers."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCK_PROMPTS = (
    "def read_file(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\n\ndef list_files(directory):\n",
    "for name in names:\n",
    "def main():\n    try:\n",
    "class Parser:\n    def parse(self, text):\n        if not text:\n",
    "def add(a, b):\n",
    "with open(filename) as f:\n",
    "while True:\n",
    "def is_empty(self):\n",
)
"""Each ends where a deeper block must begin."""
BRACKET_PROMPTS = (
    "import os\n\npath = os.path.join(",
    "def f(x):\n    return len(",
    "print(",
    "values = [",
    "if isinstance(value, (int,",
    "raise ValueError(",
    "self.assertEqual(",
    "def __init__(self, name,",
    "result = {",
    "items.append(str(",
)
"""Each ends inside a bracket that must be closed, with next to nothing before it."""
CONVERSATION_PROMPTS = (
    "Hello!",
    "Write a Python function to return the length of a list.",
    "Write the function `is_directory`: Return True if the path is a directory.",
    "What does `str.upper` do in Python?",
    'Explain this code:\n```python\ndef close(self):\n    """Close the file."""\n```',
)
MAX_NEW_TOKENS = 64
MAX_ANSWER_TOKENS = 200
NUM_CALL_PROMPTS = 40
NUM_CONTEXT_LINES = 20
CALL = re.compile(r"\s+(?:return |raise |if |if not |[\w.]+(?:, \w+)* = )?[\w.]+\(")
"""An indented line up to its first call, of the kinds that are a statement by themselves."""
OPENERS, CLOSERS = "([{", ")]}"


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> str:
    """The greedy continuation of a text, without the prompt and special tokens."""
    new_tokens = _generate(model, tokenizer(prompt)["input_ids"], max_new_tokens)
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True))


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> tuple[str, bool]:
    """The greedy answer to one question, and whether the model ended its turn itself."""
    turns = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    new_tokens = _generate(model, prompt_ids, max_new_tokens)
    has_ended = new_tokens[-1] in model.generation_config.eos_token_id
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)), has_ended


def call_prompts(sources: Iterable[str], limit: int = NUM_CALL_PROMPTS) -> list[str]:
    """Places in real programs: some lines, the last one cut right after its first bracket.

    Evenly spread over all such places; with held-out sources the model has seen none of them.
    """
    prompts = [prompt for source in sources for prompt in _call_prompts_in(source)]
    return prompts[:: max(1, len(prompts) // limit)][:limit]


def opens_block(prompt: str, completion: str) -> bool:
    """Whether the first line of code after the prompt is indented deeper than its last line."""
    last_line = prompt.rstrip("\n").rpartition("\n")[2]
    lines = [line for line in completion.split("\n") if line.strip()]
    return bool(lines) and bool(lines[0].strip()) and _indent(lines[0]) > _indent(last_line)


def closes_brackets(prompt: str, completion: str) -> bool:
    """Whether the brackets that the prompt leaves open are closed, each by its own kind."""
    still_open = list(_open_brackets(prompt))
    for character in _without_strings(completion):
        if character in OPENERS:
            still_open.append(character)
        elif character in CLOSERS:
            if OPENERS[CLOSERS.index(character)] != still_open.pop():
                return False
            if not still_open:
                return True
    return False


def finishes_line(prompt: str, completion: str) -> bool:
    """Whether the prompt's last line and the completion begin with one whole, correct statement.

    It ends at the first line's end outside all brackets; `if ...:` counts with an empty body.
    """
    start = prompt.rpartition("\n")[2].lstrip()
    for end, character in enumerate(completion):
        statement = start + completion[:end]
        if character == "\n" and _is_balanced(statement):
            body = " pass" if statement.endswith(":") else ""
            return _is_program(statement + body + "\n")
    return False


def parses(prompt: str, completion: str) -> bool:
    """Whether prompt and completion are a Python program once the last, unfinished lines are cut.

    At least one whole line of the completion must remain.
    """
    lines = completion.split("\n")
    for num_kept in range(len(lines) - 1, 0, -1):
        kept = "\n".join(lines[:num_kept])
        if kept.strip() and _is_program(prompt + kept + "\n"):
            return True
    return False


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt_ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    new_tokens: list[int] = output[0, len(prompt_ids) :].tolist()
    return new_tokens


def _is_program(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _call_prompts_in(source: str) -> Iterator[str]:
    lines = source.splitlines()
    for number in range(NUM_CONTEXT_LINES, len(lines)):
        if cut := CALL.match(lines[number]):
            yield "\n".join([*lines[number - NUM_CONTEXT_LINES : number], cut.group()])


def _is_balanced(text: str) -> bool:
    bare = _without_strings(text)
    return all(bare.count(a) == bare.count(b) for a, b in zip(OPENERS, CLOSERS, strict=True))


def _open_brackets(text: str) -> str:
    still_open: list[str] = []
    for character in _without_strings(text):
        if character in OPENERS:
            still_open.append(character)
        elif character in CLOSERS:
            still_open.pop()
    return "".join(still_open)


def _without_strings(text: str) -> str:
    return re.sub(r"\"[^\"\n]*\"|'[^'\n]*'", "''", text)
