"""A loaded model that makes numbers of texts, in the first way that gives its own numbers.

flat        all texts in one row, each attending to itself; nothing padded
by length   texts of the same length together, in the model's own code; nothing padded either
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.core.errors import QuireError
from quire.core.interface.attention import AttentionBackend
from quire.core.interface.worker import PoolingSpec
from quire.core.models.attention_groups import AttentionGroup
from quire.core.models.description import ModelDescription
from quire.core.models.pooling.batch import TextBatch
from quire.core.models.pooling.flat import FlatBody
from quire.core.models.pooling.heads import Head, VectorHead, activated, activation_of

FLAT, BY_LENGTH = "flat", "by length"


class PoolingModel:
    """Answers texts with vectors, labels or scores. Keeps nothing between steps."""

    attention_groups: tuple[AttentionGroup, ...] = ()
    attention_backends: Sequence[AttentionBackend] = ()
    can_be_recorded = False

    def __init__(
        self,
        model: Any,
        description: ModelDescription,
        vectors: VectorHead | None,
        *,
        max_model_len: int,
    ) -> None:
        """`vectors`: of a model that makes vectors; else the model's own head answers."""
        self.description = description
        self.max_model_len = max_model_len
        self.num_parameters = description.num_parameters
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        self.way = BY_LENGTH
        self.head_reads = "all"
        """Which rows of a text the head needs: `first`, `last`, `all`, or `each` of them."""
        self.model = model
        self._vectors = vectors
        self._body = model if vectors is not None else getattr(model, "base_model", model)
        self._takes = set(inspect.signature(model.forward).parameters)
        self.flat = FlatBody(self._body, set(inspect.signature(self._body.forward).parameters))
        self._head = Head(model, self._body)
        self._activation = "none" if vectors is not None else activation_of(model.config)

    def providers(self) -> dict[str, str]:
        """Everything is transformers' but the attention of the flat way."""
        return {"forward": f"transformers ({self.way})"}

    # --- numbers before activation --------------------------------------------------------------

    def raw(self, batch: TextBatch) -> list[Tensor]:
        """For each text: rows [n, H] of a model that makes vectors, else logits [L] or [n, L]."""
        if self.way == BY_LENGTH:
            return self._raw_by_length(batch)
        hidden = self.flat.run(batch)
        num_texts = len(batch.lengths)
        if self._vectors is not None:
            return [batch.rows(hidden, index) for index in range(num_texts)]
        return self._from_head(batch, hidden)

    def _from_head(self, batch: TextBatch, hidden: Tensor) -> list[Tensor]:
        kept, texts = self.flat.output, range(len(batch.lengths))
        if self.head_reads == "each":
            logits = self._head.logits(hidden.unsqueeze(0), batch.token_ids.unsqueeze(0), kept)
            return [batch.rows(logits[0], index) for index in texts]
        if self.head_reads == "all":
            return [
                self._head.logits(
                    batch.rows(hidden, index).unsqueeze(0),
                    batch.rows(batch.token_ids, index).unsqueeze(0),
                    kept,
                )[0]
                for index in texts
            ]
        last = 0 if self.head_reads == "first" else 1
        places = [
            begin + last * (length - 1)
            for begin, length in zip(batch.starts, batch.lengths, strict=True)
        ]
        index = torch.tensor(places, device=hidden.device)
        rows, ids = hidden[index].unsqueeze(1), batch.token_ids[index].unsqueeze(1)
        return list(self._head.logits(rows, ids, kept))

    def _raw_by_length(self, batch: TextBatch) -> list[Tensor]:
        found: list[Tensor | None] = [None] * len(batch.lengths)
        for indices in batch.by_length.values():
            # A head may look for padding, which more than one text without such a token forbids.
            at_once = [indices] if self._vectors is not None else [[index] for index in indices]
            for some in at_once:
                for index, part in zip(some, self._run_own(batch, some), strict=True):
                    found[index] = part
        return [part for part in found if part is not None]

    def _run_own(self, batch: TextBatch, indices: Sequence[int]) -> Tensor:
        """The model's own run of texts of one length: [R, ...]."""
        ids = torch.stack([batch.rows(batch.token_ids, index) for index in indices])
        arguments: dict[str, Any] = {"input_ids": ids}
        if batch.token_types is not None and "token_type_ids" in self._takes:
            types = [batch.rows(batch.token_types, index) for index in indices]
            arguments["token_type_ids"] = torch.stack(types)
        if "use_cache" in self._takes:
            arguments["use_cache"] = False
        output = self.model(**arguments)
        result: Tensor = output[0] if self._vectors is not None else output.logits
        return result

    # --- answers --------------------------------------------------------------------------------

    def answers(self, batch: TextBatch, specs: Sequence[PoolingSpec]) -> list[Tensor]:
        """float32 [n] or [tokens, n] for each text, on the device."""
        raw = self.raw(batch)
        if self._vectors is None:
            return [self._labelled(logits, spec) for logits, spec in zip(raw, specs, strict=True)]
        wanted = [index for index, spec in enumerate(specs) if spec.task == "embed"]
        vectors = self._vectors.vectors([raw[index] for index in wanted]) if wanted else None
        found = [rows.float() for rows in raw]
        for place, index in enumerate(wanted):
            assert vectors is not None, wanted
            found[index] = vectors[place]
        return [
            self._vectors.finish(one, dimensions=spec.dimensions, is_normalized=spec.use_activation)
            if spec.task == "embed"
            else _rows(one, spec)
            for one, spec in zip(found, specs, strict=True)
        ]

    def _labelled(self, logits: Tensor, spec: PoolingSpec) -> Tensor:
        if spec.task == "reward" or not spec.use_activation:
            return logits.float()
        return activated(logits.float(), self._activation)

    def problem_of(self, spec: PoolingSpec) -> str | None:
        """Why a request cannot be answered; None: it can."""
        pooling = self.description.pooling
        assert pooling is not None, self.description
        if spec.task not in pooling.tasks:
            return f"{spec.task} was asked; this model does {', '.join(pooling.tasks)}"
        if spec.dimensions is not None and not 1 <= spec.dimensions <= pooling.vector_size:
            return f"{spec.dimensions} dimensions were asked; there are {pooling.vector_size}"
        return None

    def forward(self, step: object) -> Tensor:
        """There is no next token. Raises: QuireError."""
        raise QuireError(f"{self.description.architecture} makes numbers of texts, no tokens")


def _rows(rows: Tensor, spec: PoolingSpec) -> Tensor:
    if spec.dimensions is not None:
        rows = rows[:, : spec.dimensions]
    return torch.nn.functional.normalize(rows, dim=-1) if spec.use_activation else rows
