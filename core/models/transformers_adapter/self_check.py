"""A model's way of running, held against the model's own run before the first request.

Two texts of random tokens go through in chunks, single tokens and mixed steps, on the weights just
loaded. What comes out must be what transformers' own generation computes: a first part with a
cache, then a token at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionBatch, LayerCache
from quire.core.models.step_context import StepContext
from quire.core.models.transformers_adapter.text_model import TextModel

if TYPE_CHECKING:
    from quire.core.models.language_model import LanguageModel

_LENGTHS = (29, 22)
_NUM_FIRST = 17
"""Tokens of the first part of transformers' own run."""
_STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 7),),
    ((0, 1), (1, 9)),
    ((0, 8), (1, 1)),
    ((1, 6), (0, 1)),
    ((0, 12), (1, 6)),
)
"""(text, tokens) of each step."""
_TOLERANCES = {"float64": 1e-6, "float32": 2e-3, "float16": 0.06, "bfloat16": 0.2}
"""Of the norm of the difference, relative to that of the logits around their mean."""


@dataclass(frozen=True, slots=True)
class OwnRun:
    """Two texts, and the logits that transformers' own run gives after each of their tokens."""

    texts: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


def run_own(text_model: TextModel, vocab_size: int) -> OwnRun:
    """transformers' own run of two random texts."""
    generator = torch.Generator().manual_seed(11)
    high = max(4, min(vocab_size, int(text_model.config.vocab_size)))
    texts = tuple(
        torch.randint(3, high, (n,), generator=generator).to(text_model.device) for n in _LENGTHS
    )
    with torch.no_grad():
        return OwnRun(texts, tuple(_own_logits(text_model, text) for text in texts))


def _own_logits(text_model: TextModel, text: Tensor) -> Tensor:
    """Logits after each token, as generation computes them.

    Raises: Undecided if a text that is cut elsewhere gives other logits.
    """
    positions = torch.arange(len(text), device=text.device)
    if text_model.cache_name is not None:
        try:
            logits = _generated(text_model, text, positions, _NUM_FIRST)
            at_once = _generated(text_model, text, positions, len(text))
        # Some models offer a cache that their own code cannot use.
        except Exception:  # noqa: S110
            pass
        else:
            _hold(logits, at_once, str(next(text_model.model.parameters()).dtype))
            return logits
    return text_model.whole_logits(text, positions).float()


class Undecided(Exception):  # noqa: N818 - an answer, not an error
    """transformers' own runs of one text disagree; its text says how far."""


def _hold(logits: Tensor, at_once: Tensor, dtype: str) -> None:
    off = relative_difference(logits, at_once)
    if off > tolerance(dtype.removeprefix("torch.")):
        raise Undecided(
            f"its logits depend on how a text is cut, by {off:.2g} of their spread, with a cache "
            "of its own too"
        )


def _generated(text_model: TextModel, text: Tensor, positions: Tensor, num_first: int) -> Tensor:
    """A first part of `num_first` tokens, then a token at a time."""
    rows = []
    cache: Any = None
    begin = 0
    for end in range(num_first, len(text) + 1):
        part = slice(begin, end)
        output = text_model.run(text[part], positions[part], cache=cache, keeps_cache=True)
        cache, begin = output.cache, end
        if cache is None:
            raise LookupError("no cache came back")
        rows.append(text_model.logits(output.hidden))
    return torch.cat(rows)


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of the logits around their mean; inf if not finite."""
    spread = (want - want.mean(-1, keepdim=True)).norm()
    off = (got - want).norm() / spread.clamp_min(1e-9)
    return float(off) if torch.isfinite(off) else math.inf


def deviation(model: LanguageModel, own: OwnRun) -> float:
    """How far the model's logits are from its own run's, relative to their spread."""
    run = _Run(model, own)
    with torch.no_grad():
        for step in _STEPS:
            run.step(step)
    worst = 0.0
    for got, want in zip(run.logits, own.logits, strict=True):
        worst = max(worst, relative_difference(torch.cat(got), want))
    return worst


def tolerance(dtype: str) -> float:
    """The largest deviation that rounding explains."""
    return _TOLERANCES[dtype]


class _Run:
    """Steps over two texts, with blocks of their own in an order of their own."""

    def __init__(self, model: LanguageModel, own: OwnRun) -> None:
        self._model = model
        self._own = own
        self._computed = [0] * len(own.texts)
        self.logits: list[list[Tensor]] = [[] for _ in own.texts]
        self._block_sizes = [group.spec.block_size for group in model.attention_groups]
        self._tables = [self._table(size) for size in self._block_sizes]
        self._caches = self._allocate()

    def _table(self, block_size: int) -> list[list[int]]:
        """Interleaved blocks: text 0 the odd ones, text 1 the even ones, from 1 on."""
        num_blocks = -(-max(_LENGTHS) // block_size)
        return [[2 * i + 1 + text for i in range(num_blocks)] for text in range(len(_LENGTHS))]

    def _allocate(self) -> list[LayerCache]:
        by_layer: dict[int, LayerCache] = {}
        groups = zip(self._model.attention_groups, self._model.attention_backends, strict=True)
        for (group, backend), tables in zip(groups, self._tables, strict=True):
            count = 1 + sum(len(table) for table in tables)
            by_layer |= {layer: backend.allocate(count) for layer in group.layers}
        return [by_layer[layer] for layer in sorted(by_layer)]

    def step(self, work: Sequence[tuple[int, int]]) -> None:
        """Runs one step and keeps its logits."""
        device = self._own.texts[0].device
        begins = [self._computed[text] for text, _ in work]
        tokens = [
            self._own.texts[text][begin : begin + count]
            for (text, count), begin in zip(work, begins, strict=True)
        ]
        positions = [
            torch.arange(begin, begin + count, device=device)
            for (_, count), begin in zip(work, begins, strict=True)
        ]
        backends: Sequence[AttentionBackend] = self._model.attention_backends
        context = StepContext(
            token_ids=torch.cat(tokens),
            positions=torch.cat(positions),
            caches=self._caches,
            plans=[
                backend.plan(self._batch(group, work, begins, device))
                for group, backend in enumerate(backends)
            ],
        )
        rows = self._model.logits(self._model.forward(context))
        for (text, count), part in zip(
            work, rows.split_with_sizes([c for _, c in work]), strict=True
        ):
            self._computed[text] += count
            self.logits[text].append(part)

    def _batch(
        self,
        group: int,
        work: Sequence[tuple[int, int]],
        begins: Sequence[int],
        device: torch.device,
    ) -> AttentionBatch:
        size, tables = self._block_sizes[group], self._tables[group]
        starts = [0]
        slots = []
        for (text, count), begin in zip(work, begins, strict=True):
            starts.append(starts[-1] + count)
            slots += [
                tables[text][p // size] * size + p % size for p in range(begin, begin + count)
            ]
        lengths = [begin + count for (_, count), begin in zip(work, begins, strict=True)]
        int32 = {"dtype": torch.int32, "device": device}
        return AttentionBatch(
            query_start_loc=torch.tensor(starts, **int32),  # type: ignore[arg-type]
            seq_lens=torch.tensor(lengths, **int32),  # type: ignore[arg-type]
            block_table=torch.tensor([tables[text] for text, _ in work], **int32),  # type: ignore[arg-type]
            slot_mapping=torch.tensor(slots, device=device),
            query_start_loc_host=starts,
            seq_lens_host=lengths,
            num_requests=len(work),
            num_tokens=starts[-1],
            max_query_len=max(count for _, count in work),
            max_seq_len=max(lengths),
        )
