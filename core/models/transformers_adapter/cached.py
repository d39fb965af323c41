"""The cached way: request by request, with a transformers Cache filled from pages and read back.

Right wherever transformers' own cached generation is, whatever the model does with its cache:
ALiBi, positions taken from the cache's length, convolutions and recurrent states. Slower than the
paged way, since requests do not share a run.

Two runs of different length on an empty cache tell which of its tensors grow with the tokens (keys,
values, index keys), and which keep their size (states). The former are kept a token a slot, the
latter a block at a time: block i of a request holds the states after its last token computed there,
so a run ends at every block boundary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.errors import QuireError
from quire.core.interface.attention import AttentionBackend, AttentionSpec, LayerCache
from quire.core.models.attention_groups import AttentionGroup, PageTensor
from quire.core.models.description import ModelDescription
from quire.core.models.step_context import StepContext
from quire.core.models.transformers_adapter.adapted_model import AdaptedModel, layers_in_order
from quire.core.models.transformers_adapter.hearing import senses_of
from quire.core.models.transformers_adapter.pages import (
    PagesPlan,
    RequestSlice,
    read_slots,
    write_slots,
)
from quire.core.models.transformers_adapter.seeing import Seen
from quire.core.models.transformers_adapter.text_model import RunOutput, TextModel

_SHORT, _LONG = 5, 11
"""Tokens of the two runs; no state has both as sizes of the same dimension."""
_LENGTH = "length"
"""A page that says after how many tokens its states were written."""


class NotPageable(Exception):  # noqa: N818 - an answer, not an error
    """A model's cache is of a form that pages cannot hold; its text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePart:
    """One tensor of a transformers cache."""

    path: tuple[Any, ...]
    token_dim: int | None
    """Which dimension grows with the tokens; None: a state."""
    shape: tuple[int, ...]
    """Of one token, or of the whole state, without the batch."""
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheForm:
    """What a model's cache is made of, and one to copy the rest from."""

    prototype: Any
    parts: tuple[CachePart, ...]
    lengths: tuple[tuple[Any, ...], ...]
    """Paths of plain numbers that count the tokens."""
    make_empty: Callable[[], Any]

    @property
    def token_parts(self) -> tuple[int, ...]:
        """Indices of the parts that grow."""
        return tuple(i for i, part in enumerate(self.parts) if part.token_dim is not None)

    @property
    def state_parts(self) -> tuple[int, ...]:
        """Indices of the states."""
        return tuple(i for i, part in enumerate(self.parts) if part.token_dim is None)


# --- the form of a cache ------------------------------------------------------------------------


def find_form(text_model: TextModel) -> CacheForm:
    """Runs two short texts and compares their caches. Works on the meta device as well.

    Raises: NotPageable.
    """
    if text_model.cache_name is None:
        raise NotPageable("its forward takes no cache")
    make_empty = _cache_maker(text_model)
    short, long = (_filled(text_model, make_empty, n) for n in (_SHORT, _LONG))
    leaves, longer = dict(_leaves(short)), dict(_leaves(long))
    if not leaves or leaves.keys() != longer.keys():
        raise NotPageable("its cache changes its form with the text")
    parts, lengths = [], []
    for path, leaf in leaves.items():
        other = longer[path]
        if isinstance(leaf, Tensor):
            parts.append(_part(path, leaf, other))
        elif leaf != other:
            if (leaf, other) != (_SHORT, _LONG):
                raise NotPageable(f"its cache counts something at {path}")
            lengths.append(path)
    if not parts:
        raise NotPageable("it keeps nothing in its cache")
    return CacheForm(
        prototype=short, parts=tuple(parts), lengths=tuple(lengths), make_empty=make_empty
    )


