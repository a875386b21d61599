"""What names a token block: a chain of SHA-256 over everything that its bytes depend on.

    namespace  SHA-256 of the identity: weights, RoPE, dtype, layout, adapters, tenant, ...
    root key   SHA-256("HTC1-root" | namespace | salt | first position)
    key i      SHA-256("HTC1-blk" | namespace | key i-1 | number of tokens | token ids)

A key stands for all tokens up to its block, so equal keys mean equal prefixes. Everything is typed
and length-prefixed before it is hashed: no two identities have one encoding. Keys are never
truncated, and do not depend on the process, the machine or Python's `hash`.
"""

import hashlib
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from hf_tiered_cache.errors import UnsupportedInputError

KEY_BYTES = 32
FORMAT = "HTC1"
_ROOT, _BLOCK = b"HTC1-root", b"HTC1-blk"
MAX_TOKEN_ID = 2**32 - 1

# None, bool, int, float, str, bytes, and sequences and mappings (by str) of such.
Value = Any


def namespace(identity: Mapping[str, Value]) -> bytes:
    """The 32 bytes that stand for `identity`, whatever the order of its entries.

    Raises UnsupportedInputError for a value that has no canonical encoding.
    """
    return hashlib.sha256(canonical({"format": FORMAT, **identity})).digest()


def canonical(value: Value) -> bytes:
    """An encoding that no other value has: type, length, content. An int is not a float of the
    same value, nor True, and a list is a tuple."""
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"T" if value else b"F"
    if isinstance(value, int):
        return _framed(b"i", str(value).encode())
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    if isinstance(value, str):
        return _framed(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _framed(b"b", value)
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise UnsupportedInputError(
                f"identity {sorted(map(repr, value))}: expected strings as names"
            )
        items = [canonical(name) + canonical(value[name]) for name in sorted(value)]
        return _framed(b"d", b"".join(items))
    if isinstance(value, Sequence):
        return _framed(b"l", b"".join(map(canonical, value)))
    raise UnsupportedInputError(
        f"identity value {value!r:.80}: expected None, bool, int, float, str, bytes, a sequence or"
        " a mapping of such"
    )


def _framed(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<Q", len(content)) + content


def root_key(space: bytes, salt: bytes = b"", first_position: int = 0) -> bytes:
    """The parent of the first block's key."""
    salt_length = struct.pack("<Q", len(salt))
    return _sha256(_ROOT, space, salt_length, salt, struct.pack("<Q", first_position))


def block_keys(
    space: bytes, token_ids: Sequence[int], block_tokens: int, salt: bytes = b""
) -> list[bytes]:
    """The keys of all full blocks of a sequence, first block first.

    Raises UnsupportedInputError for an id that is no unsigned 32-bit number.
    """
    try:
        ids = array("I", token_ids)
    except (OverflowError, TypeError, ValueError) as error:
        raise UnsupportedInputError(
            f"token ids: {error}; expected ints from 0 to {MAX_TOKEN_ID}"
        ) from None
    if struct.pack("=I", 1) != struct.pack("<I", 1):
        ids.byteswap()
    data, size = memoryview(ids).cast("B"), ids.itemsize * block_tokens
    count = struct.pack("<I", block_tokens)
    key = root_key(space, salt)
    keys = []
    for first in range(0, len(data) - size + 1, size):
        key = _sha256(_BLOCK, space, key, count, data[first : first + size])
        keys.append(key)
    return keys


def _sha256(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
