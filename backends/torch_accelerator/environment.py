"""What the environment says to drivers and to Triton, as they read it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_TRUE = frozenset({"1", "true", "on", "yes", "y"})


def is_interpreting(environment: Mapping[str, str] | None = None) -> bool:
    """Whether Triton will interpret kernels (`TRITON_INTERPRET=1`)."""
    environment = os.environ if environment is None else environment
    return environment.get("TRITON_INTERPRET", "").lower() in _TRUE


def visible(
    items: Sequence[tuple[str, Item]],
    variable: str,
    environment: Mapping[str, str] | None = None,
) -> list[Item]:
    """The devices that a variable such as CUDA_VISIBLE_DEVICES leaves, in its order.

    `items` are (unique name, device). Entries are numbers or beginnings of unique names; the first
    that fits nothing ends the list, as the drivers have it.
    """
    environment = os.environ if environment is None else environment
    text = environment.get(variable)
    if text is None:
        return [item for _, item in items]
    chosen: list[Item] = []
    for entry in (part.strip() for part in text.split(",")):
        match = _match(entry, items)
        if match is None:
            break
        chosen.append(match)
    return chosen


def _match(entry: str, items: Sequence[tuple[str, Item]]) -> Item | None:
    if entry.isdecimal():
        return items[int(entry)][1] if int(entry) < len(items) else None
    fitting = [item for name, item in items if entry and name and name.startswith(entry)]
    return fitting[0] if fitting else None
