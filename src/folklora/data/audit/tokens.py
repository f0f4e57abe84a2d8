"""Sequences as their measures take them: symbols numbered from 0, and where each text begins."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def normalised(text: str) -> str:
    """A text without what nobody reads: NFKC, case folded, white space of any kind and length one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, apostrophes within, after `normalised`; punctuation is dropped.

    A script that does not part its words (Chinese, Japanese, Thai) gives one word a run: take characters instead.
    """
    return _WORD.findall(normalised(text))


@dataclass(frozen=True, eq=False)
class Tokens:
    """One or more sequences, one behind the other.

    What a symbol is called does not matter to any measure: ids are only compared, never subtracted.

    Attributes
    ----------
    codes
        ``[n]`` symbols, numbered from 0 in the order in which they first appear.
    offsets
        ``[sequences + 1]``: sequence ``k`` is ``codes[offsets[k]:offsets[k + 1]]``. The first is 0, the last ``n``.
    """

    codes: Ints
    offsets: Ints

    @classmethod
    def of(cls, ids: ArrayLike | Tokens, offsets: ArrayLike | None = None) -> Tokens:
        """Ids or words, 1-D: integers of any size and sign, or strings; one sequence, or several cut at ``offsets``.

        Raises
        ------
        ValueError
            Not one-dimensional, neither integers nor strings, or offsets that do not run from 0 to ``n`` upwards.
        """
        if isinstance(ids, Tokens):
            return ids
        symbols = ids if isinstance(ids, np.ndarray) else _column(ids)
        if symbols.ndim != 1:
            raise ValueError(f"ids must be 1-D, not of shape {symbols.shape}")
        kind = pd.api.types.infer_dtype(symbols, skipna=False)
        named = kind in ("integer", "string") or (kind == "mixed-integer" and _nameable(symbols))
        if symbols.size and not named:
            raise ValueError(f"ids must be integers or strings, not {kind}")
        bounds = np.array([0, len(symbols)]) if offsets is None else np.asarray(offsets)
        if bounds.ndim != 1 or bounds.dtype.kind not in "iu" or not len(bounds):
            raise ValueError("offsets must be a list of integers")
        if bounds[0] != 0 or bounds[-1] != len(symbols) or (np.diff(bounds.astype(np.int64)) < 0).any():
            raise ValueError(f"offsets must run from 0 to {len(symbols)} upwards")
        codes, _ = pd.factorize(symbols.astype(object) if symbols.dtype.kind == "U" else symbols)
        return cls(codes.astype(np.int64, copy=False), bounds.astype(np.int64))

    @classmethod
    def joined(cls, sequences: Iterable[Sequence[int] | Sequence[str]]) -> Tokens:
        """Several sequences of ids or words; empty ones stay, as sequences of no token."""
        parts = list(sequences)
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        flat: list[Any] = list(chain.from_iterable(parts))
        return cls.of(flat, offsets)

    @classmethod
    def words(cls, texts: Iterable[str]) -> Tokens:
        """The `words` of each text."""
        return cls.joined([words(text) for text in texts])

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def sequences(self) -> int:
        """How many sequences there are, empty ones too."""
        return len(self.offsets) - 1

    @cached_property
    def symbols(self) -> int:
        """How many different symbols occur."""
        return int(self.codes.max()) + 1 if len(self.codes) else 0

    @cached_property
    def lengths(self) -> Ints:
        """``[sequences]`` tokens of each."""
        return np.diff(self.offsets)

    def grams(self, m: int, followed: bool = False) -> Ints:
        """Each run of ``m`` tokens within a sequence, in order, as a number: equal exactly where the runs are.

        Parameters
        ----------
        followed
            Only those that go on in their sequence.
        """
        if m < 1:
            raise ValueError(f"m must be 1 or more, not {m}")
        keys, size = self.codes, self.symbols
        for step in range(1, m):
            if size * self.symbols >= 2**63:
                found, keys = np.unique(keys, return_inverse=True)
                size = len(found)
            keys = keys[:-1] * self.symbols + self.codes[step:]
            size *= self.symbols
        span = m + followed
        starts = max(len(self) - span + 1, 0)
        if self.sequences == 1:
            return keys[:starts]
        ends = np.repeat(self.offsets[1:], self.lengths)[:starts]
        return keys[:starts][np.arange(span, starts + span) <= ends]


def _column(ids: ArrayLike) -> NDArray[Any]:
    """A list as an array; with a word among integers NumPy alone would make words of them all, "1" the same as 1."""
    listed: Any = ids if isinstance(ids, list | tuple) else list(ids)  # type: ignore[arg-type]
    if any(isinstance(symbol, str) for symbol in listed):
        return np.array(listed, dtype=object)
    found = np.array(listed)
    # Of integers beyond 64 bits NumPy makes floats, and several become one.
    whole = found.dtype.kind == "f" and all(isinstance(symbol, int | np.integer) for symbol in listed)
    return np.array(listed, dtype=object) if whole and listed else found


def _nameable(symbols: NDArray[Any]) -> bool:
    return all(isinstance(symbol, int | np.integer | str) and not isinstance(symbol, bool) for symbol in symbols)
