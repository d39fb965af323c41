"""What a sound request may still not ask of this server, as it was started."""

from __future__ import annotations

from quire.core.config import EngineConfig
from quire.core.errors import RequestError
from quire.core.sampling_params import SamplingParams
from quire.core.serving.settings import ServerSettings


def check_limits(
    params: SamplingParams, num_prompts: int, *, settings: ServerSettings, config: EngineConfig
) -> None:
    """Holds a request to the server's limits.

    Raises: RequestError naming the field.
    """
    _check_outputs(params.n, num_prompts, settings.max_outputs)
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and asked > settings.max_logprobs:
            raise RequestError(
                f"{name} asks for {asked} tokens a position; this server gives at most "
                f"{settings.max_logprobs} (--max-logprobs)",
                param=name,
            )
    if params.priority and config.scheduling_policy != "priority":
        raise RequestError(
            f"priority is {params.priority}, and this server answers in the order of arrival; "
            "leave priority out, or start the server with --scheduling-policy priority",
            param="priority",
        )


def _check_outputs(num_outputs: int, num_prompts: int, limit: int) -> None:
    if num_prompts == 0:
        raise RequestError("prompt is an empty list; give text or token ids", param="prompt")
    if num_prompts * num_outputs > limit:
        raise RequestError(
            f"{num_prompts} prompts with n={num_outputs} ask for {num_prompts * num_outputs} "
            f"outputs; this server gives at most {limit} in one request",
            param="prompt" if num_outputs == 1 else "n",
        )
