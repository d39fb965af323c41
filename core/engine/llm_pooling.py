"""The offline front of models that make numbers of texts.

llm = LLM(model="/models/all-MiniLM-L6-v2")
for output in llm.embed(["one text", "another"]):
    print(output.outputs.embedding[:4])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from quire.core.engine.client import CoreClient
from quire.core.engine.facts import EngineFacts
from quire.core.engine.front import Front
from quire.core.engine.interrupts import DeferredInterrupts
from quire.core.engine.pooling import (
    POOLING_TASKS,
    PoolingOutput,
    PoolingParams,
    PoolingTask,
    check_task,
)
from quire.core.engine.pooling_desk import Answer
from quire.core.engine.pooling_outputs import (
    Classification,
    Embedding,
    PooledRequest,
    PoolingData,
    Score,
)
from quire.core.engine.progress import ProgressBar
from quire.core.engine.prompts import Prompt, split_prompts
from quire.core.errors import EngineDeadError, QuireError, RequestError
from quire.core.scheduler.request import RequestSpec


class PoolingMethods:
    """What `LLM` does with such a model."""

    facts: EngineFacts
    _front: Front
    _client: CoreClient
    _num_requests: int

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PooledRequest[Embedding]]:
        """A vector for each text, in order.

        Raises: RequestError, also for a model that makes none; EngineDeadError.
        """
        params = PoolingParams(
            task="embed", dimensions=dimensions, truncate_prompt_tokens=truncate_prompt_tokens
        )
        found = self._pool(split_prompts(prompts), params, use_tqdm=use_tqdm)
        return [_with(one, Embedding(embedding=one.outputs.data)) for one in found]  # type: ignore[arg-type]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        use_activation: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PooledRequest[Classification]]:
        """Probabilities of the labels for each text, in the order of `facts.labels`.

        Raises: as `embed`.
        """
        params = PoolingParams(
            task="classify",
            use_activation=use_activation,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        found = self._pool(split_prompts(prompts), params, use_tqdm=use_tqdm)
        return [_with(one, Classification(probs=one.outputs.data)) for one in found]  # type: ignore[arg-type]

    def reward(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PooledRequest[PoolingData]]:
        """A reward model's number for each text, as its head says it. Raises: as `embed`."""
        params = PoolingParams(task="reward", truncate_prompt_tokens=truncate_prompt_tokens)
        return self._pool(split_prompts(prompts), params, use_tqdm=use_tqdm)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        *,
        pooling_task: PoolingTask | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PooledRequest[PoolingData]]:
        """What the model makes of each text: `pooling_task`, or the first that it does.

        Raises: as `embed`.
        """
        if pooling_params is None:
            pooling_params = PoolingParams(
                task=pooling_task or self._first_task(),
                truncate_prompt_tokens=truncate_prompt_tokens,
            )
        return self._pool(split_prompts(prompts), pooling_params, use_tqdm=use_tqdm)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        use_tqdm: bool = True,
        *,
        use_activation: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PooledRequest[Score]]:
        """How well one text goes with each of several, or each with its own.

        A model that makes vectors answers with their cosine. Raises: as `embed`.
        """
        pairs = _pairs(data_1, data_2)
        if "embed" in self.facts.tasks:
            return self._cosines(pairs, truncate_prompt_tokens, use_tqdm=use_tqdm)
        params = PoolingParams(
            task="score",
            use_activation=use_activation,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )
        first, second = [one for one, _ in pairs], [two for _, two in pairs]
        found = self._pool(first, params, pairs=second, use_tqdm=use_tqdm)
        return [_with(one, Score(score=float(one.outputs.data[0]))) for one in found]  # type: ignore[arg-type]

    # --- helpers --------------------------------------------------------------------------------

    def _cosines(
        self, pairs: list[tuple[str, str]], truncate: int | None, *, use_tqdm: bool
    ) -> list[PooledRequest[Score]]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        made = self.embed(texts, use_tqdm, truncate_prompt_tokens=truncate)
        by_text = dict(zip(texts, made, strict=True))
        answers = []
        for one, two in pairs:
            first, second = by_text[one], by_text[two]
            score = _cosine(first.outputs.embedding, second.outputs.embedding)
            ids = [*first.prompt_token_ids, *second.prompt_token_ids]
            answers.append(
                PooledRequest(
                    request_id=f"{first.request_id}+{second.request_id}",
                    outputs=Score(score=score),
                    prompt_token_ids=ids,
                )
            )
        return answers

    def _first_task(self) -> PoolingTask:
        tasks = self.facts.tasks
        for task in POOLING_TASKS:
            if task in tasks:
                return task
        check_task("embed", tasks, self.facts.served_model_name)
        raise AssertionError(tasks)

    def _pool(
        self,
        prompts: Sequence[Prompt],
        params: PoolingParams,
        *,
        pairs: Sequence[str] | None = None,
        use_tqdm: bool,
    ) -> list[PooledRequest[PoolingData]]:
        specs = []
        for index, prompt in enumerate(prompts):
            request_id = str(self._num_requests + index)
            pair = None if pairs is None else pairs[index]
            specs.append(self._front.pooling.prepare(prompt, params, request_id, pair=pair))
        self._num_requests += len(specs)
        done = self._run_pooling(specs, use_tqdm=use_tqdm)
        for answer in done.values():
            if isinstance(answer, QuireError):
                raise answer
        return [
            PooledRequest(
                request_id=spec.request_id,
                outputs=PoolingData(data=_output(done[spec.request_id]).data),
                prompt_token_ids=spec.prompt_token_ids,
            )
            for spec in specs
        ]

    def _run_pooling(self, specs: Sequence[RequestSpec], *, use_tqdm: bool) -> dict[str, Answer]:
        done: dict[str, Answer] = {}
        desk = self._front.pooling
        with (
            DeferredInterrupts() as interrupts,
            ProgressBar(len(specs), is_wanted=use_tqdm) as progress,
        ):

            def follow(spec: RequestSpec) -> None:
                def take(answer: Answer) -> None:
                    done[spec.request_id] = answer
                    progress.advance(0)

                desk.add(spec, take)

            try:
                for spec in specs:
                    follow(spec)
                self._client.add(specs)
                while len(done) < len(specs):
                    interrupts.check()
                    desk.process(self._client.receive())
            except BaseException:
                self._abandon_pooling(specs)
                raise
        return done

    def _abandon_pooling(self, specs: Sequence[RequestSpec]) -> None:
        """Ends requests in the middle; nobody wants their answers."""
        ids = [spec.request_id for spec in specs if self._front.pooling.forget(spec.request_id)]
        try:
            self._client.abort(ids)
        except EngineDeadError:
            return  # whoever waits is told by the error that brought us here


def _with(one: PooledRequest[PoolingData], outputs: Any) -> PooledRequest[Any]:
    return PooledRequest(
        request_id=one.request_id, outputs=outputs, prompt_token_ids=one.prompt_token_ids
    )


def _output(answer: Answer) -> PoolingOutput:
    assert isinstance(answer, PoolingOutput), answer
    return answer


def _pairs(data_1: str | Sequence[str], data_2: str | Sequence[str]) -> list[tuple[str, str]]:
    first = [data_1] if isinstance(data_1, str) else list(data_1)
    second = [data_2] if isinstance(data_2, str) else list(data_2)
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second) or not first:
        raise RequestError(
            f"{len(first)} texts are to go with {len(second)}; give one and several, or as many "
            "in both"
        )
    return list(zip(first, second, strict=True))


def _cosine(one: Sequence[float], two: Sequence[float]) -> float:
    length = math.hypot(*one) * math.hypot(*two)
    return math.fsum(a * b for a, b in zip(one, two, strict=True)) / length if length else 0.0
