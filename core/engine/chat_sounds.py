"""Parts of messages that are sound, in the forms that clients know."""

from __future__ import annotations

from collections.abc import Mapping

_TYPES = ("input_audio", "audio_url")


def is_sound_part(part: object) -> bool:
    """Whether a part of a message is sound: OpenAI's `input_audio`, or an `audio_url`."""
    return isinstance(part, Mapping) and part.get("type") in _TYPES