def _cache_maker(text_model: TextModel) -> Callable[[], Any]:
    """Empty caches in which nothing is thrown away behind a window."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if text_model.cache_name not in ("past_key_values", "cache_params"):
        return lambda: None
    probe = _filled(text_model, lambda: None, 2)
    if type(probe) is not DynamicCache:
        return lambda: None

    make_layer: Any = DynamicLayer

    def make() -> Any:
        cache = DynamicCache(config=text_model.config)
        cache.layers = [
            make_layer() if type(layer) is DynamicSlidingWindowLayer else layer
            for layer in cache.layers
        ]
        return cache

    return make


def _filled(text_model: TextModel, make_empty: Callable[[], Any], num_tokens: int) -> Any:
    device = text_model.device
    token_ids = torch.arange(3, 3 + num_tokens, device=device)
    positions = torch.arange(num_tokens, device=device)
    output = text_model.run(token_ids, positions, cache=make_empty(), keeps_cache=True)
    if output.cache is None:
        raise NotPageable("it returns no cache")
    return output.cache


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Tensors and numbers of a cache, with the way to them."""
    if isinstance(node, Tensor) or (isinstance(node, int) and not isinstance(node, bool)):
        yield path, node
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _leaves(child, (*path, index))
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, (*path, key))
    elif _is_cache_object(node):
        for name, child in vars(node).items():
            yield from _leaves(child, (*path, name))


def _is_cache_object(node: Any) -> bool:
    name = type(node).__name__
    return hasattr(node, "__dict__") and ("Cache" in name or "Layer" in name)


def _part(path: tuple[Any, ...], short: Tensor, long: Tensor) -> CachePart:
    grown = [
        dim
        for dim, (a, b) in enumerate(zip(short.shape, long.shape, strict=False))
        if (a, b) == (_SHORT, _LONG)
    ]
    is_same = short.shape == long.shape
    if short.ndim != long.ndim or (not is_same and len(grown) != 1) or short.shape[:1] != (1,):
        raise NotPageable(f"its cache has a tensor {list(short.shape)} that grows in its own way")
    dim = None if is_same else grown[0]
    shape = tuple(size for index, size in enumerate(short.shape) if index not in (0, dim))
    return CachePart(
        path=path, token_dim=dim, shape=shape, dtype=str(short.dtype).removeprefix("torch.")
    )


# --- groups -------------------------------------------------------------------------------------


def cached_groups(
    form: CacheForm, *, dtype: str, cache_dtype: str, block_size: int
) -> tuple[AttentionGroup, ...]:
    """One group for what grows, one for states; each has one layer, which holds all its parts."""
    groups = []
    if form.token_parts:
        pages = [_page(form, i, is_per_token=True) for i in form.token_parts]
        spec = own_spec(dtype=dtype, cache_dtype=cache_dtype, block_size=block_size)
        groups.append(AttentionGroup(name="full", spec=spec, layers=(0,), pages=tuple(pages)))
    if form.state_parts:
        pages = [_page(form, i, is_per_token=False) for i in form.state_parts]
        pages.append(PageTensor(name=_LENGTH, shape=(1,), is_per_token=False, dtype="int64"))
        spec = own_spec(
            dtype=dtype, cache_dtype=cache_dtype, block_size=block_size, kind="recurrent"
        )
        layer = len(groups)
        groups.append(AttentionGroup(name="state", spec=spec, layers=(layer,), pages=tuple(pages)))
    return tuple(groups)


def own_spec(
    *, dtype: str, cache_dtype: str, block_size: int, kind: str = "causal"
) -> AttentionSpec:
    """The spec of pages that a model keeps itself, of which only the blocks matter."""
    return AttentionSpec(
        num_heads=1,
        num_kv_heads=1,
        head_size=1,
        v_head_size=1,
        scale=1.0,
        dtype=dtype,
        cache_dtype=cache_dtype,
        block_size=block_size,
        kind=kind,
    )


def _page(form: CacheForm, index: int, *, is_per_token: bool) -> PageTensor:
    part = form.parts[index]
    shape = part.shape or (1,)
    return PageTensor(name=f"part{index}", shape=shape, is_per_token=is_per_token, dtype=part.dtype)


