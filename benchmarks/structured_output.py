"""Two libraries that compile grammars, side by side: what they take, what they cost.

    python -m quire.benchmarks.structured_output --vocab-size 50000

Both get the same tokenizer, trained here on the standard library's source, and the same schemas
(`structured_schemas`). For each library: the time to make the tokenizer's table, to compile a
schema, and to compute one mask while a valid text is followed; how many schemas it takes; and how
many of them it lets out of: texts drawn at random from what it allows that do not fit the schema.
xgrammar is not a dependency of Quire; install it to run this.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import jsonschema
import numpy as np
import numpy.typing as npt

from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.structured_schemas import REFUSED, SCHEMAS

_CORPUS_BYTES = 6_000_000
_MAX_TOKENS = 400
_NUM_DRAWS = 5


class Matcher(Protocol):
    """Where a text is in a grammar."""

    def mask(self) -> npt.NDArray[np.int32]:
        """Which tokens may follow, as 32-bit words."""

    def accept(self, token_id: int) -> bool:
        """Takes a token; whether it fits."""

    def is_done(self) -> bool:
        """Whether nothing may follow."""


@dataclass(frozen=True, slots=True)
class Library:
    """One of the two."""

    name: str
    compile: Callable[[dict[str, Any]], Callable[[], Matcher]]
    """A schema to what makes matchers. Raises for one that it does not take."""
    table_s: float


@dataclass(slots=True)
class Findings:
    """What one library did with the schemas."""

    compile_ms: list[float] = field(default_factory=list)
    mask_us: list[float] = field(default_factory=list)
    """The median of each schema."""
    slowest_mask_us: list[float] = field(default_factory=list)
    """Of each schema."""
    taken: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    refuses_valid_text: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both and writes the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    tokenizer = train_tokenizer(options.vocab_size)
    record = Record(
        name=f"structured_output_{options.vocab_size}",
        settings={
            "vocab_size": tokenizer.get_vocab_size(),
            "schemas": len(SCHEMAS),
            "impossible_schemas": len(REFUSED),
            "draws_a_schema": _NUM_DRAWS,
        },
    )
    libraries = [open_llguidance(tokenizer), open_xgrammar(tokenizer)]
    texts = {name: _valid_text(libraries[0], schema, tokenizer) for name, schema in SCHEMAS.items()}
    for library in libraries:
        findings = measure(library, tokenizer, texts)
        _add(record, library, findings)
    record.facts["versions"] = {name: version(name) for name in ("llguidance", "xgrammar")}
    record.show()
    record.write(options.json)


def train_tokenizer(vocab_size: int) -> Any:
    """A byte-level tokenizer of the standard library's source; `</s>` ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sources(), trainer)
    return tokenizer


def _sources() -> Iterator[str]:
    left = _CORPUS_BYTES
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        left -= len(text)
        yield text
        if left < 0:
            return


def open_llguidance(tokenizer: Any) -> Library:
    """The compiler as Quire uses it."""
    from quire.core.structured.compiler import GrammarCompiler
    from quire.core.structured.spec import GrammarSpec
    from quire.core.structured.state import GrammarState

    vocab_size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer.to_str, vocab_size=vocab_size)
    began = time.perf_counter()
    compiler.compile(GrammarSpec(kind="regex", text="a"))
    table_s = time.perf_counter() - began

    class Following:
        def __init__(self, state: GrammarState) -> None:
            self._state = state

        def mask(self) -> npt.NDArray[np.int32]:
            return np.frombuffer(self._state.mask() or b"", np.int32)

        def accept(self, token_id: int) -> bool:
            self._state.accept([token_id])
            return self._state.error is None

        def is_done(self) -> bool:
            return self._state.is_complete

    def compile_schema(schema: dict[str, Any]) -> Callable[[], Matcher]:
        grammar = compiler.compile(GrammarSpec(kind="json_schema", text=json.dumps(schema)))
        return lambda: Following(GrammarState(grammar, vocab_size=vocab_size, end_token_ids=[1]))

    return Library("llguidance", compile_schema, table_s)


