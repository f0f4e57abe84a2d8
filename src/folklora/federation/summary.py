"""What a finished run says of itself: the compare row, each client's result, and who did not answer any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from folklora.backbones.metric import Metric, Score
from folklora.federation.ledger import Ledger
from folklora.federation.scores import summarise
from folklora.recipe import Recipe

Scores = Mapping[str, Score]


@dataclass(frozen=True)
class Final:
    """The last scores, by client: on the test and the validation split, before and after the server's last reply.

    All are in one metric. All four are of the same clients, those that answered. ``common`` is the global model's, if
    there is one.
    """

    metric: Metric
    tuned: Scores
    tuned_validation: Scores
    received: Scores
    received_validation: Scores
    common: Score | None

    @property
    def chosen(self) -> Scores:
        """Test scores where each client keeps the one of its two models that does better on its validation split."""
        merit = self.metric.merit
        return {
            client: received
            if merit(self.received_validation[client].value) >= merit(self.tuned_validation[client].value)
            else self.tuned[client]
            for client, received in self.received.items()
        }


def summary(
    recipe: Recipe,
    clients: Sequence[str],
    committed: int,
    lines: Sequence[Mapping[str, Any]],
    final: Final,
    ledger: Ledger,
) -> dict[str, Any]:
    """What `Final` is of, in the form of ``summary.json``.

    Parameters
    ----------
    committed
        The round whose models were scored: the last one, or the best.
    lines
        Those of ``metrics.jsonl``.
    ledger
        What the end itself cost.
    """
    metric, chosen = final.metric, final.chosen
    once, rounds = lines[0], lines[1:]
    turns = max(1, sum(len(m["participants"]) + len(m["failed"]) for m in rounds))
    errors = [m["aggregation_error"] for m in rounds if m["aggregation_error"] is not None]
    seconds = [s for m in lines for s in m["seconds"].values()]
    name, test = metric.name, summarise(final.received, metric)
    row = {
        "method": recipe.method.name,
        "seed": recipe.seed,
        "metric": name,
        "higher": metric.higher,
        f"{name}_mean": test["mean"],
        f"{name}_std_clients": test["std"],
        f"{name}_worst_tenth": test["worst_tenth"],
        f"{name}_weighted": test["weighted"],
        f"{name}_tuned_mean": summarise(final.tuned, metric)["mean"],
        f"{name}_chosen_mean": summarise(chosen, metric)["mean"],
        f"{name}_global": final.common.value if final.common else None,
        **{f"{other}_mean": mean for other, mean in test.get("beside", {}).items()},
        "validation_mean": summarise(final.received_validation, metric)["mean"],
        "bytes_up_per_client_round": sum(m["bytes_up"] for m in rounds) / turns,
        "bytes_down_per_client_round": (sum(m["bytes_down"] for m in rounds) + ledger.down.total()) / turns,
        "bytes_once_per_client": (once["bytes_up"] + once["bytes_down"]) / len(clients),
        "rounds": committed,
        "seconds_train": sum(m["seconds"].get("train", 0.0) for m in rounds),
        "seconds_total": sum(seconds) + sum(ledger.seconds.values()),
        "aggregation_error": sum(errors) / len(errors) if errors else None,
    }
    results = {
        client: {
            name: score.value,
            f"{name}_tuned": final.tuned[client].value,
            f"{name}_chosen": chosen[client].value,
            **score.beside,
        }
        for client, score in final.received.items()
    }
    missing = [client for client in clients if client not in results]
    return {"row": row, "clients": results, **({"missing": missing} if missing else {})}
