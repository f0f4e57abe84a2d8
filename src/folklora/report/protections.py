"""What was promised, in words: the epsilon of differential privacy, encryption and its trust, rules against liars."""

from __future__ import annotations

import math
from typing import Any

from folklora.federation.sampling import by_chance
from folklora.federation.secrecy import parties, threshold
from folklora.report.facts import Facts
from folklora.report.vocabulary import SKETCHED

RULES = {
    "mean": "The mean: no rule against clients that lie.",
    "clip": "Every update is cut to a length before the mean: a lie can be no longer than the others.",
    "median": "The median of each number: lies count as long as they are fewer than half.",
    "trimmed": "The mean of each number without its largest and smallest values.",
    "krum": "The one update that is nearest to its neighbours.",
    "multikrum": "The mean of the updates that are nearest to their neighbours.",
    "geometric": "The geometric median of the updates: the point with the least sum of distances.",
}
ADDED = {"server": "by the server", "shares": "in shares by the clients", "client": "by each client"}
POISON = {
    "labels": "trained on wrong labels",
    "sign": "sent the opposite of what they learnt",
    "noise": "sent noise",
    "backdoor": "taught a hidden trigger",
}


def epsilon(facts: Facts) -> dict[str, Any]:
    """Epsilon and delta of training and of the one-off statistics; what they cover, and what they do not."""
    training, sketch = _training(facts), _sketch(facts)
    if training is None and sketch is None:
        says = "No differential privacy: nothing is promised about any single example or client, and no epsilon holds."
    else:
        says = " ".join(part["says"] for part in (training, sketch) if part is not None)
    covers: list[str] = []
    if training is not None:
        covers += _covered(facts)
    if sketch is not None:
        covers.append("The class statistics that each client sends once: what they say of one example.")
    return {
        "says": says,
        "training": training,
        "statistics": sketch,
        "covers": covers,
        "does_not_cover": _uncovered(facts) if covers else [],
    }


def _training(facts: Facts) -> dict[str, Any] | None:
    section = facts.recipe.privacy
    if section.unit == "none" or not facts.travels:
        return None
    last = facts.spent[-1] if facts.spent else None
    spent = last[1].epsilon if last else None
    delta = (last[1].delta if last else None) or section.delta
    both = section.unit == "example" and facts.sketch_epsilon is not None
    what = "Training and the statistics sent once have together" if both else "Training has"
    who = "one client" if section.unit == "client" else "one example"
    if last is None:
        says = f"Noise is added to training so that {who} is hidden; no round has been played, so nothing is spent yet."
    elif spent is None or not math.isfinite(spent):
        says = f"Noise is added to training so that {who} is hidden, but no finite epsilon holds (delta {delta:g})."
    else:
        says = (
            f"{what} spent epsilon = {spent:.3g} at delta = {delta:g} after round {last[0]}: whether {who} was "
            "in it or not changes the odds of anything that others can conclude by at most a factor of "
            f"{_odds(spent)}, but for a chance of {delta:g}."
        )
    return {
        "says": says,
        "unit": section.unit,
        "epsilon": spent,
        "delta": delta,
        "budget": section.epsilon,
        "noise": (last[1].noise if last else None) or section.noise,
        "clip": section.clip,
        "added": ADDED[section.placement if section.unit == "client" else "client"],
        "accountant": section.accountant,
        "by_round": [[number, each.epsilon] for number, each in facts.spent],
    }


def _sketch(facts: Facts) -> dict[str, Any] | None:
    if facts.sketch_epsilon is None:
        return None
    spent, delta = facts.sketch_epsilon
    return {
        "says": f"The class statistics were released once with epsilon = {spent:.3g}, delta = {delta:g} for one "
        f"example (a factor of {_odds(spent)}).",
        "unit": "example",
        "epsilon": spent,
        "delta": delta,
    }


def _odds(spent: float) -> str:
    return f"{float(f'{math.exp(spent):.2g}'):,g}" if spent <= 10 else "more than 20,000"


def _covered(facts: Facts) -> list[str]:
    section = facts.recipe.privacy
    if section.unit == "example":
        return [
            "All that a client trains, what it sends and what it keeps: what they say of one of its examples, against "
            "the server, the other clients and whoever gets the finished models."
        ]
    against = {
        "server": "against the other clients and whoever gets the finished models, not against the server",
        "shares": "against whoever sees sums of a round alone",
        "client": "against the server, the other clients and whoever gets the finished models",
    }[section.placement]
    return [f"All that one client sends in its rounds together, {against}."]


