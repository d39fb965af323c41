"""What a block holds, as a hash: of its tokens and of everything before them.

Two blocks with the same hash hold the same keys and values, since these depend on all earlier
tokens of the request. The hash is cryptographic, since a collision would show one user's context to
another, and the same in every process and on every machine, so that tiers and routers can use it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

DIGEST_SIZE = 32


def root_hash(salt: str | None, extra_keys: Sequence[str] = ()) -> bytes:
    """The parent of a request's first block.

    What changes keys and values but is no token enters here: adapters and images as `extra_keys`.
    So does the salt of a tenant, who is to share with nobody else.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE, person=b"quire-root")
    for key in (salt,) if salt is not None else ():
        digest.update(_labelled(b"salt", key))
    for key in extra_keys:
        digest.update(_labelled(b"extra", key))
    return digest.digest()


def hash_source(root: bytes, num_blocks: int) -> list[bytes]:
    """Hashes of the blocks that an encoder fills for a request of that root.

    The root tells all that the encoder is given, so that the index of a block is all there is more.
    """
    return [
        hashlib.blake2b(
            root + struct.pack("<I", index), digest_size=DIGEST_SIZE, person=b"quire-source"
        ).digest()
        for index in range(num_blocks)
    ]


def _labelled(label: bytes, text: str) -> bytes:
    """Label and text with their lengths, so that no two lists of keys read the same."""
    data = text.encode()
    return struct.pack("<II", len(label), len(data)) + label + data


def hash_blocks(token_ids: Sequence[int], block_size: int, parent: bytes) -> list[bytes]:
    """The chained hashes of the full blocks of `token_ids`, which follow the block of `parent`.

    A last block that is not full has none. Token ids are below 2^32.
    """
    pack = struct.Struct(f"<{block_size}I").pack
    blake2b = hashlib.blake2b
    hashes = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        data = parent + pack(*token_ids[start : start + block_size])
        parent = blake2b(data, digest_size=DIGEST_SIZE).digest()
        hashes.append(parent)
    return hashes
