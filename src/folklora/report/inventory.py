"""What left each client, and what stayed: names, shapes, how often, bytes; in words for people who train nothing.

Bytes are those of ``metrics.jsonl``, measured on encoded messages. A message is one piece: its bytes are shared out
among the kinds of tensors in it by how many numbers each has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from folklora.adapters.lowrank import Shapes, kind
from folklora.report.facts import Facts
from folklora.report.tables import human_bytes
from folklora.report.vocabulary import SKETCHED, TELLS, WORDS

MOST_CLIENTS = 500
"""Lines of the table of clients."""


@dataclass(frozen=True)
class Sent:
    """A kind of tensor that left clients.

    Attributes
    ----------
    what, names, shapes, often, form, tells
        In words; ``names`` is the first tensor's and how many there are, ``form`` whether anybody could read it.
    numbers
        In one message, from the client with the fewest to the one with the most; None where no shapes are on record.
    bytes
        That left all clients so far.
    """

    kind: str
    what: str
    names: str
    shapes: str
    often: str
    form: str
    numbers: tuple[int, int] | None
    bytes: int
    tells: str


@dataclass(frozen=True)
class Reported:
    """A number that clients tell beside what they send, always in the clear."""

    what: str
    often: str
    tells: str


@dataclass(frozen=True)
class Stayed:
    """What never left."""

    what: str
    why: str


@dataclass(frozen=True)
class Traffic:
    """One client's part. ``numbers`` are those of one message, None where no shapes are on record; ``epsilon`` is its
    own, where each has one."""

    client: str
    rounds: int
    numbers: int | None
    once: int
    up: int
    down: int
    epsilon: float | None


def sent(facts: Facts) -> list[Sent]:
    """What leaves a client in its rounds, and what left it once."""
    found = [_line(facts, name, weight) for name, weight in _round_bytes(facts).items()]
    once = (facts.run.once.bytes_up if facts.run.once else 0) + sum(
        sum(line.refresh.bytes_up_clients.values()) for line in facts.run.rounds if line.refresh
    )
    once += newcomers_bytes(facts)[0]
    numbers = _once_numbers(facts)
    whole = max(1, sum(numbers.values()))
    return found + [_once(facts, name, count, round(once * count / whole)) for name, count in numbers.items()]


def newcomers_bytes(facts: Facts) -> tuple[int, int]:
    """What clients that joined after the last round sent, and got, all together."""
    joined, count = facts.run.joined, len(facts.run.newcomers)
    if joined is None:
        return 0, 0
    return round(count * joined.bytes_up_per_client), round(count * joined.bytes_down_per_client)


def _once_numbers(facts: Facts) -> dict[str, int]:
    """At most so many numbers of each part of what is sent once."""
    context = facts.method.context
    most = {
        "statistics": context.classes * (context.width + 1) + context.width**2,
        "counts": context.classes,
        "gradients": sum(site.d_in * site.d_out for site in context.sites),
    }
    found = {name: count for name, count in most.items() if name in facts.once}
    if "mixtures" in facts.once:
        found["mixtures"] = max(0, facts.method.sketch_numbers() - sum(found.values()))
    return found


def _line(facts: Facts, name: str, weight: float) -> Sent:
    pairs = list(dict.fromkeys((_of(odd, name), _of(even, name)) for odd, even in facts.uploads.values()))
    messages = [dict(part) for pair in pairs for part in pair if part]
    shapes = [shape for message in messages for shape in message.values()]
    counts = [sum(math.prod(shape) for shape in message.values()) for message in messages]
    first = messages[0]
    every = all(odd and even for odd, even in pairs)
    return Sent(
        kind=name,
        what=_what(name, first) if facts.known else WORDS.get(name, name),
        names=_names(list(first)) if facts.known else f"{name}/...",
        shapes=_shapes(shapes) if facts.known else "not on record",
        often="each round that the client takes part in" if every else "every second round",
        form=_form(facts),
        numbers=(min(counts), max(counts)) if facts.known else None,
        bytes=round(weight),
        tells=TELLS.get(name, "Something of what the client's examples did to its model."),
    )


ONCE_NAMES = {
    "statistics": "statistics/...",
    "mixtures": "mixture/...",
    "counts": "counts/train",
    "gradients": "gradient/<layer>",
}


def _once(facts: Facts, name: str, most: int, weight: int) -> Sent:
    context = facts.method.context
    projected = getattr(facts.method.options, "projection", 0)
    refresh = getattr(facts.method.options, "refresh", 0)
    what, parts, tells = SKETCHED[name]
    sizes = {
        "statistics": f"{context.classes} labels; {context.width} features",
        "mixtures": f"{context.classes} labels; {projected or context.width} features",
        "counts": f"{context.classes} labels",
        "gradients": _shapes([(site.d_out, site.d_in) for site in context.sites]),
    }
    noisy = name == "statistics" and facts.sketch_epsilon is not None
    often = f"before the first round, and again after every {refresh}" if refresh else "once, before the first round"
    if facts.run.newcomers and facts.method.asks_newcomers:
        often += "; by a newcomer when it joins"
    return Sent(
        kind=name,
        what=f"{what}: {parts}",
        names=ONCE_NAMES[name],
        shapes=sizes[name] if facts.known else "not on record",
        often=often,
        form="with noise (differential privacy)" if noisy else "readable by the server",
        numbers=(0, most) if facts.known else None,
        bytes=weight,
        tells=tells + (" Noise bounds what that says of one example." if noisy else ""),
    )


def _form(facts: Facts) -> str:
    return {
        "none": "readable by the server",
        "masks": "masked: the server reads the sum of a round",
        "ckks": "encrypted: the server computes with it unread",
    }[facts.recipe.secure.kind]


def _of(shapes: Shapes, name: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((key, tuple(shape)) for key, shape in shapes.items() if kind(key) == name)


def _what(name: str, message: Shapes) -> str:
    """``cores C of 12 layers``."""
    layers = len({key.partition("/")[2].removesuffix(".weight").removesuffix(".bias") for key in message})
    words = WORDS.get(name, f"tensors of kind {name}")
    return words if name == "head" or layers == 1 else f"{words} of {layers} layers"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    """``8 x 8``; where there are many, the smallest and the largest."""
    ordered = sorted(set(shapes), key=lambda shape: (math.prod(shape), shape))
    words = [" x ".join(map(str, shape)) for shape in ordered]
    return ", ".join(words) if len(words) <= 2 else f"{words[0]} to {words[-1]}"


def _round_bytes(facts: Facts) -> dict[str, float]:
    """Kind -> bytes that left all clients in rounds."""
    shares = {pair: tuple(map(_parts, pair)) for pair in {_key(pair) for pair in facts.uploads.values()}}
    total = dict.fromkeys(facts.kinds, 0.0)
    for line in facts.run.rounds:
        again = line.refresh.bytes_up_clients if line.refresh else {}
        for client, moved in line.bytes_up_clients.items():
            count = moved - again.get(client, 0)
            if client in facts.uploads:
                for name, share in shares[_key(facts.uploads[client])][(line.round - 1) % 2].items():
                    total[name] += count * share
    return total


Frozen = tuple[tuple[str, tuple[int, ...]], ...]


def _key(pair: tuple[Shapes, Shapes]) -> tuple[Frozen, Frozen]:
    odd, even = (tuple((name, tuple(shape)) for name, shape in shapes.items()) for shapes in pair)
    return odd, even


def _parts(message: Frozen) -> dict[str, float]:
    """Kind -> its share of the numbers in a message."""
    numbers: dict[str, int] = {}
    for name, shape in message:
        numbers[kind(name)] = numbers.get(kind(name), 0) + math.prod(shape)
    whole = max(1, sum(numbers.values()))
    return {name: count / whole for name, count in numbers.items()}


def reported(facts: Facts) -> list[Reported]:
    """What clients tell beside what they send."""
    found = [Reported("how many examples each of its splits has", "once", "The size of the client's data.")]
    if facts.recipe.audit.weights != "none":
        what = "as how many examples it counts: fewer than it has, as an audit of its training examples says"
        tells = "How many of its examples are copies, or how regular its texts are: one of 21 values."
        found.append(Reported(what, "each round", tells))
    if facts.uploads:
        every = facts.recipe.train.evaluate_every
        often = "each round" if every == 1 else f"every {every} rounds"
        if facts.recipe.privacy.tells_losses:  # else it is kept at home: no noise is on it
            found.append(Reported("the mean training loss", "each round", "How well its examples are already known."))
        found.append(Reported(f"the {_score(facts)} on its validation split", often, "How well it does."))
    found.append(Reported(f"the {_score(facts)} on its validation and test splits", "at the end", "How well it does."))
    if facts.recipe.depth.steps == "auto":
        what = "how often it chose to apply the backbone's shared block"
        found.append(Reported(what, "at the end", "How its validation split judges fewer steps."))
    if not facts.simulated:
        found += [
            Reported("the SHA-256 of its backbone", "once", "Which public model it uses."),
            Reported("its network address, times and versions", "always", "Its habits."),
            Reported("why its work failed, in one line", "then", "Little."),
        ]
    return found


def _score(facts: Facts) -> str:
    metric = facts.run.metric
    return metric.words if metric is not None else "score"


def stayed(facts: Facts) -> list[Stayed]:
    """What never leaves a client."""
    what = {
        "text": "texts, their labels and their tokens",
        "chat": "conversations and their tokens",
        "image": "pictures and their labels",
        "caption": "pictures and their captions",
    }
    found = [Stayed(f"the examples themselves: {what[facts.recipe.form]}", "Nothing sends them.")]
    owned = facts.owned
    for name in dict.fromkeys(map(kind, owned)):
        if name in facts.kinds:
            continue
        own = {key: tuple(shape) for key, shape in owned.items() if kind(key) == name}
        size = f" ({sum(map(math.prod, own.values())):,} numbers)" if facts.known else ""
        trained = any(name in facts.method.trained(round) for round in (1, 2)) and bool(facts.method.rounds())
        why = "Trained at the client." if trained else "Never trained; everybody can compute it from the recipe's seed."
        if name == "norm" and not trained:
            why = "As the public model has them."
        if name == "head" and not trained:
            why = "Made of what the server sends once." if facts.once else "Never trained."
        found.append(Stayed(_what(name, own) + size if facts.known else WORDS.get(name, name), why))
    if facts.once:
        found.append(Stayed("the features of single examples", "Only what is made of all of them is sent, once."))
    return found


def traffic(facts: Facts) -> list[Traffic]:
    """Each client's part, in the order of ``partition.json``; of a federation of many the first ones."""
    taken = dict.fromkeys(facts.run.clients, 0)
    up, down = dict.fromkeys(taken, 0), dict.fromkeys(taken, 0)
    for line in facts.run.rounds:
        for client in line.participants:
            taken[client] = taken.get(client, 0) + 1
    for line in facts.run.lines:
        for total, counts in ((up, line.bytes_up_clients), (down, line.bytes_down_clients)):
            for client, count in counts.items():
                total[client] = total.get(client, 0) + count
    once = facts.run.once.bytes_up_clients if facts.run.once else {}
    spent = facts.spent[-1][1].clients if facts.spent else {}
    found = []
    for client in facts.run.clients[:MOST_CLIENTS]:
        odd, even = facts.uploads.get(client, ({}, {}))
        numbers = max(sum(map(math.prod, shapes.values())) for shapes in (odd, even))
        found.append(
            Traffic(
                client=client,
                rounds=taken[client],
                numbers=numbers if facts.known else None,
                once=once.get(client, 0),
                up=up[client] - once.get(client, 0),
                down=down[client],
                epsilon=spent.get(client),
            )
        )
    return found


def in_one_sentence(facts: Facts, lines: Sequence[Sent]) -> str:
    """What left, for somebody who reads nothing else."""
    if not lines:
        return "Nothing that was trained, and nothing about the examples, leaves a client."
    total = sum(line.bytes for line in lines)
    left = [line for line in lines if line.bytes] or lines
    rounds = [line.what for line in left if line.kind in facts.kinds]
    once = [line.what.partition(":")[0] for line in left if line.kind not in facts.kinds]
    again = "before the first round and at intervals" if getattr(facts.method.options, "refresh", 0) else "once"
    what = ", and ".join(
        [f"{_listed(words)} {when}" for words, when in ((rounds, "in rounds"), (once, again)) if words]
    )
    if not total:
        return f"Nothing has left a client yet. It will send {what}."
    return f"Clients sent {what}: {human_bytes(total)} from all of them together so far."


def _listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
