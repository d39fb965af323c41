"""What a vision tower made of images, kept while requests that run may need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

_HELD = "encoded images"


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """One image as a language model sees it."""

    rows: Tensor
    """[n, H]: one for each of its placeholders."""
    deep_rows: tuple[Tensor, ...] = ()
    """[n, H] each, to be added after the first layers (Qwen3-VL's DeepStack)."""

    @property
    def size_bytes(self) -> int:
        """Memory on the device."""
        return sum(tensor.nbytes for tensor in (self.rows, *self.deep_rows))


class EncoderCache:
    """Finds encoded images by the hash of their content.

    Requests hold them, in their memos; one that nobody holds is gone. Above `max_bytes` those are
    let go whose placeholders are all computed: at most they are encoded again for somebody else.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_encoded = 0
        """How often the vision tower has run."""
        self._known: WeakValueDictionary[str, EncodedImage] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def size_bytes(self) -> int:
        """Memory that is held."""
        return sum(image.size_bytes for image in self._known.values())

    def get(
        self, key: str, memo: dict[str, Any], encode: Callable[[], EncodedImage]
    ) -> EncodedImage:
        """The image of this hash, encoded if nobody has; held by the request of `memo`."""
        image = self._known.get(key)
        if image is None:
            image = encode()
            self.num_encoded += 1
            self._known[key] = image
        memo.setdefault(_HELD, {})[key] = image
        return image

    def let_go(self, key: str, memo: dict[str, Any]) -> None:
        """Says that a request needs an image no more; it is dropped where memory is short."""
        if self.size_bytes > self.max_bytes:
            memo.get(_HELD, {}).pop(key, None)
