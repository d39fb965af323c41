"""Runs steps of a model that makes numbers of texts. Each text is computed whole, in one step.

Nothing is remembered from step to step: a request comes new, is answered, and is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.core.errors import DeviceLost
from quire.core.interface import (
    CompletedStep,
    Device,
    NewRequest,
    PooledNumbers,
    PoolingSpec,
    StepBatch,
    StepResult,
)
from quire.core.models.pooling.batch import TextBatch
from quire.core.models.pooling.model import PoolingModel
from quire.core.worker.device_errors import device_errors


@dataclass(frozen=True, slots=True)
class _Text:
    """One request that can be answered."""

    request_id: str
    token_ids: list[int]
    spec: PoolingSpec


class PoolingRunner:
    """Answers the texts of a step, then returns. Used by one thread."""

    decode_sizes: tuple[int, ...] = ()
    workspace_bytes = 0

    def __init__(self, model: PoolingModel, device: Device) -> None:
        self._model = model
        self._device = device
        self._lost: DeviceLost | None = None
        pooling = model.description.pooling
        assert pooling is not None, model.description
        self._default = PoolingSpec(task=pooling.tasks[0])

    def submit(self, batch: StepBatch) -> CompletedStep:
        """Runs one step. What is wrong with a request fails that one alone.

        Raises: DeviceOutOfMemory, DeviceLost, DeviceError.
        """
        texts, errors = self._texts(batch)
        answers: list[Tensor] = []
        if texts:
            with device_errors("activations"):
                try:
                    answers = self._run(texts)
                except DeviceLost as error:
                    self._lost = error
                    raise
        pooled = {}
        for text, answer in zip(texts, answers, strict=True):
            if bool(torch.isfinite(answer).all()):
                pooled[text.request_id] = _packed(answer)
            else:
                errors[text.request_id] = "the model's numbers for this text are not finite"
        return CompletedStep(
            StepResult(
                step_id=batch.step_id,
                sampled_token_ids=[[] for _ in batch.request_ids],
                pooled=pooled,
                errors=errors,
            )
        )

    def finish_steps(self, num_left: int) -> None:
        """Every step is done when `submit` returns."""

    def forget_all(self) -> None:
        """Nothing is remembered."""

    def release(self) -> None:
        """Nothing is held."""

    def check_alive(self) -> None:
        """Raises: DeviceLost, if a step has found the device gone."""
        if self._lost is not None:
            raise self._lost

    def _texts(self, batch: StepBatch) -> tuple[list[_Text], dict[str, str]]:
        new = {request.request_id: request for request in batch.new_requests}
        texts, errors = [], {}
        columns = zip(batch.request_ids, batch.num_new_tokens, strict=True)
        for request_id, num_new in columns:
            problem = self._problem(new.get(request_id), num_new)
            if problem is not None:
                errors[request_id] = problem
            else:
                request = new[request_id]
                spec = request.pooling or self._default
                texts.append(_Text(request_id, request.token_ids, spec))
        return texts, errors

    def _problem(self, request: NewRequest | None, num_new: int) -> str | None:
        """Why a request cannot be answered in this step; None: it can."""
        if request is None or num_new != len(request.token_ids):
            return "a text that becomes numbers is computed whole in its first step"
        vocab_size = self._model.description.vocab_size
        stray = [token for token in request.token_ids if not 0 <= token < vocab_size]
        if stray:
            return f"token {stray[0]} is none of the vocabulary's {vocab_size}"
        spec = request.pooling or self._default
        if spec.token_type_ids and len(spec.token_type_ids) != num_new:
            return f"{len(spec.token_type_ids)} token types were given for {num_new} tokens"
        return self._model.problem_of(spec)

    def _run(self, texts: Sequence[_Text]) -> list[Tensor]:
        """Answers on the host, float32."""
        answers: list[Tensor] = []
        batch = self._batch(texts)
        specs = [text.spec for text in texts]

        def work() -> None:
            with torch.inference_mode():
                found = self._model.answers(batch, specs)
                sizes = [one.numel() for one in found]
                flat = torch.cat([one.flatten() for one in found]).cpu()
            parts = torch.split(flat, sizes)
            answers.extend(part.view(one.shape) for part, one in zip(parts, found, strict=True))

        queue = self._device.queue()
        queue.run(work)
        queue.record().wait()
        return answers

    def _batch(self, texts: Sequence[_Text]) -> TextBatch:
        device = self._device.torch_device
        ids = np.concatenate([np.asarray(text.token_ids, np.int64) for text in texts])
        types = None
        if any(text.spec.token_type_ids for text in texts):
            columns = [text.spec.token_type_ids or [0] * len(text.token_ids) for text in texts]
            types = torch.from_numpy(np.concatenate([np.asarray(c, np.int64) for c in columns]))
            types = types.to(device)
        return TextBatch(
            token_ids=torch.from_numpy(ids).to(device),
            lengths=tuple(len(text.token_ids) for text in texts),
            token_types=types,
        )


def _packed(answer: Tensor) -> PooledNumbers:
    numbers = answer.numpy().astype("<f4", copy=False)
    return PooledNumbers(shape=list(answer.shape), data=numbers.tobytes())