def _uncovered(facts: Facts) -> list[str]:
    found = [
        "Training losses and scores on validation and test splits, which are told exactly."
        if facts.recipe.privacy.tells_losses
        else "Scores on validation and test splits, which are told exactly.",
        "How many examples a client has in each split.",
        "Who takes part in which round.",
    ]
    if by_chance(facts.recipe):
        found[-1] = (
            "Who takes part in which round: the epsilon counts on nobody knowing who was drawn, and this folder "
            "tells it."
        )
    if facts.recipe.privacy.unit == "client":
        found.append("What a client keeps and never sends: its private tensors at home.")
    if facts.recipe.privacy.unit == "none" and facts.travels:
        found.append("What a client sends in its rounds: it has no noise.")
    if facts.simulated:
        found.append(
            "Anybody who knows the recipe's seed: a simulation draws every client's noise from it, so that runs "
            "repeat. A member of a real federation draws its own."
        )
    return found


def encryption(facts: Facts) -> dict[str, Any]:
    """Transport and secure aggregation in force, and who must trust whom."""
    section = facts.recipe.secure
    if facts.simulated:
        transport = "None: this was a simulation in one process, and nothing went over a network."
    else:
        transport = (
            "TLS between each member and the server, under a certificate authority of the federation's own; every "
            "request is signed by the member's key. (Without it only where the server was started with --insecure, "
            "which it accepts on one machine alone.)"
        )
    clients = len(facts.run.clients)
    needed, together = threshold(facts.recipe, clients), parties(facts.recipe, clients)
    what, trust = {
        "none": (
            "The server reads every client's messages.",
            ["Every client must trust the server with all that it sends."],
        ),
        "masks": (
            "Secure aggregation: each client's message is hidden by masks that cancel in the sum of a round, so the "
            "server reads sums alone.",
            [
                f"Every client must trust that fewer than {needed} of a round's {together} clients work together with "
                "the server.",
                "The server is trusted to follow the protocol, not with single messages; and to pass the clients' keys "
                "on unchanged, unless clients sealed them with a key of their own (folklora join --key).",
            ],
        ),
        "ckks": (
            "Encrypted mixing: clients send ciphertexts, and the server mixes them with plain weights without reading "
            "them (CKKS).",
            [
                "The server is trusted to mix as agreed, and then cannot read messages; it still sees what is sent "
                "once, numbers of examples, losses and scores. One that sends made-up replies can find the clients' "
                "key by how they react.",
                "Clients share one key: every client must trust every other not to use it with the server.",
                "A client that sends noise spoils the mixes that it is in, which is noticed, and cannot be traced.",
            ],
        ),
    }[section.kind]
    if not facts.travels:
        what = "Nothing that was trained travels, so there is nothing to encrypt in the rounds."
        trust = ["Every client must trust the server with what it sends once."] if facts.once else []
    also = f" Sent once, and not covered: {_sketched(facts)}." if section.kind != "none" and facts.once else ""
    return {
        "says": what + also,
        "kind": section.kind if facts.travels else "none",
        "transport": transport,
        "trust": trust,
        "at_rest": "None: tensors and examples lie on disk as they are.",
    }


def _sketched(facts: Facts) -> str:
    return ", ".join(SKETCHED[name][0] for name in SKETCHED if name in facts.once)


def robustness(facts: Facts) -> dict[str, Any]:
    """The rule against clients that lie, and lies that were simulated."""
    rule, poison = facts.recipe.robust, facts.recipe.poison
    says = (
        RULES[rule.rule]
        if facts.travels
        else "Nothing that was trained travels, so nobody's lie reaches others' models."
    )
    if rule.rule != "mean" and facts.travels:
        says += " Every client counts the same, however many examples it claims to have."
    if rule.rule in {"trimmed", "krum", "multikrum"} and facts.travels:
        says += f" It expects at most {rule.byzantine:.0%} of the clients to lie."
    lied = poison.kind != "none" and poison.share > 0
    return {
        "says": says,
        "rule": rule.rule,
        "poison": f"Simulated: {poison.share:.0%} of the clients {POISON[poison.kind]}." if lied else None,
    }
