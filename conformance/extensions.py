"""Extensions: what a device may claim beyond the levels, and what the suite can say about it.

An extension is never needed for a level, and never granted because a level is. What a device claims
and the suite has no check for is said aloud and counts as nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from quire.conformance.cases import extension_cases, extension_of
from quire.conformance.records import ExtensionVerdict, Row
from quire.core.errors import ConfigError
from quire.core.interface import Capabilities

GRANTED, FAILED, NOT_CLAIMED, NOT_TRIED, NOT_CERTIFIABLE = (
    "granted",
    "failed",
    "not claimed",
    "not tried",
    "not certifiable",
)
_LEVEL_KINDS = frozenset({"causal", "sliding_window", "chunked"})
_LEVEL_FEATURES = frozenset({"soft_cap", "sinks", "alibi"})
"""What the levels try of attention where it is claimed."""
_PARTS_OF_EXTENSIONS = frozenset({"cache_rows", "quantized_experts", "state_slots"})
"""What the checks of other extensions try where it is claimed: `mla`, `moe`, `recurrent`."""
_HELD_QUANTIZATIONS = frozenset({"int8", "int4"})
"""The extension `quantization`."""
_FLOATS = frozenset({"float32", "bfloat16", "float16"})
_FAILURES = ("failed", "unexpected_pass")


def claims_of(capabilities: Capabilities) -> dict[str, str]:
    """Every extension that these capabilities claim, with the words that claim it."""
    found = dict(_plain_claims(capabilities))
    for name, ask in _claim_functions().items():
        if words := ask(capabilities):
            found[name] = words
    return dict(sorted(found.items()))


def known_extensions() -> list[str]:
    """The extensions that this suite has checks for."""
    from quire.conformance.checks import EXTENSIONS

    return [extension_of(module) for module in EXTENSIONS]


def chosen_extensions(text: str, level: int) -> list[str]:
    """The extensions that `all`, `none` or `NAME,...` names in a run up to `level`.

    `all` leaves out those that need the means of a higher level: an extension is tried whole.
    Raises: ConfigError for a name that this suite has no checks for.
    """
    known = known_extensions()
    if text == "all":
        return [name for name in known if _level_of(name) <= level]
    names = [name.strip() for name in text.split(",") if name.strip() and text != "none"]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"extension {', '.join(unknown)} was asked for; this suite can certify "
            f"{', '.join(known) or 'none'} (or: all, none)"
        )
    return names


def _level_of(name: str) -> int:
    """The level whose means an extension's checks use."""
    return max((case.level for case in extension_cases([name])), default=0)


def judge_extensions(
    rows: Sequence[Row], *, tried: Collection[str], capabilities: Capabilities
) -> list[ExtensionVerdict]:
    """One verdict for each extension that is known or claimed; a pure function of its arguments."""
    claims = claims_of(capabilities)
    names = sorted({*known_extensions(), *claims})
    return [_judge(name, rows, name in tried, claims.get(name, "")) for name in names]


def _judge(name: str, rows: Sequence[Row], is_tried: bool, claim: str) -> ExtensionVerdict:
    counts = Counter(row.outcome for row in rows if row.extension == name)
    wanted = {case.id for case in extension_cases([name])}
    num_missing = len(wanted - {row.id for row in rows})
    failures = sum(counts[outcome] for outcome in _FAILURES)
    exceptions = counts["excused"]
    plural = "" if exceptions == 1 else "s"
    with_exceptions = f" with {exceptions} exception{plural}" if exceptions else ""
    if not claim:
        outcome, text = NOT_CLAIMED, "not claimed"
    elif not wanted:
        outcome, text = NOT_CERTIFIABLE, "claimed, not certifiable by this suite"
    elif not is_tried:
        outcome, text = NOT_TRIED, "claimed, not tried in this run"
    elif failures or num_missing:
        outcome, text = FAILED, f"{failures} failed, {num_missing} missing{with_exceptions}"
    elif not counts["passed"] + exceptions:
        outcome, text = FAILED, "claimed, and none of its checks could be tried"
    else:
        outcome, text = GRANTED, f"granted{with_exceptions}"
    return ExtensionVerdict(
        name=name, outcome=outcome, num_exceptions=exceptions, claim=claim, text=text
    )


def _claim_functions() -> dict[str, Callable[[Capabilities], str]]:
    """What modules of checks say themselves about who claims them."""
    from quire.conformance.checks import EXTENSIONS

    return {
        extension_of(module): module.claimed for module in EXTENSIONS if hasattr(module, "claimed")
    }


def _plain_claims(claims: Capabilities) -> Iterator[tuple[str, str]]:
    """What stands in the claims beyond what levels try."""
    if claims.step_mode == "capture":  # what is compiled, a bucket at a time, is not replayed
        yield "graphs", f"step_mode {claims.step_mode!r}"
    for dtype in claims.cache_dtypes:
        if dtype not in _FLOATS:
            name = "fp8_cache" if dtype.startswith("float8") else f"{dtype}_cache"
            yield name, f"cache dtype {dtype!r}"
    for kind in claims.attention_kinds - _LEVEL_KINDS:
        yield kind, f"attention kind {kind!r}"
    for feature in claims.attention_features - _LEVEL_FEATURES:
        yield feature, f"attention feature {feature!r}"
    for feature in claims.features - _PARTS_OF_EXTENSIONS:
        yield feature, f"feature {feature!r}"
    for format_name in claims.quantizations - _HELD_QUANTIZATIONS:
        yield f"{format_name}_weights", f"quantization {format_name!r}"
    if claims.can_sleep:
        yield "sleep", "can_sleep"
    for name, words in claims.extensions.items():
        yield name, words
