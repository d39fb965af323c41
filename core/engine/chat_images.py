"""Conversations whose messages show images: parts for the template, images beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quire.core.engine.images import ImageAddress
from quire.core.errors import RequestError

_TYPES = ("image_url", "input_image", "image", "image_pil")
_TEXT_TYPES = ("text", "input_text")


def is_image_part(part: object) -> bool:
    """Whether a part of a message is an image, in any of the forms that clients know."""
    return isinstance(part, Mapping) and part.get("type") in _TYPES


def shows_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any message of a conversation has an image among its parts."""
    return any(
        is_image_part(part)
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        for part in message["content"]
    )


def split_images(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The conversation as templates take it, `{"type": "image"}` where images stand, and these.

    Raises: RequestError for a part that is neither text nor an image.
    """
    images: list[Any] = []
    told = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [_part(part, images) for part in content]
        told.append({**message, "content": content})
    return told, images


def image_of(part: Mapping[str, Any]) -> Any:
    """The image of one part: an `ImageAddress`, or what the caller's own program put there.

    Raises: RequestError for a part without one.
    """
    given = next((part[name] for name in ("image_url", "image", "image_pil", "url")
                  if part.get(name) is not None), None)  # fmt: skip
    if isinstance(given, Mapping):
        given = given.get("url")
    if given is None or given == "":
        raise RequestError(
            'an image part holds its address: {"type": "image_url", "image_url": {"url": "..."}}',
            param="messages",
        )
    return ImageAddress(given) if isinstance(given, str) else given


def _part(part: Any, images: list[Any]) -> dict[str, Any]:
    if is_image_part(part):
        images.append(image_of(part))
        return {"type": "image"}
    if isinstance(part, Mapping) and part.get("type") in _TEXT_TYPES:
        return {"type": "text", "text": str(part.get("text", ""))}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(
        f"a content part of type {str(kind)[:40]!r} is not supported; the model takes text and "
        "images",
        param="messages",
    )
