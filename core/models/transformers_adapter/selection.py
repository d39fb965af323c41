"""Models whose tokens choose, by their content, which tokens they see.

Such a choice begins to matter only in texts longer than the number chosen, thousands in a real
checkpoint, so that a self-check of a few tokens would pass whatever is wrong. Where the number can
be lowered for the check it is, and the whole text is computed anew for each token, as no cache of
ours knows the choice; elsewhere the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from quire.core.errors import Reason, UnsupportedError

_NUM_CHOSEN = "index_topk"
_NUM_CHECKED = 4
"""Far fewer than the self-check has tokens."""


def indexers_of(model: nn.Module) -> list[Any]:
    """The modules that choose."""
    return [module for module in model.modules() if type(module).__name__.endswith("Indexer")]


def refuse_unseen_selection(model: nn.Module, passed: tuple[str, ...]) -> None:
    """Raises UnsupportedError if a self-check could not see what the model chooses.

    `passed`: names of arguments by which it hands a choice to its attention.
    """
    hidden = [m for m in indexers_of(model) if not isinstance(getattr(m, _NUM_CHOSEN, None), int)]
    if not hidden and not passed:
        return
    name = type(hidden[0]).__name__ if hidden else type(model).__name__
    how = f"passes {', '.join(passed)} to its attention" if passed else "chooses blocks"
    reason = Reason(
        code="model.selection",
        need=f"{name} {how}: which tokens a token sees depends on their content",
        have="causal, sliding and chunked attention; a check at load that such a choice, which "
        "matters in long texts alone, would pass unseen",
        remedy="use a model with dense attention",
    )
    raise UnsupportedError([reason], what=f"running {type(model).__name__}")


@contextmanager
def choosing_few(model: nn.Module) -> Iterator[None]:
    """Meanwhile so few tokens are chosen that the texts of the self-check feel it."""
    indexers = [m for m in indexers_of(model) if isinstance(getattr(m, _NUM_CHOSEN, None), int)]
    before = [getattr(module, _NUM_CHOSEN) for module in indexers]
    for module in indexers:
        setattr(module, _NUM_CHOSEN, min(_NUM_CHECKED, getattr(module, _NUM_CHOSEN)))
    try:
        yield
    finally:
        for module, number in zip(indexers, before, strict=True):
            setattr(module, _NUM_CHOSEN, number)
