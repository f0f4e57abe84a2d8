"""What encrypted numbers are, and how a server mixes them; `folklora.privacy.ckks` says why they are what they are.

Plain arithmetic on columns of numbers: no key, no library, and nothing in a ciphertext that could be malformed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Whole = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.float64]

DEGREE = 2048
BITS = 53
MODULUS = 9007199254614017
"""The largest prime below 2^53 that is 1 modulo 2 n; what SEAL's ``CoeffModulus::Create(2048, {53})`` gives."""
NUMBERS = DEGREE - 1
"""Of one ciphertext; its first coefficient is the check."""
SEED = 32
UP = 6
"""Bytes of a coefficient on its way up: 48 of its 53 bits."""
DROPPED = BITS - 8 * UP
POINT = 24
"""Bits of a number behind the point."""
_WEIGHT = 22
_DOWN = 2.0**32 / MODULUS
UNIT = _DOWN * 2.0 ** (POINT + _WEIGHT)
"""What a 1 is in a mixed ciphertext."""
_COLUMNS = 1 << 22
"""Numbers that are mixed at once: 32 MB of each of a few arrays."""


def ciphertexts(count: int) -> int:
    """How many carry so many numbers."""
    return -(-count // NUMBERS)


@dataclass(frozen=True)
class Sealed:
    """Numbers encrypted by a member: ``seeds`` [m, 32] and ``body`` [count + m, 6]."""

    seeds: Bytes
    body: Bytes


@dataclass(frozen=True)
class Mixed:
    """Rows of sums of such: ``masks`` [rows, m, n] and ``body`` [rows, count + m], modulo 2^32."""

    masks: Words
    body: Words

    def row(self, i: int) -> Mixed:
        return Mixed(self.masks[i : i + 1], self.body[i : i + 1])


def mix(uploads: Sequence[Sealed], weights: npt.ArrayLike) -> Mixed:
    """``sum_j w_ij x_j`` of encrypted x_j, for each row of weights; needs no key.

    Parameters
    ----------
    uploads
        Of the same number of numbers each.
    weights
        [rows, uploads], not negative; each row sums to one. They are rounded to multiples of 2^-22.

    Notes
    -----
    Sums are exact: with limbs of 27 bits, and rows that sum to 2^22, none exceeds 2^49, whatever the number of members;
    so two products of float64 matrices do for each coefficient.
    """
    w = whole_weights(np.asarray(weights, dtype=np.float64))
    seeds = np.stack([upload.seeds for upload in uploads])
    masks = np.empty((len(w), seeds.shape[1], DEGREE), dtype=np.uint32)
    for i in range(seeds.shape[1]):
        masks[:, i] = _mixed(w, np.stack([expanded(seed) for seed in seeds[:, i]]))
    packed = np.stack([upload.body for upload in uploads])
    body = np.empty((len(w), packed.shape[1]), dtype=np.uint32)
    columns = max(1, _COLUMNS // max(packed.shape[0], len(w)))
    for start in range(0, packed.shape[1], columns):
        some = packed[:, start : start + columns]
        full = np.zeros((*some.shape[:2], 8), dtype=np.uint8)
        full[..., :UP] = some
        body[:, start : start + columns] = _mixed(w, full.view("<i8")[..., 0] << DROPPED)
    return Mixed(masks, body)


def whole_weights(weights: Numbers) -> Numbers:
    """Rows of weights as whole numbers that sum to 2^22, by largest remainder.

    Raises
    ------
    ValueError
        For a row that is not one of weights.
    """
    if not bool((weights >= 0).all()) or float(np.abs(weights.sum(1) - 1).max()) > 1e-4:
        raise ValueError("weights that are negative or do not sum to one")
    exact = weights * (2.0**_WEIGHT / weights.sum(1, keepdims=True))
    low = np.floor(exact)
    missing = np.rint(2.0**_WEIGHT - low.sum(1, keepdims=True))
    place = np.argsort(np.argsort(low - exact, axis=1, kind="stable"), axis=1, kind="stable")
    rounded: Numbers = low + (place < missing)
    return rounded


def _mixed(weights: Numbers, values: Whole) -> Words:
    """Whole weights [rows, K] times values [K, columns] below 2^53, modulo q, switched to modulo 2^32."""
    low, high = ((part.astype(np.float64)) for part in (values & ((1 << 27) - 1), values >> 27))
    total = modular([(weights @ low).astype(np.int64), (weights @ high).astype(np.int64)], 27)
    switched = np.rint(total * _DOWN).astype(np.int64) & 0xFFFFFFFF
    return switched.astype(np.uint32)


def expanded(seed: Bytes) -> Whole:
    """The polynomial that a seed stands for: coefficients uniform modulo q."""
    drawn = np.frombuffer(hashlib.shake_256(seed.tobytes()).digest(8 * (DEGREE + 64)), dtype="<u8")
    drawn = (drawn & np.uint64((1 << BITS) - 1)).astype(np.int64)
    # One in 2^36 is not below q.
    return drawn[drawn < MODULUS][:DEGREE]


def modular(limbs: Sequence[Whole], bits: int) -> Whole:
    """``sum_i limb_i 2^(bits i)`` modulo q; no step leaves 63 bits. ``bits`` is a multiple of 9."""
    total = limbs[-1] % MODULUS
    for limb in limbs[-2::-1]:
        for _ in range(bits // 9):
            total = (total << 9) % MODULUS
        total = (total + limb % MODULUS) % MODULUS
    return total
