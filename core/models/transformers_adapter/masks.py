"""Which tokens a mask lets a token see: recognized by asking transformers' own mask function.

While probing, the mask that a model gets is a tensor that remembers what it stands for. If the
model changes it on the way to its attention (adds a bias, drops rows), the memory is lost, and
attention that would ignore the change is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_QUERIES = (0, 1, 2, 7, 16, 31, 63, 100, 511, 1000, 4100, 9001, 33333, 70001)
"""Positions whose rows of a mask are looked at."""
_MAX_POSITION = 131072


@dataclass(frozen=True, slots=True)
class Visibility:
    """What a token sees: all before it, a window, or its own chunk."""

    kind: str
    """`causal`, `sliding_window`, `chunked`; `other`: none of these."""
    window: int | None = None


OTHER = Visibility("other")


class MarkedMask(Tensor):
    """A mask of zeros that knows its `visibility` as long as nobody changes its content."""

    visibility: Visibility

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result: Any = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        source = args[0] if args else None
        if isinstance(result, MarkedMask):
            is_same = (
                isinstance(source, MarkedMask)
                and getattr(func, "__name__", "") in _HARMLESS
                and result.shape[-2:] == source.shape[-2:]
            )
            kept = getattr(source, "visibility", OTHER) if is_same else OTHER
            result.visibility = kept
        return result


_HARMLESS = {
    *("__getitem__", "to", "contiguous", "expand", "view", "reshape", "unsqueeze", "squeeze"),
    *("clone", "float", "half", "bfloat16", "type", "bool", "detach", "type_as"),
}


def make_marked_mask(visibility: Visibility, length: int, device: torch.device) -> Tensor:
    """A mask bool [1, 1, length, length] of that visibility, all True."""
    mask = torch.ones((1, 1, length, length), dtype=torch.bool, device=device)
    marked = mask.as_subclass(MarkedMask)
    marked.visibility = visibility
    return marked


def recognize(mask_function: Callable[..., Any]) -> Visibility:
    """The visibility of a function (batch, head, query, key) -> bool; `OTHER` if not a plain one.

    Rows at many positions are held against what the kind would let them see.
    """
    try:
        rows = [(query, _row(mask_function, query)) for query in _QUERIES]
    # A function may look into tensors of the probe's own length.
    except (IndexError, RuntimeError, TypeError):
        return OTHER
    for visibility in _candidates(rows[-1][0], rows[-1][1]):
        if all(bool((row == _expected(visibility, query)).all()) for query, row in rows):
            return visibility
    return OTHER


def _row(mask_function: Callable[..., Any], query: int) -> Tensor:
    zero = torch.tensor(0)
    keys = torch.arange(_MAX_POSITION)
    sees = mask_function(zero, zero, torch.tensor(query), keys)
    return torch.as_tensor(sees).expand(_MAX_POSITION)


def _candidates(query: int, row: Tensor) -> list[Visibility]:
    seen = row.nonzero().flatten()
    if not len(seen):
        return []
    reach = query - int(seen[0])
    if reach == query:
        return [Visibility("causal")]
    chunks = [Visibility("chunked", size) for size in _divisors(query - reach) if size > reach]
    return [Visibility("sliding_window", reach + 1), *chunks]


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _expected(visibility: Visibility, query: int) -> Tensor:
    keys = torch.arange(_MAX_POSITION)
    sees = keys <= query
    if visibility.kind == "sliding_window" and visibility.window is not None:
        return sees & (keys > query - visibility.window)
    if visibility.kind == "chunked" and visibility.window is not None:
        return sees & (keys >= query - query % visibility.window)
    return sees
