"""Holds an encoder-decoder, before it serves anybody, against transformers' own uncached run."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.core.interface.attention import AttentionBatch
from quire.core.interface.worker import Feature
from quire.core.models.seq2seq.describing import example_source
from quire.core.models.step_context import StepContext, StepFeature
from quire.core.models.transformers_adapter.self_check import relative_difference

if TYPE_CHECKING:
    from quire.core.models.seq2seq.seq2seq_model import Seq2SeqModel
    from quire.core.models.seq2seq.source_model import SourceModel

_LENGTHS = (21, 17)
_SOURCES = (19, 11)
_CAUSAL = 1e-2
"""So little may logits differ with the tokens that follow, by rounding alone."""
_STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 7),),
    ((0, 1), (1, 9)),
    ((0, 8), (1, 1)),
    ((1, 6), (0, 1)),
    ((0, 4), (1, 1)),
)
"""(text, tokens) of each step; a text's source is encoded in its first."""


def deviation_of(model: Seq2SeqModel, config: Any) -> float | str:
    """How far logits are from those of the model's own run, or why it cannot be run."""
    try:
        with torch.no_grad():
            return _deviation(model, config)
    # The model's own code, in a way that its authors may not have thought of.
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _deviation(model: Seq2SeqModel, config: Any) -> float:
    source_model = model.source_model
    generator = torch.Generator().manual_seed(11)
    high = min(model.description.vocab_size, 500)
    given = [example_source(source_model, config, n, seed=n) for n in _SOURCES]
    texts = [
        torch.randint(3, high, (n,), generator=generator).to(source_model.device) for n in _LENGTHS
    ]
    name = source_model.input_name
    flat, source_model.flat = source_model.flat, None
    try:
        sources = [source_model.encode([{name: one}])[0] for one in given]
        expected = [
            _own_logits(source_model, text, source).float()
            for text, source in zip(texts, sources, strict=True)
        ]
    finally:
        source_model.flat = flat
    run = _Run(model, texts, given, [len(source) for source in sources])
    for step in _STEPS:
        run.step(step)
    return max(
        relative_difference(torch.cat(rows), want)
        for rows, want in zip(run.logits, expected, strict=True)
    )


def _own_logits(source_model: SourceModel, text: Tensor, source: Tensor) -> Tensor:
    """Of the model's uncached run; of a token at a time where that one lets tokens see later ones.

    Some models make the mask that hides them only for the arguments of their training.
    """
    whole = source_model.whole_logits(text, source)
    shorter = source_model.whole_logits(text[:-3], source)
    if relative_difference(whole[:-3], shorter) <= _CAUSAL:
        return whole
    return source_model.single_logits(text, source)


class _Run:
    """Steps over two texts, with blocks of their own in an order of their own."""

    def __init__(
        self,
        model: Seq2SeqModel,
        texts: Sequence[Tensor],
        given: Sequence[Tensor],
        source_lengths: Sequence[int],
    ) -> None:
        self._model, self._texts, self._given = model, texts, given
        self._source_lengths = source_lengths
        self._computed = [0] * len(texts)
        self.logits: list[list[Tensor]] = [[] for _ in texts]
        self._size = model.attention_groups[0].spec.block_size
        longest = max(*_LENGTHS, *source_lengths)
        count = -(-longest // self._size)
        self._tables = [[2 * i + 1 + text for i in range(count)] for text in range(len(texts))]
        self._caches = [
            backend.allocate(2 * count + 1)
            for group, backend in zip(model.attention_groups, model.attention_backends, strict=True)
            for _ in group.layers
        ]

    def step(self, work: Sequence[tuple[int, int]]) -> None:
        """Runs one step and keeps its logits."""
        begins = [self._computed[text] for text, _ in work]
        ends = [begin + count for (_, count), begin in zip(work, begins, strict=True)]
        spans = list(zip([text for text, _ in work], begins, ends, strict=True))
        device = self._texts[0].device
        context = StepContext(
            token_ids=torch.cat([self._texts[text][a:b] for text, a, b in spans]),
            positions=torch.cat([torch.arange(a, b, device=device) for _, a, b in spans]),
            caches=self._caches,
            plans=[
                backend.plan(self._batch(spans, is_source=group.max_tokens is not None))
                for group, backend in zip(
                    self._model.attention_groups, self._model.attention_backends, strict=True
                )
            ],
            features=[
                self._feature(index, text) for index, (text, a, _) in enumerate(spans) if a == 0
            ],
        )
        rows = self._model.logits(self._model.forward(context))
        for (text, _, b), part in zip(
            spans, rows.split_with_sizes([b - a for _, a, b in spans]), strict=True
        ):
            self._computed[text] = b
            self.logits[text].append(part)

    def _feature(self, index: int, text: int) -> StepFeature:
        model = self._model.source_model
        feature = Feature(
            kind=model.input_kind, key="self-check", num_tokens=self._source_lengths[text]
        )
        arrays = {model.input_name: self._given[text]}
        return StepFeature(request=index, feature=feature, arrays=arrays)

    def _batch(self, spans: Sequence[tuple[int, int, int]], *, is_source: bool) -> AttentionBatch:
        size, device = self._size, self._texts[0].device
        starts = [0]
        slots: list[int] = []
        for text, a, b in spans:
            starts.append(starts[-1] + b - a)
            slots += [self._tables[text][p // size] * size + p % size for p in range(a, b)]
        lengths = [self._source_lengths[text] if is_source else b for text, _, b in spans]

        def on_device(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return AttentionBatch(
            query_start_loc=on_device(starts),
            seq_lens=on_device(lengths),
            block_table=on_device([self._tables[text] for text, _, _ in spans]),
            slot_mapping=torch.tensor([] if is_source else slots, device=device).long(),
            query_start_loc_host=starts,
            seq_lens_host=lengths,
            num_requests=len(spans),
            num_tokens=starts[-1],
            max_query_len=max(b - a for _, a, b in spans),
            max_seq_len=max(lengths),
        )
