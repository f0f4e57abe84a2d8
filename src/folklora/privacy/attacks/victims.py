"""Whose batches are attacked, and what of the data is public: by the seed and the data alone, whatever the method.

A half of all rows is public; victims' batches are drawn from the other half. A secret ("canary") may be hidden in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from folklora.errors import AttackError
from folklora.federation.setup import Setup
from folklora.privacy.attacks.observation import Victim
from folklora.randomness import numpy_generator

CANARY = 4
"""Tokens of a secret."""

Secrets = list[list[list[int]]]
"""Token ids of each text's secret, by victim."""


def choose(setup: Setup, batch: int, count: int, seed: int) -> tuple[np.ndarray, list[Victim]]:
    """The public half of all rows, and batches from what training clients have of the other half."""
    table, splits = setup.data.table, setup.data.splits
    order = numpy_generator(seed, "public").permutation(len(table.inputs))
    public, rest = order[: len(order) // 2], set(order[len(order) // 2 :].tolist())
    own = {client: [int(i) for i in split.train if int(i) in rest] for client, split in splits.items()}
    able = [client for client, rows in own.items() if len(rows) >= batch]
    if not able:
        most = max(map(len, own.values()))
        raise AttackError(
            f"--batch {batch}: no client has so many training examples in the half that is not public; "
            f"allowed: 1 to {most}"
        )
    dealt = numpy_generator(seed, "victims").permutation(len(able))
    victims = []
    for number in range(count):
        client = able[int(dealt[number % len(able)])]
        draw = numpy_generator(seed, "batch", client, number)
        rows = np.sort(draw.choice(own[client], batch, replace=False))
        examples, labels = setup.examples(rows)
        victims.append(Victim(client, rows, [table.inputs[i] for i in rows], examples, labels))
    return public, victims


def with_secrets(setup: Setup, victims: Sequence[Victim], seed: int) -> tuple[Setup, list[Victim], Secrets]:
    """The same victims, whose texts end with secrets: random words of the vocabulary, one token each."""
    task: Any = setup.task
    tokenizer = task.backbone.tokenizer
    words = [
        (word, token)
        for word, token in sorted(tokenizer.get_vocab().items())
        if word.isalnum() and tokenizer(word, add_special_tokens=False)["input_ids"] == [token]
    ]
    if len(words) < CANARY:
        raise AttackError(f"--canary: the vocabulary has {len(words)} words of one token; allowed: at least {CANARY}")
    encoded, changed, secrets = list(setup.encoded), [], []
    for number, victim in enumerate(victims):
        draw = numpy_generator(seed, "canary", victim.client, number)
        picked = [[words[int(i)] for i in draw.choice(len(words), CANARY, replace=False)] for _ in victim.inputs]
        pairs = zip(victim.inputs, picked, strict=True)
        inputs = [_ending_with(each, " ".join(word for word, _ in secret)) for each, secret in pairs]
        examples = task.encode(inputs)
        for row, example in zip(victim.rows, examples, strict=True):
            encoded[int(row)] = example
        changed.append(replace(victim, inputs=inputs, examples=examples))
        secrets.append([[token for _, token in secret] for secret in picked])
    return replace(setup, encode=lambda: (encoded, setup.test_encoded)), changed, secrets


def _ending_with(example: Any, secret: str) -> Any:
    """A text, or a chat's last turn, with something behind it."""
    if isinstance(example, str):
        return f"{example} {secret}"
    *turns, (role, content) = example
    return [*turns, (role, f"{content} {secret}")]


def tokens_of(example: Any) -> list[int]:
    """Of an encoded text."""
    return list(getattr(example, "tokens", example))
