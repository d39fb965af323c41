"""Images as users give them, made RGB pixels: addresses, data URLs, files, bytes, arrays.

What comes from outside is distrusted. An address is fetched only if every address that its name
stands for is public (or the operator allowed it), again at each redirect, and the connection goes
to the address that was checked. Sizes are limited before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np

from quire.core.engine.media_fetching import fetch
from quire.core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

PARAM = "image"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats whose decoders run no other program and know their size before they decode."""


class ImageAddress(str):
    """An address that a client sent: it is never read as the path of a file."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPolicy:
    """What may be read for a request, and how much of it."""

    allowed_domains: tuple[str, ...] = ()
    """Names from which may be fetched, with those under them; empty: any."""
    allow_private: bool = False
    """Whether addresses of private networks and of this machine may be fetched."""
    local_folder: str | None = None
    """The folder under which `file:` addresses may be read; None: none may."""
    max_bytes: int = 32 << 20
    max_pixels: int = 64_000_000
    timeout_s: float = 10.0
    """For one fetch, redirects included."""


def read_image(given: object, policy: MediaPolicy) -> Image:
    """An RGB image of anything that stands for one; safe in another thread.

    A text is an address (`data:`, `http:`, `https:`, `file:`) or, where it is no `ImageAddress`,
    a path. Paths, bytes, arrays (uint8 [height, width], [height, width, 3] or [.., 4], or floats
    from 0 to 1) and images of Pillow come from the caller's own program and are not held against
    the rules for addresses.
    Raises: RequestError that says what is wrong with it; ConfigError without Pillow.
    """
    pillow = _pillow()
    if isinstance(given, pillow.Image):
        return _upright_rgb(given, policy)
    if isinstance(given, str) and not isinstance(given, ImageAddress) and _is_path(given):
        return decode_image(_read_file(Path(given).expanduser(), policy), policy)
    if isinstance(given, str):
        return decode_image(read_address(given, policy), policy)
    if isinstance(given, bytes | bytearray):
        return decode_image(bytes(given), policy)
    if isinstance(given, Path):
        return decode_image(_read_file(given, policy), policy)
    if isinstance(given, np.ndarray) or hasattr(given, "__array__"):
        return _upright_rgb(_from_array(np.asarray(given)), policy)
    raise RequestError(
        f"an image is an address, a path, bytes, an array or an image of Pillow, not "
        f"{type(given).__name__}",
        param=PARAM,
    )


def read_address(address: str, policy: MediaPolicy) -> bytes:
    """What an address leads to.

    Raises: RequestError if it may not be read, cannot be, or is too large.
    """
    scheme = urlsplit(address[:64]).scheme.lower() if not address.startswith("data:") else "data"
    if scheme == "data":
        return _read_data_url(address, policy)
    if scheme in ("http", "https"):
        return fetch(
            address,
            allowed_domains=policy.allowed_domains,
            allow_private=policy.allow_private,
            max_bytes=policy.max_bytes,
            timeout_s=policy.timeout_s,
        )
    if scheme == "file":
        return _read_local(unquote(urlsplit(address).path), policy)
    raise RequestError(
        f"an image's address begins with http:, https:, data: or file:; this one is "
        f"{address[:40]!r}",
        param=PARAM,
    )


def decode_image(content: bytes, policy: MediaPolicy) -> Image:
    """The first frame of an image file, upright, RGB, on white where it is transparent.

    Raises: RequestError for what is no image, is broken, or has more pixels than may be decoded.
    """
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            # The size is held against our own limit below, before anything is decoded.
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            image = pillow.open(io.BytesIO(content), formats=_FORMATS)
            _check_size(image.size, policy)
            image.seek(0)
            image.load()
    except RequestError:
        raise
    except pillow.DecompressionBombError as error:
        raise _too_many_pixels(str(error), policy) from error
    except pillow.UnidentifiedImageError as error:
        raise RequestError(
            f"the image is none that can be read; give {', '.join(_FORMATS)}", param=PARAM
        ) from error
    # Decoders raise whatever broken bytes make them raise.
    except Exception as error:
        raise RequestError(
            f"the image is broken: {type(error).__name__}: {error}"[:300], param=PARAM
        ) from error
    return _upright_rgb(image, policy)


def _is_path(text: str) -> bool:
    return not text.startswith("data:") and "://" not in text[:16]


def _pillow() -> Any:
    """The module `PIL.Image`, imported when the first image comes."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigError('images need Pillow; pip install "quire[vision]"') from error
    return PIL.Image


def _check_size(size: tuple[int, int], policy: MediaPolicy) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RequestError(f"the image is {width} x {height} pixels", param=PARAM)
    if width * height > policy.max_pixels:
        raise _too_many_pixels(f"it is {width} x {height}", policy)


def _too_many_pixels(what: str, policy: MediaPolicy) -> RequestError:
    return RequestError(
        f"the image has too many pixels ({what}); at most {policy.max_pixels:,} are decoded; "
        "make it smaller",
        param=PARAM,
    )


def _upright_rgb(image: Image, policy: MediaPolicy) -> Image:
    """Turned as its EXIF says, transparency on white, three channels of 8 bits."""
    import PIL.Image
    import PIL.ImageOps

    _check_size(image.size, policy)
    try:
        upright = PIL.ImageOps.exif_transpose(image)
    # Broken EXIF is no reason to refuse the pixels.
    except Exception:
        upright = image
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        ground = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        upright = PIL.Image.alpha_composite(ground, layer)
    return upright.convert("RGB")


def _from_array(array: Any) -> Image:
    """Raises: RequestError for an array that is no image."""
    import PIL.Image

    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not is_image or array.dtype.kind not in "uif" or 0 in array.shape:
        raise RequestError(
            f"an array of an image is [height, width] or [height, width, 3 or 4] of numbers; this "
            f"one is {array.dtype} {list(array.shape)}",
            param=PARAM,
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise RequestError("the image has numbers that are not finite", param=PARAM)
        array = np.rint(np.clip(array, 0.0, 1.0) * 255.0)
    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return PIL.Image.fromarray(np.clip(flat, 0, 255).astype(np.uint8))


def _read_data_url(address: str, policy: MediaPolicy) -> bytes:
    head, comma, body = address.partition(",")
    if not comma:
        raise RequestError("the data URL has no comma and so no content", param=PARAM)
    if len(body) > 2 * policy.max_bytes:
        raise RequestError(f"the image is over {policy.max_bytes:,} bytes", param=PARAM)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the data URL is no base64: {error}", param=PARAM) from error


def _read_local(name: str, policy: MediaPolicy) -> bytes:
    """Raises: RequestError for anything outside the folder that the operator named."""
    if policy.local_folder is None:
        raise RequestError(
            "files of the server may not be read; its operator allows a folder with "
            "--allowed-local-media-path; send the image as a data URL",
            param=PARAM,
        )
    folder = Path(policy.local_folder).resolve()
    path = Path(name).resolve()
    if not path.is_relative_to(folder):
        raise RequestError("the file is outside the folder that may be read", param=PARAM)
    return _read_file(path, policy)


def _read_file(path: Path, policy: MediaPolicy) -> bytes:
    try:
        if not path.is_file():
            raise RequestError(f"there is no file {path.name}", param=PARAM)
        with path.open("rb") as file:
            content = file.read(policy.max_bytes + 1)
    except OSError as error:
        raise RequestError(
            f"the file {path.name} cannot be read: {error.strerror}", param=PARAM
        ) from error
    if len(content) > policy.max_bytes:
        raise RequestError(f"the file is over {policy.max_bytes:,} bytes", param=PARAM)
    return content
