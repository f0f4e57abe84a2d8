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
    fields = (str(seed), purpose, client, str(round))
    # Lengths before the fields: ("ab", "c") and ("a", "bc") must not meet.
    key = "".join(f"{len(field)}:{field}" for field in fields)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, purpose: str, client: str = "", round: int = 0) -> torch.Generator:
    """A CPU torch generator for ``(seed, purpose, client, round)``."""
    return torch.Generator().manual_seed(derive(seed, purpose, client, round))


def numpy_generator(seed: int, purpose: str, client: str = "", round: int = 0) -> np.random.Generator:
    """A NumPy generator for ``(seed, purpose, client, round)``."""
    return np.random.default_rng(derive(seed, purpose, client, round))
