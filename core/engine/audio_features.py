"""Sound made what an encoder hears: resampled, one window, as its feature extractor computes it."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from quire.core.engine.audio import AudioClip
from quire.core.engine.features import make_feature
from quire.core.errors import RequestError
from quire.core.source_features import SourceSteps, extracted, load_extractor

if TYPE_CHECKING:
    import numpy.typing as npt

    from quire.core.interface.worker import Feature

_ZERO_CROSSINGS = 16
"""Of the sinc on each side, at the lower of two rates."""
_MAX_RATE = 768_000
_LONGEST_WINDOW_S = 30.0
_ROWS = 65_536
"""Samples that are computed at once."""


class AudioFeatures:
    """The feature extractor of one checkpoint; safe in several threads."""

    def __init__(
        self, directory: str, max_source_tokens: int, steps: SourceSteps | None = None
    ) -> None:
        """`steps`: how many tokens the encoder makes of a sound; None: always the most.

        Raises: CheckpointError if the checkpoint has no feature extractor.
        """
        self._extractor = load_extractor(directory)
        self._num_tokens = max_source_tokens
        self._steps = steps
        self.sample_rate = int(self._extractor.sampling_rate)
        self.window_samples = self._window_samples()

    @property
    def window_s(self) -> float:
        """How much sound the encoder hears at once."""
        return self.window_samples / self.sample_rate

    def resample(self, clip: AudioClip) -> npt.NDArray[np.float32]:
        """The clip as float32 [num_samples] at the model's rate.

        Raises: RequestError for what is no sound, or has none.
        """
        samples = checked_samples(clip)
        return resample(samples, int(clip.sample_rate), self.sample_rate)

    def make_feature(self, clip: AudioClip) -> Feature:
        """A clip of at most one window as a feature.

        Raises: RequestError for what is no sound, has none, or plays longer.
        """
        samples = self.resample(clip)
        if len(samples) > self.window_samples:
            raise RequestError(
                f"the sound plays {len(samples) / self.sample_rate:.1f} s; the model hears "
                f"{self.window_s:.0f} s at once; cut it, or transcribe it through AsyncEngine",
                param="multi_modal_data",
            )
        return self.window_feature(samples)

    def window_feature(self, samples: npt.NDArray[np.float32]) -> Feature:
        """Samples of at most one window, at the model's rate, as a feature.

        Raises: RequestError for a sound of which the encoder makes nothing.
        """
        name, array = self._extracted(samples)
        num_tokens = self._num_tokens if self._steps is None else self._steps.tokens_of(len(array))
        if num_tokens < 1:
            raise RequestError(
                f"the sound plays {len(samples) / self.sample_rate:.3f} s, which is too short for "
                "the model to hear anything; send a longer one",
                param="multi_modal_data",
            )
        if self._steps is not None:
            array = array[: self._steps.usable(len(array))]
        return make_feature("audio", {name: array}, num_tokens=num_tokens)

    def _extracted(self, samples: npt.NDArray[np.float32]) -> tuple[str, npt.NDArray[np.float32]]:
        try:
            return extracted(self._extractor, samples)
        # The extractor refuses lengths in errors of its own.
        except Exception as error:
            raise RequestError(
                f"the model's feature extractor does not take the sound: {error}"[:400],
                param="multi_modal_data",
            ) from error

    def _window_samples(self) -> int:
        """What the extractor fills up to; else what the encoder takes, half a minute at most."""
        if self._steps is None:
            return int(self._extractor.n_samples)
        rate = self.sample_rate
        noise = np.random.default_rng(0).standard_normal(2 * rate).astype(np.float32)
        one, two = (len(extracted(self._extractor, noise[: n * rate])[1]) for n in (1, 2))
        groups = self._num_tokens * self._steps.stride - self._steps.offset
        most_frames = groups * self._steps.multiple
        seconds = 1 + (most_frames - one) / (two - one)
        return max(1, int(rate * min(_LONGEST_WINDOW_S, seconds)))


def checked_samples(clip: AudioClip) -> npt.NDArray[np.float32]:
    """The samples as float32 [n]. Raises: RequestError for what cannot be heard."""
    try:
        samples = np.asarray(clip.samples, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"audio is no array of numbers: {error}", param="multi_modal_data"
        ) from error
    problem = None
    if samples.ndim != 1:
        problem = f"has shape {list(samples.shape)}; mix its channels into one, [num_samples]"
    elif not len(samples):
        problem = "has no samples; give some"
    elif not np.isfinite(samples).all():
        problem = "has samples that are no finite numbers; record it again"
    elif not 1 <= clip.sample_rate <= _MAX_RATE:
        problem = f"has a rate of {clip.sample_rate}; it is 1 to {_MAX_RATE} samples a second"
    if problem is not None:
        raise RequestError(f"audio {problem}", param="multi_modal_data")
    return samples


def resample(samples: npt.NDArray[np.float32], rate: int, wanted: int) -> npt.NDArray[np.float32]:
    """Samples float32 [n] at another rate: a sum of sincs under a Hann window.

    Source: J. O. Smith, Digital Audio Resampling, section "Theory of Ideal Bandlimited
    Interpolation".
    """
    if rate == wanted:
        return samples
    divisor = gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    cutoff = min(1.0, wanted / rate)
    reach = int(np.ceil(_ZERO_CROSSINGS / cutoff))
    padded = np.pad(samples, reach + 1)
    count = -(-len(samples) * up // down)
    out = np.empty(count, np.float32)
    taps = np.arange(-reach, reach + 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(taps))
    for phase in range(min(up, count)):
        distance = taps - (phase * down % up) / up
        window = 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / (reach + 1), -1, 1))
        kernel = (cutoff * np.sinc(cutoff * distance) * window).astype(np.float32)
        for first in range(phase, count, up * _ROWS):
            places = np.arange(first, min(count, first + up * _ROWS), up)
            out[places] = windows[places * down // up + 1] @ kernel
    return out
