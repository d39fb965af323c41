"""The prompts of a measurement: given ones, or random tokens of a length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quire.core.errors import ConfigError


def read_prompts(path: Path, number: int) -> list[str]:
    """`number` prompts from a file with one a line, repeated if there are fewer.

    Raises: ConfigError if the file cannot be read or holds none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts in {path} cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"{path} holds no prompts; write one on each line")
    return [lines[index % len(lines)] for index in range(number)]


def random_prompts(
    number: int, length: int, token_ids: Sequence[int], seed: int
) -> list[list[int]]:
    """`number` prompts of `length` tokens, each token drawn from `token_ids`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(token_ids), size=(number, length))
    return [list(map(int, row)) for row in drawn]
