"""Compiles grammars for one tokenizer, off the hot path and once each."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.core.errors import QuireError, RequestError
from quire.core.structured.byte_table import byte_tokenizer
from quire.core.structured.grammar_text import param_of, to_compiler_text
from quire.core.structured.spec import GrammarSpec

_MISSING = (
    'structured output needs llguidance, which is not installed; pip install "quire[structured]"'
)
_TOKEN_LIST = re.compile(r"; following special tokens are available: ⟦.*?⟧", re.DOTALL)
_NUM_THREADS = 2
_MAX_CACHED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """What a grammar may cost. A matcher that exceeds them stops with an error, never hangs."""

    compile_time_s: float = 10.0
    """A request whose grammar takes longer is refused."""
    max_grammar_size: int = 500_000
    """Symbols in all productions."""
    initial_lexer_fuel: int = 5_000_000
    """Work for the regular expressions; about 50,000 a millisecond."""
    step_lexer_fuel: int = 1_000_000
    step_max_items: int = 100_000
    max_items_in_row: int = 5000


class CompiledGrammar:
    """A grammar that is ready. Immutable; each output starts from a copy of its beginning."""

    def __init__(self, matcher: Any, tokenizer: Any) -> None:
        self._matcher = matcher
        self.tokenizer = tokenizer

    def start(self) -> Any:
        """A matcher at the beginning of the grammar, the caller's own."""
        return self._matcher.deep_copy()


class GrammarCompiler:
    """Compiles in a few threads and remembers. May be used from several threads.

    The tokenizer's table is made by `prepare`, or else with the first grammar: the library holds
    the interpreter meanwhile, so a process that serves others begins it as soon as it is ready.
    """

    def __init__(
        self,
        read_tokenizer: Callable[[], str],
        *,
        vocab_size: int,
        limits: GrammarLimits | None = None,
    ) -> None:
        """`read_tokenizer` gives the tokenizer as the JSON of the tokenizers library."""
        self.vocab_size = vocab_size
        self.limits = limits or GrammarLimits()
        self._read_tokenizer = read_tokenizer
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        self._lock = threading.Lock()
        self._cache: OrderedDict[GrammarSpec, Future[CompiledGrammar]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, spec: GrammarSpec) -> Future[CompiledGrammar]:
        """The grammar, now or later; equal ones are one. Never waits.

        The future raises RequestError with the reason for a grammar that cannot be compiled.
        """
        with self._lock:
            future = self._cache.get(spec)
            if future is None:
                future = self._start(spec)
            self._cache.move_to_end(spec)
            while len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
            return future

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """The grammar, waiting for it. Raises: RequestError with the reason, also for the time."""
        try:
            return self.submit(spec).result(self.limits.compile_time_s)
        except TimeoutError as error:
            raise self.too_slow(spec) from error

    def too_slow(self, spec: GrammarSpec) -> RequestError:
        """What to tell whose grammar takes longer than the limit."""
        return RequestError(
            f"the grammar takes longer than {self.limits.compile_time_s:g} s to compile; "
            "make it simpler",
            param=param_of(spec),
        )

    def prepare(self) -> None:
        """Makes the tokenizer's table now.

        Raises: RequestError without the library, or for a tokenizer of which no table can be made;
        CheckpointError.
        """
        self._table(_library())

    def prepare_soon(self) -> Future[None]:
        """`prepare` in a thread of the compiler's own; grammars that come meanwhile wait for it."""
        with self._lock:
            return self._threads().submit(self.prepare)

    def close(self) -> None:
        """Ends the threads once they are done with what they have."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, spec: GrammarSpec) -> Future[CompiledGrammar]:
        future = self._threads().submit(self._compile_safely, spec)
        self._cache[spec] = future
        return future

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="quire-grammar")
        return self._pool

    def _compile_safely(self, spec: GrammarSpec) -> CompiledGrammar:
        """Whatever the library makes of a grammar that it cannot read is the grammar's fault."""
        try:
            return self._compile(spec)
        except QuireError:
            raise
        except BaseException as error:  # the library's panics are no Exceptions
            raise _not_compiled([str(error) or type(error).__name__], spec) from error

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        llguidance = _library()
        tokenizer = self._table(llguidance)
        text = to_compiler_text(spec)
        limits = self._native_limits(llguidance)
        return _compiled(llguidance, text, tokenizer, limits, spec)

    def _table(self, llguidance: Any) -> Any:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._make_table(llguidance)
            return self._tokenizer

    def _make_table(self, llguidance: Any) -> Any:
        text = self._read_tokenizer()
        try:
            return llguidance.LLTokenizer(text, n_vocab=self.vocab_size)
        except Exception as error:  # the library raises ValueError and its panics
            raise RequestError(
                f"structured output is not possible with this model's tokenizer: {error}",
                param="structured_outputs",
            ) from error

    def _native_limits(self, llguidance: Any) -> Any:
        limits = self.limits
        return llguidance.LLParserLimits(
            max_items_in_row=limits.max_items_in_row,
            initial_lexer_fuel=limits.initial_lexer_fuel,
            step_lexer_fuel=limits.step_lexer_fuel,
            step_max_items=limits.step_max_items,
            max_grammar_size=limits.max_grammar_size,
            verbose_errors=False,
        )


