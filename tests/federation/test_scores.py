"""What stands for all clients, in metrics where more is better and where less is; and scores that cannot be."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from folklora.backbones.metric import ACCURACY, LOSS, MOST, Metric, Score
from folklora.errors import MessageError
from folklora.federation.scores import bounded, check_score, summarise
from folklora.federation.summary import Final


def test_the_spread_over_clients() -> None:
    scores = {str(i): Score(i, 20) for i in range(20)} | {"big": Score(500, 500)}
    found = summarise(scores, ACCURACY)
    accuracies = [i / 20 for i in range(20)] + [1.0]
    assert found["mean"] == pytest.approx(np.mean(accuracies))
    assert found["std"] == pytest.approx(np.std(accuracies))
    assert found["worst_tenth"] == pytest.approx((0 + 1 / 20) / 2)  # two of 21
    assert found["weighted"] == pytest.approx((sum(range(20)) + 500) / 900)
    assert found["clients"]["7"] == pytest.approx(7 / 20)
    assert list(found) == ["metric", "higher", "mean", "std", "worst_tenth", "weighted", "clients"]
    assert (found["metric"], found["higher"]) == ("accuracy", True)
    assert summarise({"a": Score(1, 4)}, ACCURACY)["worst_tenth"] == 0.25


def test_of_losses_the_worst_are_the_largest() -> None:
    scores = {str(i): Score(2.0 * i, 10) for i in range(20)} | {"long": Score(4.0, 400)}
    found = summarise(scores, LOSS)
    assert found["worst_tenth"] == pytest.approx((3.8 + 3.6) / 2)
    assert found["weighted"] == pytest.approx((2 * 190 + 4) / 600)
    assert (found["metric"], found["higher"]) == ("loss", False)


def test_other_metrics_are_means_over_the_clients_that_tell_them() -> None:
    scores = {
        "a": Score(2.0, 2, {"perplexity": math.e, "rouge_l": 0.5}),
        "b": Score(9.0, 3, {"perplexity": math.e**3}),
        "c": Score(1.0, 4, {"rouge_l": 0.1}),
    }
    beside = summarise(scores, LOSS)["beside"]
    assert beside == pytest.approx({"perplexity": (math.e + math.e**3) / 2, "rouge_l": 0.3})


@pytest.mark.parametrize(
    ("metric", "kept"),
    [(ACCURACY, {"up": 7.0, "down": 2.0, "same": 5.0}), (LOSS, {"up": 1.0, "down": 8.0, "same": 5.0})],
)
def test_a_client_chooses_the_model_that_validates_better(metric: Metric, kept: dict[str, float]) -> None:
    """And the one with the server's reply, where both do alike; what it scores in the test plays no part."""

    def scores(up: float, down: float, same: float) -> dict[str, Score]:
        return {name: Score(total, 10) for name, total in (("up", up), ("down", down), ("same", same))}

    final = Final(
        metric,
        scores(1, 2, 3),
        scores(3, 6, 4),
        received=scores(7, 8, 5),
        received_validation=scores(6, 3, 4),
        common=None,
    )
    assert {client: score.total for client, score in final.chosen.items()} == kept


def test_what_a_diverged_model_scores_is_written_and_counts_as_bad() -> None:
    scores = {
        "nan": bounded(Score(math.nan, 7, {"perplexity": math.nan})),
        "inf": bounded(Score(math.inf, 1, {"perplexity": math.inf})),
        "huge": bounded(Score(1e300, 1)),
        "sound": bounded(Score(2.5, 2, {"perplexity": 3.5})),
    }
    assert scores["sound"] == Score(2.5, 2, {"perplexity": 3.5})
    found = summarise(scores, LOSS)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(found["clients"][name] > 1e37 for name in ("nan", "inf", "huge"))
    assert found["worst_tenth"] == MOST


SOUND: list[tuple[Metric, Score]] = [
    (ACCURACY, Score(0, 9)),
    (ACCURACY, Score(9.0, 9, {"rouge_l": 1.0})),
    (LOSS, Score(0.0, 9)),
    (LOSS, Score(MOST, 9 * 16, {"perplexity": MOST, "exact_match": 0.0})),
]
BROKEN: list[tuple[Metric, Score, str]] = [
    (ACCURACY, Score(5, 8), "accuracy of 8; allowed: of 9 to 9"),
    (ACCURACY, Score(5, 10), "accuracy of 10; allowed: of 9 to 9"),
    (ACCURACY, Score(10, 9), "10 of 9; allowed: 0 to 9"),
    (ACCURACY, Score(-1, 9), "-1 of 9"),
    (ACCURACY, Score(4.5, 9), "4.5 right answers; allowed: a whole number"),
    (ACCURACY, Score(math.nan, 9), "nan of 9"),
    (LOSS, Score(1.0, 8), "loss of 8; allowed: of 9 to 144"),
    (LOSS, Score(1.0, 145), "loss of 145; allowed: of 9 to 144"),
    (LOSS, Score(-0.1, 9), "-0.1 of 9"),
    (LOSS, Score(1e39, 9), r"1e\+39 of 9"),
    (LOSS, Score(math.nan, 9), "nan of 9"),
    (LOSS, Score(1.0, 9, {"loss": 1.0}), "beside it 'loss'"),
    (LOSS, Score(1.0, 9, {"validation": 1.0}), "beside it 'validation'; allowed: accuracy, perplexity"),
    (LOSS, Score(1.0, 9, {"rouge_l": 1.01}), "rouge_l = 1.01; allowed: 0 to 1"),
    (LOSS, Score(1.0, 9, {"perplexity": math.inf}), "perplexity = inf; allowed: a finite number"),
]


@pytest.mark.parametrize(("metric", "score"), SOUND)
def test_scores_that_can_be_are_taken(metric: Metric, score: Score) -> None:
    check_score(score, metric, examples=9, length=16)


@pytest.mark.parametrize(("metric", "score", "said"), BROKEN)
def test_scores_that_cannot_be_are_named(metric: Metric, score: Score, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        check_score(score, metric, examples=9, length=16)
