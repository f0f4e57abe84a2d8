"""Every random number of a run derives from (seed, purpose, client, round).

Nothing else feeds a generator: not the order in which clients are visited, not how many train side by side, not the
engine. So a run is the same on one machine and over a network, today and after a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, purpose: str, client: str = "", round: int = 0) -> int:
    """A 63-bit seed for one purpose of one client in one round.

    Parameters
    ----------
    seed
        The recipe's seed.
    purpose
        What the numbers are for, such as ``"order"`` or ``"init/A"``. Two purposes never share a stream.
    client
        The client's stable id; empty for what concerns all clients or the server.
    round
        The round, from 1; 0 for what happens once, before the first round.
    """
    return _hashed(8, seed, purpose, client, round) >> 1


def _hashed(size: int, seed: int, purpose: str, client: str, round: int) -> int:
    fields = (str(seed), purpose, client, str(round))
    # Lengths before the fields: ("ab", "c") and ("a", "bc") must not meet.
    key = "".join(f"{len(field)}:{field}" for field in fields)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=size).digest(), "little")


def torch_generator(seed: int, purpose: str, client: str = "", round: int = 0) -> torch.Generator:
    """A CPU torch generator for ``(seed, purpose, client, round)``."""
    return torch.Generator().manual_seed(derive(seed, purpose, client, round))


def numpy_generator(seed: int, purpose: str, client: str = "", round: int = 0) -> np.random.Generator:
    """A NumPy generator for ``(seed, purpose, client, round)``."""
    return np.random.default_rng(derive(seed, purpose, client, round))


def secret_generator(secret: int, purpose: str, client: str = "", round: int = 0) -> np.random.Generator:
    """A generator of noise that protects somebody, with a key of 128 bits.

    Of the seed of a torch generator on a CPU 32 bits count, and those of a derived seed are 63: too few where others
    see what the noise was added to and can try them all.
    """
    return np.random.Generator(np.random.Philox(key=derive_secret(secret, purpose, client, round)))


def derive_secret(secret: int, purpose: str, client: str = "", round: int = 0) -> int:
    """As `derive`, of 128 bits: a secret for `secret_generator` that follows from another one."""
    return _hashed(16, secret, purpose, client, round)
