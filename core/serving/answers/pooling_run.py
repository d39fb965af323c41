"""Several texts at once through `AsyncEngine.pool`, and scores made of what comes back."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from quire.core.engine.pooling import PoolingOutput, PoolingParams, check_task
from quire.core.errors import RequestError
from quire.core.serving.protocol.pooling import PoolingUsage, Prompt
from quire.core.serving.server_state import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRun:
    """One HTTP request's way to the engine."""

    server: ServerState
    engine_id: str
    add_special_tokens: bool

    async def outputs(
        self,
        prompts: Sequence[Prompt],
        params: PoolingParams,
        pairs: Sequence[str] | None = None,
    ) -> list[PoolingOutput]:
        """What came of each prompt, or of each with its pair; if one fails, none goes on.

        Raises: RequestError, QueueFullError, EngineDeadError.
        """
        self._check(len(prompts), params)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        self._one(prompt, params, index, None if pairs is None else pairs[index])
                    )
                    for index, prompt in enumerate(prompts)
                ]
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return [task.result() for task in tasks]

    async def scores(
        self, pairs: Sequence[tuple[str, str]], *, use_activation: bool, truncate: int | None
    ) -> tuple[list[float], PoolingUsage]:
        """How well the texts of each pair go together.

        A model that reads both at once says so itself; of one that makes vectors it is their
        cosine. Raises: as `outputs`.
        """
        first, second = [one for one, _ in pairs], [two for _, two in pairs]
        if "embed" in self.server.engine.facts.tasks:
            params = PoolingParams(task="embed", truncate_prompt_tokens=truncate)
            # Each text once: the query of a ranking is the same in all pairs.
            texts = list(dict.fromkeys([*first, *second]))
            found = dict(zip(texts, await self.outputs(texts, params), strict=True))
            scores = [_cosine(found[one].data, found[two].data) for one, two in pairs]
            return scores, usage_of(list(found.values()))
        params = PoolingParams(
            task="score", use_activation=use_activation, truncate_prompt_tokens=truncate
        )
        outputs = await self.outputs(first, params, second)
        return [float(np.ravel(output.data)[0]) for output in outputs], usage_of(outputs)

    async def _one(
        self, prompt: Prompt, params: PoolingParams, index: int, pair: str | None
    ) -> PoolingOutput:
        asked = self.server.engine.pool(
            prompt,
            params,
            f"{self.engine_id}-{index}",
            pair=pair,
            add_special_tokens=self.add_special_tokens,
        )
        return await self.server.metrics.pooled(params.task, asked)

    def _check(self, num_prompts: int, params: PoolingParams) -> None:
        facts = self.server.engine.facts
        check_task(params.task, facts.tasks, facts.served_model_name)
        limit = self.server.settings.max_outputs
        if num_prompts > limit:
            raise RequestError(
                f"{num_prompts} texts were given; this server takes at most {limit} in one request",
                param="input",
            )


def usage_of(outputs: Sequence[PoolingOutput]) -> PoolingUsage:
    """The tokens of all texts."""
    num_tokens = sum(output.num_prompt_tokens for output in outputs)
    return PoolingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)


def encoded(data: list[float] | list[list[float]], encoding: str | None) -> list[float] | str:
    """A vector as the client wants it: numbers, or little-endian float32 in base64."""
    flat: list[float] = list(chain.from_iterable(data)) if _is_rows(data) else data  # type: ignore[arg-type,assignment]
    if encoding == "base64":
        return base64.b64encode(np.asarray(flat, dtype="<f4").tobytes()).decode()
    return flat


def _is_rows(data: list[float] | list[list[float]]) -> bool:
    return bool(data) and isinstance(data[0], list)


def _cosine(one: list[float] | list[list[float]], two: list[float] | list[list[float]]) -> float:
    first, second = np.asarray(one, np.float64), np.asarray(two, np.float64)
    length = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / length if length else 0.0
