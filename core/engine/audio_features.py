"""Sound made what an encoder hears: resampled, one window, as its feature extractor computes it."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.core.engine.audio import AudioClip
from quire.core.engine.features import make_feature
from quire.core.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import numpy.typing as npt

    from quire.core.interface.worker import Feature

_ZERO_CROSSINGS = 16
"""Of the sinc on each side, at the lower of two rates."""
_MAX_RATE = 768_000
_ROWS = 65_536
"""Samples that are computed at once."""


class AudioFeatures:
    """The feature extractor of one checkpoint; safe in several threads."""

    def __init__(self, directory: str, max_source_tokens: int) -> None:
        """Raises: CheckpointError if the checkpoint has no feature extractor."""
        self._extractor = _load_extractor(directory)
        self._num_tokens = max_source_tokens
        self.sample_rate = int(self._extractor.sampling_rate)
        self.window_samples = int(self._extractor.n_samples)

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
        """Samples of at most one window, at the model's rate, as a feature."""
        made = self._extractor(samples, sampling_rate=self.sample_rate, return_tensors="np")
        arrays = {"input_features": np.asarray(made["input_features"][0], np.float32)}
        return make_feature("audio", arrays, num_tokens=self._num_tokens)


def _load_extractor(directory: str) -> Any:
    from transformers import AutoFeatureExtractor

    load: Any = AutoFeatureExtractor.from_pretrained
    try:
        return load(directory, local_files_only=True)
    # Files may be broken in any way.
    except Exception as error:
        raise CheckpointError(
            f"{directory} has no feature extractor that can be read ({error}); add its "
            "preprocessor_config.json"
        ) from error


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
