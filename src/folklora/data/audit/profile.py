"""What is counted of a client's examples: how many, how long, of which labels, of which symbols."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from folklora.data.audit.entropy import shannon
from folklora.data.audit.measure import Measure
from folklora.data.audit.tokens import Tokens

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of lengths."""


@dataclass(frozen=True)
class Profile:
    """Counts of some examples.

    Attributes
    ----------
    examples, empty
        All of them, and those without a token.
    tokens, vocabulary
        Tokens, and how many of them are different.
    lengths
        Quantile of `QUANTILES` -> tokens of an example (between two examples in proportion); empty without examples.
    mean_length
        Tokens an example.
    once
        Share of the vocabulary that occurs once.
    labels
        Label -> examples, most frequent first, then by name; None where the examples have no labels.
    effective_labels
        The number of equally frequent labels whose entropy is that of these: ``exp(H)``, 1 to their number.
    """

    examples: int
    empty: int
    tokens: int
    vocabulary: int
    lengths: Mapping[float, float]
    mean_length: Measure
    once: Measure
    labels: Mapping[str, int] | None
    effective_labels: Measure


def profile(tokens: Tokens, labels: Sequence[Hashable] | None = None) -> Profile:
    """Counts of examples, a sequence each.

    Parameters
    ----------
    labels
        One an example, shown as ``str`` shows them.

    Raises
    ------
    ValueError
        Not as many labels as examples.
    """
    if labels is not None and len(labels) != tokens.sequences:
        raise ValueError(f"{len(labels)} labels for {tokens.sequences} examples")
    lengths = tokens.lengths
    some = len(lengths) > 0
    once = np.bincount(tokens.codes) == 1
    return Profile(
        examples=tokens.sequences,
        empty=int((lengths == 0).sum()),
        tokens=len(tokens),
        vocabulary=tokens.symbols,
        lengths=dict(zip(QUANTILES, np.quantile(lengths, QUANTILES).tolist(), strict=True)) if some else {},
        mean_length=Measure(float(lengths.mean())) if some else Measure(None, "there are no examples"),
        once=Measure(float(once.mean())) if len(tokens) else Measure(None, "there are no tokens"),
        labels=None if labels is None else _histogram(labels),
        effective_labels=_effective(labels),
    )


def _histogram(labels: Sequence[Hashable]) -> dict[str, int]:
    counts = Counter(str(label) for label in labels)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _effective(labels: Sequence[Hashable] | None) -> Measure:
    if not labels:
        return Measure(None, "there are no labels")
    return Measure(float(np.exp(shannon([str(label) for label in labels]).value or 0.0)))
