"""What an output must look like, as plain data that crosses from the front to the engine core."""

from __future__ import annotations

from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "structural_tag"]

MAX_GRAMMAR_CHARS = 512 * 1024
"""Of one grammar's text; larger ones are refused before anything reads them."""


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One grammar. Hashable: equal ones are compiled once."""

    kind: GrammarKind
    text: str = ""
    """The schema, regular expression or grammar; for `choice` and `structural_tag` JSON."""
    whitespace_pattern: str | None = None
    """For JSON: a regular expression of what may stand between tokens; None: a bounded default."""
    disable_any_whitespace: bool = False
    """For JSON: as compact as can be."""
    disable_additional_properties: bool = False
    """For JSON: objects have the properties that the schema names, and no others."""


ANYTHING = GrammarSpec(kind="regex", text=r"(.|\n)*")


class ThinkingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How long an output may think."""

    begin: str | None
    """What an output that thinks begins with; None: it thinks from its first token on."""
    end: str
    """What ends thoughts."""
    end_token_ids: tuple[int, ...]
    """`end` as tokens, for an output that must be made to stop."""
    max_tokens: int
    """Of the thoughts, without their end."""


class ConstraintSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar, from where on the output keeps to it, and how long it thinks before."""

    grammar: GrammarSpec | None
    """None: any text."""
    starts_after: str | None = None
    """A text that ends a part in which everything may be said, as `</think>` does. None: the
    grammar holds from the first token on.
    """
    thinking: ThinkingSpec | None = None
    """None: as long as it likes."""