class GrammarChecker(GrammarCompiler):
    """Finds out whether grammars compile, without the table of the model's own tokenizer.

    A table of single bytes does, and costs nothing. Where a grammar's author may name special
    tokens, which are then the model's, they stand in the table beside the bytes.
    """

    def __init__(
        self,
        read_special_tokens: Callable[[], Mapping[int, str]],
        *,
        vocab_size: int,
        limits: GrammarLimits | None = None,
    ) -> None:
        """`read_special_tokens` gives the ids and texts of the tokens that are no text."""
        super().__init__(str, vocab_size=vocab_size, limits=limits)
        self._read_special_tokens = read_special_tokens
        self._named: Any = None
        self._named_lock = threading.Lock()

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        llguidance = _library()
        special_tokens = self._read_special_tokens()
        text = to_compiler_text(spec)
        limits = self._native_limits(llguidance)
        tokenizer = self._table(llguidance)
        if spec.kind == "grammar":
            tokenizer = self._table_with(special_tokens, llguidance)
        return _compiled(llguidance, text, tokenizer, limits, spec)

    def _make_table(self, llguidance: Any) -> Any:
        return llguidance.LLTokenizer("byte")

    def _table_with(self, special_tokens: Mapping[int, str], llguidance: Any) -> Any:
        with self._named_lock:
            if self._named is None:
                table = byte_tokenizer(special_tokens)
                size = max(self.vocab_size, table.size)
                self._named = llguidance.LLTokenizer(
                    table.text, n_vocab=size, eos_token=table.end_token_id
                )
            return self._named


def _compiled(
    llguidance: Any, text: str, tokenizer: Any, limits: Any, spec: GrammarSpec
) -> CompiledGrammar:
    raise_if_invalid(llguidance, text, tokenizer, limits, spec)
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if matcher.is_error():
        raise _not_compiled([matcher.get_error()], spec)
    raise_if_empty(matcher, tokenizer, spec)
    return CompiledGrammar(matcher, tokenizer)


def raise_if_invalid(
    llguidance: Any, text: str, tokenizer: Any, limits: Any, spec: GrammarSpec
) -> None:
    """Raises: RequestError with the library's reason for a grammar that is none."""
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
        text, tokenizer, limits=limits
    )
    if is_error:
        raise _not_compiled(messages, spec)


def raise_if_empty(matcher: Any, tokenizer: Any, spec: GrammarSpec) -> None:
    """Raises: RequestError for a grammar by which nothing can be said."""
    if matcher.is_stopped() or not _allows_any(matcher.deep_copy(), tokenizer):
        raise RequestError(
            "the grammar allows no text but the empty one; give one that some text fits",
            param=param_of(spec),
        )


def _not_compiled(messages: list[str], spec: GrammarSpec) -> RequestError:
    return RequestError(
        f"the grammar cannot be compiled: {_first_lines(messages)}", param=param_of(spec)
    )


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(_MISSING, param="structured_outputs") from error
    return llguidance


def _allows_any(matcher: Any, tokenizer: Any) -> bool:
    """Whether some token may stand first, besides those that end a text."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    bits[list(tokenizer.eos_tokens)] = 0
    return bool(bits.any())


def _first_lines(messages: list[str]) -> str:
    """One line, without the list of every token that has a name."""
    text = _TOKEN_LIST.sub("", " ".join(messages))
    return " ".join(text.split())[:500]
