"""What an attack came to: the result document, and what of it is written into a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from folklora.errors import RunError
from folklora.privacy.attacks.gallery import data_uri, gallery
from folklora.privacy.attacks.guess import Guess
from folklora.privacy.attacks.metrics import (
    Texts,
    Values,
    label_accuracy,
    numbers,
    picture_metrics,
    summary,
    text_metrics,
)
from folklora.privacy.attacks.observation import Victim
from folklora.privacy.attacks.replica import Replica
from folklora.privacy.attacks.victims import Secrets, tokens_of


@dataclass(frozen=True)
class Played:
    """One victim: the attack's guess and its control's."""

    victim: Victim
    guess: Guess
    control: Guess


def outcome(replica: Replica, played: Sequence[Played], secrets: Secrets | None) -> dict[str, Any]:
    """``metrics`` and ``victims`` of a result."""

    def scored(which: str) -> list[Values]:
        return [
            _values(replica, each.victim, getattr(each, which), None if secrets is None else secrets[i])
            for i, each in enumerate(played)
        ]

    return {
        "metrics": summary(scored("guess"), scored("control")),
        "victims": [_told(replica, each) for each in played],
    }


def _values(replica: Replica, victim: Victim, guess: Guess, secrets: list[list[int]] | None) -> Values:
    found: Values = numbers(guess.scores)
    if guess.texts is not None:
        original = texts_of(replica, [tokens_of(example) for example in victim.examples])
        found |= text_metrics(original, texts_of(replica, guess.texts), secrets)
    if guess.pictures is not None:
        found |= picture_metrics(pictures_of(replica, victim), guess.pictures, replica.features)
    if guess.labels is not None:
        found["label_accuracy"] = label_accuracy(victim.labels, guess.labels)
    if guess.judge is not None:
        found |= guess.judge(victim)
    return found


def texts_of(replica: Replica, tokens: Sequence[Sequence[int]]) -> Texts:
    """Without the tokens that every text has."""
    tokenizer = replica.backbone.tokenizer
    special = {*tokenizer.all_special_ids, *getattr(replica.task, "end_tokens", ())} - {tokenizer.unk_token_id}
    bare = [[token for token in text if token not in special] for text in tokens]
    return Texts(bare, [tokenizer.decode(text) for text in bare])


def pictures_of(replica: Replica, victim: Victim) -> Tensor:
    """The victim's pictures as the backbone sees them, [count, 3, height, width] in [0, 1]."""
    pixels = replica.backbone.pictures.encode(victim.inputs)
    return torch.from_numpy(np.stack(pixels)).float() / 255


def _told(replica: Replica, played: Played) -> dict[str, Any]:
    """What was there and what was found, for people; texts, or pictures as data URIs."""
    victim = played.victim
    told: dict[str, Any] = {"client": victim.client}
    if replica.form == "image":
        told["original"] = [data_uri(picture) for picture in pictures_of(replica, victim)]
    else:
        told["original"] = texts_of(replica, [tokens_of(example) for example in victim.examples]).texts
    for key, guess in (("recovered", played.guess), ("control", played.control)):
        if guess.texts is not None:
            told[key] = texts_of(replica, guess.texts).texts
        if guess.pictures is not None:
            told[key] = [data_uri(picture) for picture in guess.pictures]
    return told


def _name(document: dict[str, Any]) -> str:
    """Tells attacks on one run apart: what was attacked, what was granted, and how large the batch was."""
    variant = document["variant"].replace(":", "__").replace("/", "_")
    granted = f"{document['view']}{'-bases' if document['knowledge']['bases'] else ''}"
    of = f"b{document['batch']}-e{document['steps']}-s{document['seed']}"
    return f"{document['attack']}-{variant}-{granted}-{of}"


def write(folder: Path, document: dict[str, Any], replica: Replica, played: Sequence[Played]) -> None:
    """The document as JSON, and of pictures a gallery.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    name = _name(document)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
        if replica.form == "image" and played:
            rows = [[picture for p in played for picture in pictures_of(replica, p.victim)]]
            found = ([p.guess.pictures for p in played], [p.control.pictures for p in played])
            rows += [[picture for batch in row if batch is not None for picture in batch] for row in found]
            (folder / f"{name}.png").write_bytes(gallery(rows))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from None
