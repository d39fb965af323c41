"""What is asked of a model that makes vectors or scores of texts, and what it answers.

A model says in `EngineFacts.tasks` what it does. `AsyncEngine.pool` is the way in: one text, or a
pair for a model that reads two at once, and one result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from quire.core.errors import RequestError

Task = Literal[
    "generate",
    "transcribe",
    "embed",
    "classify",
    "score",
    "token_embed",
    "token_classify",
    "reward",
]
"""What a model may do at all."""
PoolingTask = Literal["embed", "classify", "score", "token_embed", "token_classify", "reward"]
"""`embed`: one vector for a text. `classify`: one number for each label. `score`: one number for a
pair of texts. `token_embed` and `token_classify`: one row for each token. `reward`: one number."""
POOLING_TASKS: tuple[PoolingTask, ...] = get_args(PoolingTask)


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one text becomes numbers."""

    task: PoolingTask
    dimensions: int | None = None
    """Of the vector, its first so many; then it is normalized again. None: all."""
    use_activation: bool = True
    """Vectors of length one, if the model's are meant to be; probabilities instead of logits."""
    truncate_prompt_tokens: int | None = None
    """Cut the text to so many tokens, on the side from which its tokenizer cuts; special tokens
    stay. -1: to as many as the model takes. None: a text that is too long is refused."""


class PoolingOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one text."""

    data: list[float] | list[list[float]]
    """float32 numbers: a vector, one for each label, a single one, or a row for each token."""
    num_prompt_tokens: int
    num_cached_tokens: int = 0


def refuse_text(tasks: Sequence[str], model: str) -> None:
    """Raises: RequestError if a model makes numbers of texts, and text is asked of it."""
    if tasks and set(tasks) <= set(POOLING_TASKS):
        check_task("generate", tasks, model)


def check_task(task: Task, tasks: Sequence[str], model: str) -> None:
    """Raises: RequestError if a model that does `tasks` cannot do `task`."""
    if task in tasks:
        return
    if "generate" not in tasks:
        is_so = f"this model does {', '.join(tasks)}"
    elif task == "transcribe":
        is_so = "this model generates text; it hears no audio"
    else:
        is_so = "this model generates text; it has no pooling head"
    raise RequestError(
        f"{task!r} was asked of {model!r}: {is_so}; send the request to one that does {task}",
        param="model",
    )
