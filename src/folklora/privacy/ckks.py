"""Numbers that a server mixes without reading them: CKKS [IACR 2016/421] for weighted sums, and nothing else.

A ciphertext is a pair ``(c0, c1)`` of polynomials modulo ``q`` and ``X^n + 1`` with ``c0 + c1 s = m + e`` for a
secret s of coefficients -1, 0, 1: a message m and a Gaussian error e. A sum of ciphertexts times whole numbers is one
of the sum of their messages, so a server that mixes does arithmetic on columns of numbers and needs no key at all.

*Parameters.* n = 2048 and one prime q of 53 bits. At this degree, with a ternary secret, 54 bits are the most for
128-bit security in the homomorphic encryption standard's table of 2018, and SEAL refuses more; later estimates are a
little less generous [IACR 2024/463], so one bit stays unused. So few are enough because nothing but plaintext numbers
multiplies: no relinearisation, no rescaling, no rotation keys. A number takes 24 bits behind the point and 6 before it,
a weight 22, and there is one for the sign; weights are whole numbers of which each row sums to 2^22.

*Packing.* Numbers are coefficients of m, not its slots: slots serve products of vectors, and cost noise. So a
ciphertext carries as many numbers as coefficients, and a last one that is not full is as short as its numbers.

*Up* travels, of ``c1``, a 32-byte seed that expands to it (symmetric encryption), and of ``c0`` the upper 48 bits: 6
bytes a number. *Down* all of ``c1`` travels and c0's numbers, rounded to 32 bits (a switch of the modulus to 2^32): 4
bytes a number, and 8 KB each ciphertext. Of numbers of size 1, what is lost is below 1e-5 among a thousand
clients (``benchmarks/encrypted.py``); it grows with the numbers, since weights are rounded.

*Who does what.* SEAL, through TenSEAL, makes the secret, samples e and vouches for the parameters; what is here is the
arithmetic of packing, seeds, sums and rounding. The server's part (`folklora.privacy.ciphertexts`) needs neither
library nor context, and any bytes of the right number are a ciphertext: there is nothing to parse.

*What it does not do.* Whoever has the secret reads every ciphertext. A ciphertext is malleable and proves nothing: a
member that sends noise spoils every mix it has a weight in. Its first coefficient is therefore 1 in every upload, so
that a mix of anything else, or under another key, is noticed by whoever opens it. And decrypted numbers must not be
shown to whoever gave the ciphertexts, for their last digits hold the error [IACR 2020/1533].
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from folklora.errors import FederationError, MessageError
from folklora.privacy.ciphertexts import (
    BITS,
    DEGREE,
    DROPPED,
    MODULUS,
    NUMBERS,
    POINT,
    SEED,
    UNIT,
    UP,
    Mixed,
    Numbers,
    Sealed,
    Whole,
    ciphertexts,
    expanded,
    modular,
)

ID = 16
"""Characters that tell keys apart."""
MOST = 63.0
"""The largest magnitude of a number."""
_CHECK = 1e-3
"""How far from 1 the first coefficient of a mix may be."""
_LIMB = 18
"""Bits of a polynomial that are multiplied by the secret at once."""
_KEY = "folklora-ckks-1"


class Key:
    """The secret that the members share and the server must never have.

    Kept as the seed of SEAL's key generation, 64 bytes drawn from the system. Its file is one line of text.

    Raises
    ------
    FederationError
        If TenSEAL is not installed.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 64:
            raise ValueError(f"a seed of {len(seed)} bytes; allowed: 64")
        self.seed = seed
        seal = _seal()
        words = np.frombuffer(seed, dtype="<u8").tolist()
        secret = seal.KeyGenerator(_context(seal, words)).secret_key()
        # The secret is drawn from the seed; everything else, from here on, from the system.
        context = _context(seal)
        self._encryptor = seal.Encryptor(context, secret)
        self._evaluator = seal.Evaluator(context)
        self._ciphertext: Any = seal.Ciphertext
        self.trits = self._coefficients(secret.data())

    @classmethod
    def new(cls) -> Key:
        return cls(secrets.token_bytes(64))

    @classmethod
    def of_simulation(cls, seed: int) -> Key:
        """The key of a run in one process. Whoever knows the recipe can make it: a simulation hides nothing."""
        return cls(hashlib.blake2b(f"folklora simulation {seed}".encode(), digest_size=64).digest())

    @classmethod
    def parse(cls, text: str) -> Key:
        """Raises FederationError for anything but what `line` wrote."""
        name, _, rest = text.strip().partition(" ")
        digits, _, digest = rest.partition(" ")
        try:
            seed = bytes.fromhex(digits)
        except ValueError:
            seed = b""
        if name != _KEY or len(seed) != 64:
            raise FederationError("not a key; allowed: a file that `folklora keys` wrote")
        key = cls(seed)
        if key.id != digest:
            raise FederationError(f"a damaged key, or SEAL makes another of it here ({key.id}); it was {digest[:ID]!r}")
        return key

    def line(self) -> str:
        return f"{_KEY} {self.seed.hex()} {self.id}\n"

    @cached_property
    def id(self) -> str:
        """Tells keys apart, and says nothing of them."""
        return hashlib.sha256(b"folklora ckks key" + self.trits.tobytes()).hexdigest()[:ID]

    def encrypt(self, numbers: npt.ArrayLike) -> Sealed:
        """Encrypt a vector; two encryptions of the same numbers have nothing in common.

        Raises
        ------
        MessageError
            For a number that is not finite, or larger than `MOST`.
        """
        values = np.asarray(numbers, dtype=np.float64)
        if not bool(np.isfinite(values).all()) or float(np.abs(values).max(initial=0.0)) > MOST:
            raise MessageError(f"a number that cannot be encrypted; allowed: finite, -{MOST:g} to {MOST:g}")
        seeds = np.frombuffer(secrets.token_bytes(SEED * ciphertexts(len(values))), dtype=np.uint8).reshape(-1, SEED)
        body = []
        for i, seed in enumerate(seeds):
            own = values[i * NUMBERS : (i + 1) * NUMBERS]
            message = np.zeros(DEGREE, dtype=np.int64)
            message[0] = 1 << POINT
            message[1 : 1 + len(own)] = np.rint(own * 2.0**POINT).astype(np.int64)
            # SEAL's own encryption of zero is (e - c1 s, c1); c1 gives way to what the seed says, e stays.
            c0, c1 = self._encrypted_zero()
            c0 = modular([c0 + message], _LIMB) + self._times_secret((c1 - expanded(seed)) % MODULUS)
            body.append(c0[: 1 + len(own)] % MODULUS)
        upper = (np.concatenate(body or [np.empty(0, np.int64)]) + (1 << (DROPPED - 1))) >> DROPPED
        return Sealed(seeds.copy(), upper.astype("<u8")[:, None].view(np.uint8)[:, :UP].copy())

    def decrypt(self, mixed: Mixed) -> Numbers:
        """The numbers of one row.

        Raises
        ------
        MessageError
            If it was not made of ciphertexts under this key alone.
        """
        (masks,), (body,) = mixed.masks, mixed.body
        count, found = len(body) - len(masks), []
        if ciphertexts(count) != len(masks):
            raise MessageError(f"{len(masks)} ciphertexts of {count} numbers; allowed: {ciphertexts(count)}")
        for i, mask in enumerate(masks):
            own = body[i * DEGREE : (i + 1) * DEGREE]
            low, high = self._products(mask.astype(np.int64), 2)
            phase = (own + (low + (high << _LIMB))[: len(own)]) & 0xFFFFFFFF
            found.append(phase.astype(np.uint32).view(np.int32) / UNIT)
            if abs(found[-1][0] - 1.0) > _CHECK:
                raise MessageError(
                    "what came back was not encrypted with this member's key alone; allowed: one key for all members, "
                    "and members that send what they encrypted"
                )
        return np.concatenate([numbers[1:] for numbers in found] or [np.empty(0)])

    def _encrypted_zero(self) -> tuple[Whole, Whole]:
        zero = self._ciphertext()
        self._encryptor.encrypt_zero_symmetric(zero)
        self._evaluator.transform_from_ntt_inplace(zero)
        return _read(zero, 0), _read(zero, DEGREE)

    def _coefficients(self, secret: Any) -> npt.NDArray[np.int8]:
        """The secret, which SEAL keeps transformed: what it adds to a ciphertext before that is transformed back."""
        zero, shifted = self._ciphertext(), self._ciphertext()
        self._encryptor.encrypt_zero_symmetric(zero)
        self._evaluator.add_plain(zero, secret, shifted)
        for each in (zero, shifted):
            self._evaluator.transform_from_ntt_inplace(each)
        found = (_read(shifted, 0) - _read(zero, 0)) % MODULUS
        return np.where(found > 1, -1, found).astype(np.int8)

    @cached_property
    def _transformed(self) -> npt.NDArray[np.complex128]:
        return np.fft.rfft(self.trits, 2 * DEGREE)

    def _products(self, polynomial: Whole, limbs: int) -> list[Whole]:
        """Each limb of a polynomial times the secret, exactly: below 2^29, where float64 has 53 bits."""
        parts = np.stack([polynomial >> (_LIMB * i) & ((1 << _LIMB) - 1) for i in range(limbs)])
        whole = np.rint(np.fft.irfft(np.fft.rfft(parts, 2 * DEGREE) * self._transformed, 2 * DEGREE)).astype(np.int64)
        return list(whole[:, :DEGREE] - whole[:, DEGREE:])

    def _times_secret(self, polynomial: Whole) -> Whole:
        return modular(self._products(polynomial, 3), _LIMB)


def _seal() -> Any:
    try:
        import tenseal.sealapi as seal
    except ImportError:
        raise FederationError('secure.kind = "ckks" needs TenSEAL: pip install "folklora[he]"') from None
    return seal


def _context(seal: Any, seed: Sequence[int] | None = None) -> Any:
    """SEAL's view of the parameters, at 128-bit security; with a seed, what it draws follows from that."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    primes = seal.CoeffModulus.Create(DEGREE, [BITS])
    parameters.set_coeff_modulus(primes)
    if seed is not None:
        parameters.set_random_generator(seal.Blake2xbPRNGFactory(list(seed)))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set() or primes[0].value() != MODULUS:
        raise FederationError("this SEAL has other parameters than those of this program; allowed: TenSEAL 0.3.18")
    return context


def _read(ciphertext: Any, start: int) -> Whole:
    return np.fromiter((ciphertext[i] for i in range(start, start + DEGREE)), dtype=np.int64, count=DEGREE)
