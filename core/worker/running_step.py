"""A step that was submitted, until its result is read."""

from __future__ import annotations

from typing import Protocol

from quire.core.errors import DeviceError
from quire.core.interface import Event, PendingStep, StepResult
from quire.core.worker.input_batch import BatchChange, InputBatch
from quire.core.worker.step_results import Arrays, StepOutline, accepted_tokens, make_step_result


class StepQueue(Protocol):
    """Who knows the steps before this one."""

    requests: InputBatch

    def finish_until(self, step: RunningStep) -> None:
        """Finishes steps in their order, up to and with this one."""
        ...


class RunningStep(PendingStep):
    """A step in a device's queue. Its buffers are its own until `finish` returns."""

    def __init__(
        self,
        steps: StepQueue,
        outline: StepOutline,
        change: BatchChange,
        arrays: Arrays,
        event: Event,
    ) -> None:
        self._steps = steps
        self._outline = outline
        self._change = change
        self._arrays = arrays
        self._event = event
        self._result: StepResult | None = None
        self._error: Exception | None = None

    def result(self) -> StepResult:
        """Waits for this step and those before it."""
        if self._result is None and self._error is None:
            self._steps.finish_until(self)
        if self._error is not None:
            raise self._error
        assert self._result is not None, self._outline.batch.step_id
        return self._result

    def finish(self) -> None:
        """Waits, reads the result and gives the requests their tokens. Once, in order of steps.

        Raises: DeviceError; the requests are then unchanged, and `cancel` must follow.
        """
        self._event.wait()
        accepted = accepted_tokens(self._outline, self._arrays["tokens"])
        self._result = make_step_result(self._outline, self._arrays, accepted)
        requests = self._steps.requests
        requests.fill_sampled(self._change, [tokens for tokens in accepted if tokens])
        requests.settle(self._change)

    def cancel(self, cause: Exception, *, is_cause: bool) -> None:
        """Says that the step did not happen: it failed, or one before it. The last step first."""
        self._steps.requests.undo(self._change)
        if is_cause:
            self._error = cause
            return
        step_id = self._outline.batch.step_id
        self._error = DeviceError(
            f"step {step_id} was built on a step that failed ({cause}); submit it again"
        )

    def drain(self) -> None:
        """Waits until the device has let go of the step's buffers, whatever became of it."""
        try:
            self._event.wait()
        except Exception as error:  # the step is cancelled already; its own failure adds nothing
            self._error = self._error or error
