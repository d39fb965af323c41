"""Custom processors are found by name, or refused before the first request."""

from __future__ import annotations

import pytest

from quire.core.errors import ConfigError
from quire.core.worker.logits_processors import LogitsProcessors


def test_targets_are_imported_at_construction():
    """module:attribute names any callable, nested ones included."""
    processors = LogitsProcessors({"sqrt": "math:sqrt", "join": "os:path.join"})
    assert processors.missing(["sqrt", "join", "other"]) == ["other"]


def test_targets_that_cannot_be_had_are_all_named():
    """A typo in the configuration is found at the start, and all of them at once."""
    with pytest.raises(ConfigError) as caught:
        LogitsProcessors(
            {
                "a": "no_such_module:f",
                "b": "math:no_such_name",
                "c": "math",
                "d": "math:pi",
                "e": "math:sqrt",
            }
        )
    message = str(caught.value)
    assert "'a' (no_such_module:f)" in message
    assert "no_such_name" in message
    assert "must be written module:attribute" in message
    assert "must be callable" in message
    assert "'e'" not in message


def test_register_replaces_the_name():
    """Functions of the user's own process come after the configured ones."""
    processors = LogitsProcessors({"f": "math:sqrt"})
    seen = []

    class Row:
        shape = (3,)

    row = Row()
    processors.register("f", lambda prompt, output, logits: seen.append(output) or logits)
    processors.apply(["f"], [1], [2], row)
    assert seen == [[2]]
