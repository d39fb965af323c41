"""Made-up sound and pictures for trying an encoder, and how many tokens it makes of how much.

An encoder of convolutions and attention makes floor((n + offset) / stride) tokens of n frames: a
stack of convolutions without padding at their ends is one such division, since
floor((floor((n + a) / s) + b) / t) = floor((n + a + b s) / (s t)). Both numbers are measured, so
that a front knows what a sound will take before anybody runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quire.core.errors import Reason, UnsupportedError
from quire.core.source_features import (
    SourceSteps,
    extracted,
    load_extractor,
    load_image_processor,
    prepared,
)

_SECONDS = 1.0
_MOST_GROUPS = 1 << 18
"""Of frames, of the shortest sound of which an encoder makes a few tokens."""
_MULTIPLES = (1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 64, 80, 100, 128, 160, 200, 256, 320, 400, 640)
"""Frames that encoders take together."""
_PROBED = 3
"""Tokens from which steps are measured: at the very beginning there may be none."""


class Examples(Protocol):
    """What an encoder that reads no text is tried on."""

    steps: SourceSteps | None

    def example(self, seed: int) -> npt.NDArray[np.float32]:
        """Something made up, as the encoder takes it."""
        ...


class SoundSource:
    """The feature extractor of a checkpoint, for trying its encoder on made-up sound."""

    def __init__(self, directory: Path) -> None:
        """Raises: UnsupportedError if there is none, or it does not run here."""
        self.steps: SourceSteps | None = None
        """Once they are measured; examples are then in whole groups of frames."""
        with _running_here("the checkpoint's feature extractor", f"sound for {directory}"):
            self._extractor: Any = load_extractor(str(directory))
            self.example(0)

    def example(self, seed: int) -> npt.NDArray[np.float32]:
        """Noise of about a second as the encoder takes it, with time first."""
        rate = int(self._extractor.sampling_rate)
        count = int(rate * (_SECONDS + seed / 64))
        samples = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
        made = extracted(self._extractor, samples)[1]
        return made if self.steps is None else made[: self.steps.usable(len(made))]


class PictureSource:
    """The image processor of a checkpoint, for trying its encoder on made-up pictures."""

    steps: SourceSteps | None = None
    """Every picture is made of one size, of which the encoder makes as many tokens."""

    def __init__(self, directory: Path) -> None:
        """Raises: UnsupportedError if there is none, it does not run here, or its sizes differ."""
        with _running_here("the checkpoint's image processor", f"pictures for {directory}"):
            self._processor: Any = load_image_processor(str(directory))
            shapes = {self.example(seed).shape for seed in range(3)}
            if len(shapes) > 1:
                raise ValueError(f"it makes pictures of several sizes: {sorted(shapes)}")

    def example(self, seed: int) -> npt.NDArray[np.float32]:
        """Noise of another shape for each seed, as the encoder takes it."""
        shape = (40 + 8 * (seed % 3), 56, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        return prepared(self._processor, pixels)


@contextmanager
def _running_here(need: str, what: str) -> Iterator[None]:
    try:
        yield
    # It may want packages that are not here.
    except Exception as error:
        reason = Reason(
            code="model.feature_extractor",
            need=need,
            have=f"{type(error).__name__}: {error}"[:300],
            remedy="add its preprocessor_config.json, and install what it asks for",
        )
        raise UnsupportedError([reason], what=what) from error


def measure_steps(tokens_of: Callable[[int], int], num_frames: int) -> SourceSteps | None:
    """The steps of an encoder that makes `tokens_of(n)` tokens of n frames; None: no such steps.

    `tokens_of` may raise for inputs that are too short, which counts as no token, and for what is
    no whole number of groups. num_frames: more than a few groups.
    """
    multiple = next((m for m in _MULTIPLES if _takes(tokens_of, num_frames, m)), None)
    if multiple is None:
        return None
    ends = [_shortest(lambda n: tokens_of(n * multiple), c) for c in (_PROBED, _PROBED + 1)]
    if ends[0] is None or ends[1] is None or ends[0] == ends[1]:
        return None
    stride = ends[1] - ends[0]
    steps = SourceSteps(stride=stride, offset=_PROBED * stride - ends[0], multiple=multiple)
    further = [ends[1] + 5 * stride - 1, ends[1] + 5 * stride, ends[1] + 11 * stride + stride // 2]
    if any(tokens_of(n * multiple) != steps.tokens_of(n * multiple) for n in further):
        return None
    return steps


def _takes(tokens_of: Callable[[int], int], num_frames: int, multiple: int) -> bool:
    """Whether neighbouring multiples are taken."""
    most = num_frames - num_frames % multiple
    try:
        return tokens_of(most) > 0 and tokens_of(most - multiple) > 0
    # The model's own code refuses shapes in errors of its own.
    except Exception:
        return False


def _shortest(tokens_of: Callable[[int], int], count: int) -> int | None:
    """The fewest frames that give `count` tokens."""

    def gives(num_frames: int) -> bool:
        try:
            return tokens_of(num_frames) >= count
        # Convolutions refuse what is shorter than they are.
        except Exception:
            return False

    high = 1
    while not gives(high):
        high *= 2
        if high > _MOST_GROUPS:
            return None
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if gives(middle) else (middle, high)
    return high
