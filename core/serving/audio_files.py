"""Reads sound from the bytes of a file."""

from __future__ import annotations

import io
from importlib.util import find_spec

from quire.core.engine.audio import AudioClip
from quire.core.errors import RequestError

MAX_DURATION_S = 3600.0
"""Of one file: an hour of sound is a gigabyte of samples when it is decoded."""


def read_audio(
    data: bytes, *, max_duration_s: float = MAX_DURATION_S, param: str = "file"
) -> AudioClip:
    """The sound of a WAV, FLAC, OGG or MP3 file, its channels mixed into one.

    The length is read from the file's head, before anything is decoded.
    Raises: RequestError for what is no sound, has none, or plays too long, and where the library
    that decodes is not installed.
    """
    if find_spec("soundfile") is None:
        raise RequestError(
            "this server decodes no sound, since soundfile is not installed; "
            'run pip install "quire[audio]"',
            param=param,
        )
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_length(file.frames, file.samplerate, max_duration_s, param)
            # A head may lie: no more than it says is ever decoded.
            samples = file.read(file.frames, dtype="float32", always_2d=True)
            rate = int(file.samplerate)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        raise RequestError(
            f"file is no sound that this server reads ({error}); send WAV, FLAC, OGG or MP3",
            param=param,
        ) from error
    if not len(samples):
        raise RequestError("file has no sound in it", param=param)
    return AudioClip(samples=samples.mean(axis=1), sample_rate=rate)


def _check_length(num_frames: int, sample_rate: int, max_duration_s: float, param: str) -> None:
    if num_frames <= max_duration_s * sample_rate:
        return
    raise RequestError(
        f"file plays {num_frames / sample_rate:.0f} s; this server takes at most "
        f"{max_duration_s:.0f} s, cut it",
        param=param,
    )
