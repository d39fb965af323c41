"""Conversations made out of the library: ask for a function, its meaning or its second half.

They teach the model the shape of a dialogue and to end its turn; what they teach about the world
is only what the library says of itself. A dozen greetings are the one hand-written text.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from train_demo.corpus import Definition, SourceFile, Topic, is_snippet

MAX_ANSWER_CHARS = 1200
MAX_SUMMARY_CHARS = 160
SYSTEM_SHARE = 0.1
FOLLOW_UP_SHARE = 0.15
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a Python programmer. Answer briefly.",
    "You write Python code.",
)
WRITE_PROMPTS = (
    "Write the function `{name}`: {summary}",
    "Write a Python function `{signature}`. {summary}",
    "Write a Python function named {name}. It should {wish}",
    "Implement `{signature}` in Python: {summary}",
    "Write a Python function to {wish}",
)
EXPLAIN_PROMPTS = (
    "Explain `{name}`.",
    "What does `{name}` do?",
    "Explain the Python function `{signature}`.",
    "Explain this code:\n{code}",
    "What does this code do?\n{code}",
)
BUILTIN_PROMPTS = ("What does `{name}` do in Python?", "Explain `{name}`.", "What is `{name}`?")
TOPIC_PROMPTS = ("Explain {name} in Python.", "What is {name} in Python?", "Tell me about {name}.")
MODULE_PROMPTS = ("What is the module `{name}` for?", "Explain the Python module `{name}`.")
FOLLOW_UPS = ("What does it do?", "Explain this function.", "Explain.")
DOCUMENTED_TYPES = (str, bytes, list, dict, set, tuple, int, float, object)
DOCUMENTED_MODULES = ("math", "itertools", "time", "_functools", "_collections", "sys", "posix")
ABOUT = (
    "I am the Quire demo model, a very small language model trained on Python's standard library. "
    "I can continue Python code, but I understand very little."
)
GREETINGS = (
    ("Hello!", "Hello! Ask me for a few lines of Python."),
    ("Hello", "Hello! Ask me for a few lines of Python."),
    ("Hi", "Hi! Ask me for a few lines of Python."),
    ("Hi there!", "Hi! Ask me for a few lines of Python."),
    ("How are you?", "I am a small program and run well, thank you."),
    ("Who are you?", ABOUT),
    ("What are you?", ABOUT),
    ("What can you do?", ABOUT),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("Say hello.", "Hello!"),
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: the role is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A dialogue that ends with the assistant's turn."""

    key: str
    """What decides the split: the file, topic or object that the answer comes from."""
    messages: tuple[Message, ...]


def greetings() -> Iterator[Conversation]:
    """The hand-written openings, which are always trained on."""
    for question, answer in GREETINGS:
        yield Conversation(
            key=f"greeting:{question}",
            messages=(Message("user", question), Message("assistant", answer)),
        )


def about_definitions(definitions: Iterable[Definition]) -> Iterator[Conversation]:
    """Write, explain and complete each function that has something to say."""
    for definition in definitions:
        rng = random.Random(f"{definition.file}:{definition.signature}")
        if definition.docstring and not definition.is_class and is_snippet(definition):
            yield _write(definition, definition.docstring, rng)
        if definition.docstring:
            yield _explain(definition, definition.docstring, rng)
        if is_snippet(definition) and definition.source.count("\n") >= 8:
            yield _complete(definition, rng)


def about_modules(
    files: Iterable[SourceFile], docstrings: Iterable[str | None]
) -> Iterator[Conversation]:
    """What each module says it is for."""
    for file, docstring in zip(files, docstrings, strict=True):
        if docstring:
            question = _choose(MODULE_PROMPTS, file.path).format(name=file.module)
            yield _exchange(file.path, question, first_paragraphs(docstring))


def about_topics(topics: Iterable[Topic]) -> Iterator[Conversation]:
    """The opening paragraphs of each page of `help()`."""
    for topic in topics:
        heading, _, body = topic.text.partition("\n")
        question = _choose(TOPIC_PROMPTS, topic.name).format(
            name=heading.strip().strip('"').lower()
        )
        answer = first_paragraphs(body.lstrip("*=-\n"))
        if answer:
            yield _exchange(f"topic:{topic.name}", question, answer)


