"""Text metrics on cases made by hand, against the formula, and on GSM8K's own answers."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.backbones.text_metrics import exact_match, final_number, rouge_l

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -7", "-7"),
        ("#### −7", "-7"),
        ("#### $5.", "5"),
        ("#### 3 dogs and 4 cats", "3"),  # what follows is another sentence
        ("#### 18\nQuestion: what is 5 + 6?", "18"),
        ("#### 1\n#### 2", "1"),
        ("#### none", None),  # nothing after the mark, whatever stood before it
        ("it is 5, #### none", None),
        ("The answer is 42.", "42"),
        ("first 3, then 4", "4"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("costs -$1,234.50.", "-1234.5"),
        ("costs $-3", "-3"),
        ("x=-5", "-5"),
        ("16-3", "3"),
        ("(5)-3", "3"),
        ("covid-19", "19"),
        ("in 1,2345 parts", "2345"),
        ("50%", "50"),
        ("9" * 5000, "9" * 5000),
        ("no number - at all...", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_in(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**12), max_value=10**12))
def test_a_number_is_read_however_it_is_written(number: Decimal) -> None:
    for shown in (f"{number:f}", f"{number:,f}"):
        assert final_number(f"so 7 and 8 make {shown}.") == number
        assert final_number(f"{shown} #### {shown} 9") == number


@pytest.mark.parametrize(
    ("reference", "answer", "matches"),
    [
        ("#### 18", "I think it is 18.", True),
        ("#### 18", "18.0", True),
        ("#### 1000", "It makes $1,000.", True),
        ("#### 18", "#### 17, or 18", False),
        ("#### 18", "no idea", False),
        ("#### 18", "", False),
        ("seven", " seven\n", True),
        ("two  words", "two words", True),
        ("seven", "Seven", False),
        ("seven", "seven 7", False),
        ("", "", True),
    ],
)
def test_exact_match(reference: str, answer: str, matches: bool) -> None:
    assert exact_match(reference, answer) == matches


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the data is not on this machine")
@pytest.mark.parametrize("part", ["train", "test"])
def test_gsm8ks_own_answers_match_themselves_alone(part: str) -> None:
    lines = (GSM8K / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    for answer in answers:
        told = Decimal(answer.rpartition("####")[2].replace(",", "").strip())
        assert final_number(answer) == told
        assert exact_match(answer, f"So the answer is {told:,}.")
        assert not exact_match(answer, f"So the answer is {told + 1}.")


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("The cat, sat!", "the CAT sat", 1.0),  # case and signs are no words
        ("a b c d", "a c e", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # a c: 2 of 3 and 2 of 4
        ("a b c", "c b a", 1 / 3),  # order counts
        ("a b", "c d", 0.0),
        ("a b", "", 0.0),
        ("", "a b", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l(reference: str, answer: str, score: float) -> None:
    assert rouge_l(reference, answer) == pytest.approx(score)
