"""Orders and answers as flat records: what one end writes the other reads, and nothing else is taken."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.backbones.metric import Score
from folklora.errors import MessageError
from folklora.federation.orders import QUESTIONS, Answer, Order

COMMON: dict[str, Any] = {"run": "0a" * 16, "number": 7, "round": 2, "client": "north-1"}
REPLY = b"what the server says"
DIGEST = hashlib.sha256(REPLY).hexdigest()
ORDERS: list[dict[str, Any]] = [
    {
        "kind": "hello", "round": 0, "recipe": "seed = 0", "clients": ["north-1"], "classes": ["a", "b"],
        "backbone": DIGEST,
    },
    {"kind": "sketch", "round": 0},
    {"kind": "train", "base": 1, "accepted": True, "keep": [0, 1], "hold": [DIGEST], "reply": DIGEST},
    {"kind": "train", "base": -1, "welcome": DIGEST, "welcome_data": REPLY, "reply": DIGEST, "reply_data": REPLY},
    {"kind": "score", "base": 2, "questions": ["test", "validation+reply"], "reply": DIGEST},
    {"kind": "goodbye"},
]  # fmt: skip
ANSWERS: list[dict[str, Any]] = [
    {"status": "done", "loss": 0.25, "data": REPLY},
    {"status": "done", "totals": [3.0, 0.0], "units": [4, 9]},
    {
        "status": "done", "totals": [91.5, 12.25], "units": [40, 9], "beside": ["perplexity", "rouge_l", "perplexity"],
        "beside_of": [0, 0, 1], "beside_values": [9.8, 0.25, 3.9],
    },
    {"status": "done", "examples": [10, 2, 4], "backbone": DIGEST},
    {"status": "lost", "failure": "gone"},
]  # fmt: skip

SCORED: dict[str, Any] = {"totals": [1.0], "units": [4]}


@pytest.mark.parametrize("fields", ORDERS, ids=lambda fields: fields["kind"])
def test_an_order_crosses_as_it_is(fields: dict[str, Any]) -> None:
    order = Order.of({**COMMON, **fields})
    assert Order.of(order.record()) == order
    assert {**COMMON, **fields}.items() <= order.record().items()
    assert None not in order.record().values()


@pytest.mark.parametrize("fields", ANSWERS)
def test_an_answer_crosses_as_it_is(fields: dict[str, Any]) -> None:
    answer = Answer.of({**COMMON, **fields})
    assert Answer.of(answer.record()) == answer


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"client": "../up"}, "client"),
        ({"client": "a" * 65}, "client"),
        ({"client": "a\n"}, "client"),
        ({"run": "0A" * 16}, "run"),
        ({"round": 0}, "round"),
        ({"round": True}, "round"),
        ({"round": 2**31}, "round"),
        ({"number": -1}, "number"),
        ({"base": 2}, "base"),
        ({"base": -2}, "base"),
        ({"keep": [0] * 17}, "keep"),
        ({"hold": ["../secret"]}, "hold"),
        ({"reply": "parts"}, "reply"),
        ({"reply_data": b"other"}, "reply_data"),
        ({"reply": None, "reply_data": REPLY}, "reply_data"),
        ({"kind": "exec"}, "kind"),
        ({"kind": "score"}, "questions"),
        ({"questions": ["test"]}, "questions"),
        ({"recipe": "seed = 0"}, "recipe"),
        ({"extra": 1}, "extra"),
    ],
)
def test_an_order_that_cannot_be_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(MessageError, match=named):
        Order.of({**COMMON, **ORDERS[2], **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"totals": [1.0], "units": []}, "1 totals, 0 units"),
        ({"totals": [-1.0], "units": [4]}, "totals"),
        ({"totals": [float("nan")], "units": [4]}, "totals"),
        ({"totals": [1e300], "units": [4]}, "totals"),  # a number, but its square is none
        ({"totals": [1.0], "units": [2**60]}, "units"),
        ({"totals": [1.0], "units": [4.0]}, "units"),
        ({"totals": [1.0] * 9, "units": [4] * 9}, "totals"),
        ({**SCORED, "beside": ["perplexity"]}, "belong together"),
        ({**SCORED, "beside": ["perplexity"] * 2, "beside_of": [0, 0], "beside_values": [1.0, 2.0]}, "belong together"),
        ({**SCORED, "beside": ["perplexity"], "beside_of": [1], "beside_values": [1.0]}, "beside_of = 1 of 1"),
        ({**SCORED, "beside": ["a\n"], "beside_of": [0], "beside_values": [1.0]}, "beside"),
        ({**SCORED, "beside": ["a" * 33], "beside_of": [0], "beside_values": [1.0]}, "beside"),
        ({**SCORED, "beside": ["a"], "beside_of": [0], "beside_values": [float("inf")]}, "beside_values"),
        ({**SCORED, "beside": ["a"] * 65, "beside_of": [0] * 65, "beside_values": [1.0] * 65}, "beside"),
        ({"loss": float("inf")}, "loss"),
        ({"loss": "1"}, "loss"),
        ({"loss": 1.7e308}, "loss"),  # a number, but the mean of two is none
        ({"status": "lost"}, "without a reason"),
        ({"failure": "x" * 1001}, "failure"),
        ({"examples": [1, 2]}, "examples"),
        ({"backbone": "abc"}, "backbone"),
    ],
)
def test_an_answer_that_cannot_be_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(MessageError, match=named):
        Answer.of({**COMMON, "status": "done", **change})


def test_scores_cross_as_they_are() -> None:
    """Also those whose number is no float in few digits, and where two questions have other metrics of one name."""
    scores = [
        Score(0.1 + 0.2, 3, {"perplexity": 1 / 3, "rouge_l": 0.0}),
        Score(3, 7),
        Score(3e38, 2**40, {"perplexity": 3e38}),
    ]
    order = Order.of({**COMMON, **ORDERS[4], "questions": ["test", "validation", "test+reply"]})
    assert Answer.of(Answer.of_scores(order, scores).record()).scores == scores
    assert Answer.of_scores(order, []).scores == []


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=20),
    st.lists(st.integers(), max_size=4), st.lists(st.text(max_size=5), max_size=4),
    st.lists(st.floats(), max_size=4), st.sampled_from(QUESTIONS),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(
    st.sampled_from([Order, Answer]),
    st.sampled_from([*ORDERS, *ANSWERS]),
    st.dictionaries(
        st.one_of(st.sampled_from([*Order.model_fields, *Answer.model_fields]), st.text(max_size=8)), anything
    ),
)
def test_whatever_comes_is_read_or_refused_in_one_short_line(
    kind: type[Order | Answer], fields: dict[str, Any], change: dict[str, Any]
) -> None:
    said = ""
    try:
        read = kind.of({**COMMON, **fields, **change})
        assert kind.of(read.record()) == read
    except MessageError as error:
        said = str(error)
    assert len(said) < 1000
    assert said.isprintable()