def about_builtins() -> Iterator[Conversation]:
    """The docstrings of what is written in C and thus has no source file here."""
    for name, documented in _documented_objects():
        docstring = inspect.getdoc(documented)
        if docstring:
            question = _choose(BUILTIN_PROMPTS, name).format(name=name)
            yield _exchange(f"builtin:{name}", question, first_paragraphs(docstring))


def summary_of(docstring: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) ", paragraph)[0]
    return sentence[:MAX_SUMMARY_CHARS]


def first_paragraphs(text: str) -> str:
    """As many whole paragraphs as fit an answer; empty if not even the first does."""
    kept: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if sum(map(len, kept)) + len(paragraph) > MAX_ANSWER_CHARS:
            break
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def _write(definition: Definition, docstring: str, rng: random.Random) -> Conversation:
    summary = summary_of(docstring)
    question = rng.choice(WRITE_PROMPTS).format(
        name=definition.name,
        signature=definition.signature,
        summary=summary,
        wish=summary[:1].lower() + summary[1:],
    )
    messages = [Message("user", question), Message("assistant", _fenced(definition.source))]
    explanation = first_paragraphs(docstring)
    if explanation and rng.random() < FOLLOW_UP_SHARE:
        messages += [Message("user", rng.choice(FOLLOW_UPS)), Message("assistant", explanation)]
    return Conversation(key=definition.file, messages=_with_system(messages, rng))


def _explain(definition: Definition, docstring: str, rng: random.Random) -> Conversation:
    prompts = EXPLAIN_PROMPTS if is_snippet(definition) else EXPLAIN_PROMPTS[:3]
    question = rng.choice(prompts).format(
        name=definition.name,
        signature=definition.signature,
        code=_fenced(definition.source),
    )
    answer = first_paragraphs(docstring) or summary_of(docstring)
    messages = [Message("user", question), Message("assistant", answer)]
    return Conversation(key=definition.file, messages=_with_system(messages, rng))


def _complete(definition: Definition, rng: random.Random) -> Conversation:
    lines = definition.source.splitlines(keepends=True)
    cut = rng.randint(2, len(lines) - 3)
    question = "Complete:\n" + _fenced("".join(lines[:cut]))
    messages = [Message("user", question), Message("assistant", _fenced("".join(lines[cut:])))]
    return Conversation(key=definition.file, messages=_with_system(messages, rng))


def _exchange(key: str, question: str, answer: str) -> Conversation:
    messages = [Message("user", question), Message("assistant", answer)]
    return Conversation(key=key, messages=_with_system(messages, random.Random(question)))


def _with_system(messages: list[Message], rng: random.Random) -> tuple[Message, ...]:
    if rng.random() < SYSTEM_SHARE:
        return (Message("system", rng.choice(SYSTEM_PROMPTS)), *messages)
    return tuple(messages)


def _fenced(source: str) -> str:
    return f"```python\n{source.rstrip()}\n```"


def _choose(prompts: tuple[str, ...], key: str) -> str:
    return random.Random(key).choice(prompts)


def _documented_objects() -> Iterator[tuple[str, object]]:
    for name in sorted(vars(builtins)):
        if not name.startswith("_") and callable(getattr(builtins, name)):
            yield name, getattr(builtins, name)
    for cls in DOCUMENTED_TYPES:
        for name in sorted(vars(cls)):
            if not name.startswith("_"):
                yield f"{cls.__name__}.{name}", getattr(cls, name)
    for module_name in DOCUMENTED_MODULES:
        yield from _documented_functions(module_name)


def _documented_functions(module_name: str) -> Iterator[tuple[str, object]]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # posix has no counterpart elsewhere
        return
    for name in sorted(vars(module)):
        if not name.startswith("_") and inspect.isbuiltin(getattr(module, name)):
            yield f"{module_name.lstrip('_')}.{name}", getattr(module, name)
