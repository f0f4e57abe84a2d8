"""How good a generated text is beside the reference: ROUGE-L, and exact match on what counts in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

MARK = "####"
"""What GSM8K writes before the final number."""

_NUMBER = re.compile(
    r"((?<![\w.,)])[-−])?"  # a sign, where it is neither a hyphen nor a subtraction
    r"(?:[$€£¥]([-−])?)?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"  # 1,234.5 or 1234.5 or .5
)


def final_number(text: str) -> Decimal | None:
    """The number that a text ends in: the first one after ``####``, else the last one there is.

    Thousands may have commas, a currency sign may stand before it and a full stop behind it: ``-$1,234.50.`` is
    -1234.5.
    """
    _, marked, behind = text.partition(MARK)
    found = list(_NUMBER.finditer(behind if marked else text))
    if not found:
        return None
    before, behind_currency, digits = found[0 if marked else -1].groups()
    return Decimal(("-" if before or behind_currency else "") + digits.replace(",", ""))


def exact_match(reference: str, answer: str) -> float:
    """1 or 0: the same final number, or, where the reference has none, the same words."""
    wanted = final_number(reference)
    if wanted is None:
        return float(reference.split() == answer.split())
    return float(wanted == final_number(answer))


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence of words, from 0 to 1.

    By Google's `rouge-score`, without stemming; its words are runs of a-z and 0-9, so texts in other scripts score 0.
    """
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


TEXT_METRICS: Mapping[str, Callable[[str, str], float]] = {"rouge_l": rouge_l, "exact_match": exact_match}
"""Name, as in ``eval.generate`` -> how one answer does beside its reference, from 0 to 1."""