def open_xgrammar(tokenizer: Any) -> Library:
    """The compiler with its defaults, one thread, its cache off."""
    import xgrammar
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    vocab_size = tokenizer.get_vocab_size()
    began = time.perf_counter()
    info = xgrammar.TokenizerInfo.from_huggingface(fast, vocab_size=vocab_size, stop_token_ids=[1])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    table_s = time.perf_counter() - began

    class Following:
        def __init__(self, grammar: Any) -> None:
            self._matcher = xgrammar.GrammarMatcher(grammar, terminate_without_stop_token=False)
            self._words = xgrammar.allocate_token_bitmask(1, vocab_size)

        def mask(self) -> npt.NDArray[np.int32]:
            self._matcher.fill_next_token_bitmask(self._words)
            return np.asarray(self._words[0].numpy())

        def accept(self, token_id: int) -> bool:
            return bool(self._matcher.accept_token(token_id))

        def is_done(self) -> bool:
            return bool(self._matcher.is_terminated())

    def compile_schema(schema: dict[str, Any]) -> Callable[[], Matcher]:
        grammar = compiler.compile_json_schema(json.dumps(schema))
        return lambda: Following(grammar)

    return Library("xgrammar", compile_schema, table_s)


def measure(library: Library, tokenizer: Any, texts: dict[str, str]) -> Findings:
    """Compiles every schema, follows its valid text, and draws texts from what is allowed."""
    findings = Findings()
    for name, schema in (*SCHEMAS.items(), *REFUSED.items()):
        began = time.perf_counter()
        try:
            start = library.compile(schema)
        except Exception:  # whatever it raises, it does not take the schema
            continue
        findings.compile_ms.append(1e3 * (time.perf_counter() - began))
        findings.taken.append(name)
        if name in texts and not _follow(start(), tokenizer.encode(texts[name]).ids, findings):
            findings.refuses_valid_text.append(name)
        if _leaks(start, schema, tokenizer):
            findings.leaks.append(name)
    return findings


def _follow(matcher: Matcher, token_ids: Sequence[int], findings: Findings) -> bool:
    times_us = []
    for token_id in token_ids:
        began = time.perf_counter()
        matcher.mask()
        times_us.append(1e6 * (time.perf_counter() - began))
        if not matcher.accept(token_id):
            return False
    findings.mask_us.append(median(times_us))
    findings.slowest_mask_us.append(max(times_us))
    return True


def _leaks(start: Callable[[], Matcher], schema: Any, tokenizer: Any) -> bool:
    for seed in range(_NUM_DRAWS):
        token_ids = _draw(start(), np.random.default_rng(seed), tokenizer.get_vocab_size())
        if token_ids is None:
            continue
        try:
            jsonschema.validate(json.loads(tokenizer.decode(token_ids)), schema)
        except (ValueError, jsonschema.ValidationError):
            return True
        except Exception:  # the schema itself is wrong: what it allows cannot be told
            return True
    return False


def _draw(matcher: Matcher, rng: np.random.Generator, vocab_size: int) -> list[int] | None:
    """Tokens drawn alike from all that are allowed; None: they did not come to an end."""
    token_ids: list[int] = []
    for _ in range(_MAX_TOKENS):
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[:vocab_size]
        allowed = np.flatnonzero(bits)
        token_id = int(rng.choice(allowed)) if len(allowed) else 1
        if token_id == 1:
            return token_ids
        token_ids.append(token_id)
        if not matcher.accept(token_id):
            return None
        if matcher.is_done():
            return token_ids
    return None


def _valid_text(library: Library, schema: dict[str, Any], tokenizer: Any) -> str:
    """A text that fits, drawn from what a library allows and written as Python writes JSON."""
    start = library.compile(schema)
    for seed in range(100):
        token_ids = _draw(start(), np.random.default_rng(seed), tokenizer.get_vocab_size())
        if token_ids is None:
            continue
        value = json.loads(tokenizer.decode(token_ids))
        jsonschema.validate(value, schema)
        return json.dumps(value, ensure_ascii=False)
    raise AssertionError(f"no text was found for {schema}")


def _add(record: Record, library: Library, findings: Findings) -> None:
    for work, unit, values in (
        ("tokenizer's table", "s", [library.table_s]),
        ("compile a schema", "ms", findings.compile_ms),
        ("one mask", "us", findings.mask_us),
        ("slowest mask of a schema", "us", findings.slowest_mask_us),
    ):
        record.measurements.append(
            Measurement(work=work, subject=library.name, unit=unit, values=tuple(values))
        )
    record.facts[library.name] = {
        "schemas taken": sum(name in SCHEMAS for name in findings.taken),
        "impossible schemas taken": [name for name in findings.taken if name in REFUSED],
        "schemas with texts that do not fit": findings.leaks,
        "schemas whose valid text is refused": findings.refuses_valid_text,
    }


if __name__ == "__main__":
    main()