# --- running ------------------------------------------------------------------------------------


class CachedModel(AdaptedModel):
    """Runs each request with a cache of its own.

    `runs_later_chunks`: whether a chunk after the first may have more than one token; some models
    compute another thing then, in transformers too.
    """

    def __init__(
        self,
        text_model: TextModel,
        description: ModelDescription,
        backends: Sequence[AttentionBackend],
        form: CacheForm,
        *,
        max_model_len: int,
        runs_later_chunks: bool,
    ) -> None:
        super().__init__(text_model, description, backends, max_model_len=max_model_len)
        self._form = form
        self._runs_later_chunks = runs_later_chunks
        self.way = "cached" if runs_later_chunks else "cached, a token at a time"
        self._group_of = layers_in_order(self.attention_groups)
        make, sight = senses_of(text_model.model.config, description.accepts)
        self._eyes = None if sight is None else make(text_model, sight)

    def forward(self, step: StepContext) -> Tensor:
        """Runs the requests of a step one after the other; rows [T, H]."""
        rows: list[Tensor] = []
        plan = _pages_plan(step.plans[0])
        has_images = bool(step.images) and self._eyes is not None
        seen = self._eyes.look(step) if has_images and self._eyes is not None else None
        for index in range(len(plan.requests)):
            rows.extend(self._run_request(step, index, seen))
        hidden = torch.cat(rows)
        padding = len(step.token_ids) - len(hidden)
        return hidden if padding == 0 else torch.cat([hidden, hidden[-1:].expand(padding, -1)])

    def _run_request(self, step: StepContext, index: int, seen: Seen | None) -> Iterator[Tensor]:
        request = _pages_plan(step.plans[0]).requests[index]
        stores = self._stores(step, index)
        cache = self._form.make_empty() if request.num_past == 0 else self._read(stores, request)
        first, begin = request.begin - request.num_past, request.num_past
        shows_images = any(images.begin == request.begin for images in step.images)
        for end in self._piece_ends(request):
            rows = slice(first + begin, first + end)
            output = self._run_piece(step, rows, cache, seen if shows_images else None)
            cache = output.cache
            for store in stores:
                store.write(cache, begin, end)
            yield output.hidden
            begin = end

    def _run_piece(
        self, step: StepContext, rows: slice, cache: Any, seen: Seen | None
    ) -> RunOutput:
        """Some tokens of one request; `seen` if it shows images."""
        if seen is not None and self._eyes is not None:
            return self._eyes.run_cached(seen, rows, cache)
        return self._text_model.run(
            step.token_ids[rows], step.positions[rows], cache=cache, keeps_cache=True
        )

    def _piece_ends(self, request: RequestSlice) -> list[int]:
        """Where runs end: at block boundaries for states, or after each token."""
        begin, end = request.num_past, request.num_past + request.num_new
        ends = {end}
        if self._form.state_parts:
            size = self.attention_groups[0].spec.block_size
            ends |= set(range(begin - begin % size + size, end, size))
        if not self._runs_later_chunks:
            first = min(ends) if begin == 0 else begin
            ends |= set(range(first, end)) - {begin}
        return sorted(ends)

    def _stores(self, step: StepContext, index: int) -> list[_Store]:
        stores: list[_Store] = []
        kinds: list[tuple[type[_Store], tuple[int, ...]]] = []
        if self._form.token_parts:
            kinds.append((_TokenStore, self._form.token_parts))
        if self._form.state_parts:
            kinds.append((_StateStore, self._form.state_parts))
        for layer, (kind, parts) in enumerate(kinds):
            plan = _pages_plan(step.plans[self._group_of[layer]])
            stores.append(kind(self._form, parts, plan, plan.requests[index], step.caches[layer]))
        return stores

    def _read(self, stores: list[_Store], request: RequestSlice) -> Any:
        """A transformers cache as it was after the request's last token."""
        form = self._form
        memo: dict[int, Any] = {}
        for store in stores:
            for index, tensor in store.read(request.num_past).items():
                memo[id(_at(form.prototype, form.parts[index].path))] = tensor
        cache = copy.deepcopy(form.prototype, memo)
        for path in form.lengths:
            _put(cache, path, request.num_past)
        return cache


