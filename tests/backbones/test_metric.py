"""What results are judged by: which way is better, how a value is written, and that nothing else is compared."""

from __future__ import annotations

import pytest

from folklora.backbones.metric import ACCURACY, EXACT_MATCH, KNOWN, LOSS, PERPLEXITY, Metric, metric_of, same_metric
from folklora.errors import RunError


def test_more_merit_is_better() -> None:
    assert max([0.3, 0.7, 0.5], key=ACCURACY.merit) == 0.7
    assert max([0.3, 0.7, 0.5], key=LOSS.merit) == 0.3
    assert max([1e300, float("inf")], key=LOSS.merit) == 1e300


@pytest.mark.parametrize(
    ("metric", "value", "shown", "named"),
    [
        (ACCURACY, 0.71349, "71.3 %", "accuracy 71.3 %"),
        (LOSS, 2.3449, "2.345", "loss 2.345"),
        (LOSS, 12.0, "12.000", "loss 12.000"),
        (LOSS, 3e38, "3e+38", "loss 3e+38"),
        (PERPLEXITY, 10.4321, "10.4", "perplexity 10.4"),
        (EXACT_MATCH, 0.5, "50.0 %", "exact match 50.0 %"),
    ],
)
def test_a_value_is_written_as_results_show_it(metric: Metric, value: float, shown: str, named: str) -> None:
    assert (metric.show(value), metric.named(value)) == (shown, named)


def test_results_name_their_metric_and_those_of_before_are_accuracies() -> None:
    assert metric_of({"method": "fedit", "accuracy_mean": 0.7}) == ACCURACY
    assert metric_of({"metric": "loss", "higher": False}) == LOSS
    assert metric_of({"metric": "regret", "higher": False}) == Metric("regret", higher=False, percent=False)
    assert all(metric_of({"metric": name, "higher": metric.higher}) == metric for name, metric in KNOWN.items())


def test_runs_that_are_judged_differently_are_refused_by_name() -> None:
    assert same_metric([]) == ACCURACY
    assert same_metric([("a", LOSS), ("b", LOSS)]) == LOSS
    with pytest.raises(RunError, match=r"/runs: b by loss and a by accuracy: .* allowed: one metric"):
        same_metric([("b", LOSS), ("a", ACCURACY), ("c", LOSS)], "/runs: ")
