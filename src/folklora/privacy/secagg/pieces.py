"""What members and the server of a secure aggregation compute: keys, masks, points, and marks on them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from folklora.errors import FederationError, MessageError
from folklora.privacy.secagg.wire import MARK, POINT, Session

try:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError:
    raise FederationError("secure aggregation needs cryptography: pip install 'folklora[flower]'") from None

PRIME = 2**127 - 1
"""Points and secrets are whole numbers below it."""
OWN, MASKS = 0, 1
"""Which secret a point is of: the own mask's, or the mask key's."""

Words = npt.NDArray[np.uint32]
"""Numbers modulo 2^32."""


def derive_key(material: bytes, purpose: str, *context: bytes) -> bytes:
    """32 bytes for one purpose in one context."""
    info = b"".join(struct.pack("<I", len(part)) + part for part in (b"folklora masks", purpose.encode(), *context))
    return HKDF(SHA256(), 32, None, info).derive(material)


def keystream(key: bytes, count: int) -> Words:
    """So many uniform words; a key is used for one purpose, so the nonce is always the same."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * count)), dtype="<u4").astype(np.uint32, copy=False)


def agreed(own: X25519PrivateKey, theirs: bytes) -> bytes:
    """What both ends of a pair of keys know.

    Raises
    ------
    MessageError
        If theirs is no key that hides anything.
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise MessageError("a public key that agrees on nothing; allowed: one of X25519's full order") from None


def polynomial(secret: int, degree: int, key: bytes) -> list[int]:
    """Coefficients of a polynomial through ``secret`` at 0, the others drawn with a key."""
    drawn = keystream(key, 4 * degree).astype("<u4").tobytes()
    return [secret, *(number(drawn[i : i + POINT]) for i in range(0, len(drawn), POINT))]


def point(coefficients: Sequence[int], index: int) -> bytes:
    """The share of the member of this index: the polynomial at index + 1."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * (index + 1) + coefficient) % PRIME
    return value.to_bytes(POINT, "little")


def at_zero(indices: Sequence[int]) -> list[int]:
    """Lagrange's weights: sum of weight x point is the polynomial at 0, if it has fewer coefficients than points."""
    weights = []
    for i in indices:
        above = below = 1
        for j in indices:
            if j != i:
                above = above * (j + 1) % PRIME
                below = below * (j - i) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def number(data: bytes) -> int:
    return int.from_bytes(data, "little") % PRIME


def mark(session: Session, which: int, owner: int, holder: int, share: bytes) -> bytes:
    """What tells a point without telling of it: it has 127 bits that nobody else knows."""
    told = b"".join((b"folklora point", session.head, struct.pack("<BII", which, owner, holder), share))
    return hashlib.sha256(told).digest()[:MARK]


def mask_key(session: Session, secret: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive_key(_bytes(secret), "mask key", session.head))


def own_mask(session: Session, secret: int) -> bytes:
    """The key of a member's own mask."""
    return derive_key(_bytes(secret), "own mask", session.head)


def own_mark(session: Session, secret: int) -> bytes:
    return derive_key(_bytes(secret), "own mark", session.head)[:MARK]


def pair_mask(session: Session, own: X25519PrivateKey, theirs: bytes, one: int, other: int, told: bytes) -> bytes:
    """The key of the mask of two members, by their indices: the same from either side if both were ``told`` the same.

    It is no other pair's, even if somebody shows a third one's key as its own (or one that agrees on the same: each has
    several).
    """
    pair = struct.pack("<II", *sorted((one, other)))
    return derive_key(agreed(own, theirs), "pair mask", session.head, pair, told)


def told(attached: bytes, terms: bytes) -> bytes:
    """What everybody must have been told alike, for masks to cancel."""
    return hashlib.sha256(struct.pack("<Q", len(attached)) + attached + terms).digest()


def _bytes(secret: int) -> bytes:
    return secret.to_bytes(POINT, "little")