class _Store:
    """Parts of one request's cache in the pages of one group."""

    def __init__(
        self,
        form: CacheForm,
        parts: tuple[int, ...],
        plan: PagesPlan,
        request: RequestSlice,
        cache: LayerCache,
    ) -> None:
        self._form = form
        self._parts = parts
        self._plan = plan
        self._request = request
        self._tensors = cache.tensors

    def read(self, num_past: int) -> dict[int, Tensor]:
        """Each part as it was after `num_past` tokens."""
        raise NotImplementedError

    def write(self, cache: Any, begin: int, end: int) -> None:
        """Keeps what tokens [begin, end) have left."""
        raise NotImplementedError


class _TokenStore(_Store):
    """Keys, values and what else grows: a token a slot."""

    def read(self, num_past: int) -> dict[int, Tensor]:
        slots = self._plan.slots(self._request, num_past)
        found = {}
        for index in self._parts:
            part = self._form.parts[index]
            rows = read_slots(self._tensors[f"part{index}"], slots).view(num_past, *part.shape)
            assert part.token_dim is not None, part
            found[index] = rows.movedim(0, part.token_dim - 1).unsqueeze(0).contiguous()
        return found

    def write(self, cache: Any, begin: int, end: int) -> None:
        request = self._request
        first = request.begin - request.num_past
        slots = self._plan.slot_mapping[first + begin : first + end]
        for index in self._parts:
            part = self._form.parts[index]
            tensor = _at(cache, part.path)
            assert part.token_dim is not None, part
            if tensor.shape[part.token_dim] != end:
                raise QuireError(
                    f"the model's cache holds {tensor.shape[part.token_dim]} tokens where {end} "
                    "were computed; report this architecture"
                )
            new = tensor.narrow(part.token_dim, begin, end - begin)[0]
            new = new.movedim(part.token_dim - 1, 0)
            page = self._tensors[f"part{index}"]
            write_slots(page, slots, new.reshape(end - begin, *page.shape[2:]))


class _StateStore(_Store):
    """States: all of them once a block."""

    def read(self, num_past: int) -> dict[int, Tensor]:
        block = self._plan.block(self._request, num_past - 1)
        written = int(self._tensors[_LENGTH].index_select(0, block))
        if written != num_past:
            raise QuireError(
                f"the states of a request are those after {written} tokens, not {num_past}; "
                "the step that should have left them failed. Abort the request"
            )
        return {
            index: self._tensors[f"part{index}"]
            .index_select(0, block)
            .view(1, *self._form.parts[index].shape)
            .clone()
            for index in self._parts
        }

    def write(self, cache: Any, begin: int, end: int) -> None:
        block = self._plan.block(self._request, end - 1)
        for index in self._parts:
            state = _at(cache, self._form.parts[index].path)
            page = self._tensors[f"part{index}"]
            page.index_copy_(0, block, state.reshape(1, *page.shape[1:]).to(page.dtype))
        lengths = self._tensors[_LENGTH]
        lengths.index_copy_(0, block, torch.full((1, 1), end, device=lengths.device))


def _pages_plan(plan: object) -> PagesPlan:
    assert isinstance(plan, PagesPlan), plan
    return plan


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key] if isinstance(node, (list, tuple, dict)) else getattr(node, key)
    return node


def _put(node: Any, path: tuple[Any, ...], value: int) -> None:
    parent = _at(node, path[:-1])
    if isinstance(parent, (list, dict)):
        parent[path[-1]] = value
    else:
        setattr(parent, path[-1], value)
