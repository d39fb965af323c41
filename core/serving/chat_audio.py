"""Sound in conversations: base64 as OpenAI's clients send it, or an address."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quire.core.engine.audio import AudioClip
from quire.core.engine.images import MediaPolicy, read_address
from quire.core.errors import RequestError
from quire.core.serving.audio_files import read_audio

if TYPE_CHECKING:
    from quire.core.config import EngineConfig

PARAM = "messages"
_MAX_SOUNDS = 16
"""Of one conversation, where the operator said nothing."""


async def hear(parts: Sequence[Mapping[str, Any]], config: EngineConfig) -> list[AudioClip]:
    """The sounds of a conversation, decoded beside the event loop.

    Raises: RequestError for an address that may not be read, and for what is no sound.
    """
    limit = int(config.limit_mm_per_prompt.get("audio", _MAX_SOUNDS)) if parts else 0
    if len(parts) > limit:
        raise RequestError(
            f"the messages bring {len(parts)} sounds; this server takes {limit} in one prompt",
            param=PARAM,
        )
    return [await asyncio.to_thread(_clip_of, part, config) for part in parts]


def _clip_of(part: Mapping[str, Any], config: EngineConfig) -> AudioClip:
    policy = MediaPolicy(
        allowed_domains=tuple(config.allowed_media_domains),
        allow_private=config.allow_private_media,
        local_folder=config.allowed_local_media_path,
    )
    return read_audio(_bytes_of(part, policy), param=PARAM)


def _bytes_of(part: Mapping[str, Any], policy: MediaPolicy) -> bytes:
    """The file of one part. Raises: RequestError for a part without one."""
    kind = str(part["type"])
    given = part.get(kind)
    if kind == "audio_url":
        address = given.get("url") if isinstance(given, Mapping) else given
        if isinstance(address, str) and address:
            return read_address(address, policy)
        raise RequestError(
            'a part of sound holds its address: {"type": "audio_url", "audio_url": {"url": ...}}',
            param=PARAM,
        )
    data = given.get("data") if isinstance(given, Mapping) else None
    if not isinstance(data, str):
        raise RequestError(
            'a part of sound holds a file: {"type": "input_audio", "input_audio": {"data": '
            'base64, "format": "wav"}}',
            param=PARAM,
        )
    if len(data) > 2 * policy.max_bytes:
        raise RequestError(f"the sound is over {policy.max_bytes:,} bytes", param=PARAM)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"input_audio.data is no base64: {error}", param=PARAM) from error
