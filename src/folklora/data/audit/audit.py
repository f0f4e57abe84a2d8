"""A client's audit of its own examples: one document of plain data, made of the examples and of nothing else.

It holds no example: counts, shares, entropies, the places of copies and the names of labels. All of it is the client's;
what may leave is under ``release`` (`folklora.data.audit.release`), and ``leaves`` and ``stays`` say so in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from folklora.data.audit.duplicates import Duplicates, exact_duplicates
from folklora.data.audit.entropy import approximate_entropy, compression_ratio, regularity, sample_entropy, shannon
from folklora.data.audit.matches import entropy_rate
from folklora.data.audit.measure import Measure
from folklora.data.audit.profile import Profile, profile
from folklora.data.audit.quality import BLOCK, By, copies, quality_of, regularities, regularity_of_blocks, tokens_of
from folklora.data.audit.reading import Rows
from folklora.data.audit.release import STATUSES, STEP, Release, release
from folklora.data.audit.tokens import Tokens

Document = dict[str, Any]

MOST_LABELS, MOST_GROUPS, MOST_PLACES, MOST_BARS = 200, 20, 12, 30
"""What is listed of labels, of groups of copies, of one group; bars of the picture of lengths."""
QUALITIES: tuple[By, ...] = ("duplicates", "regularity", "both")


def audit(
    rows: Rows,
    *,
    epsilon: float | None = None,
    secret: int | None = None,
    weights: By | Literal["none"] = "none",
) -> Document:
    """Everything that is measured of some examples, ready for JSON.

    Parameters
    ----------
    epsilon, secret
        Of what may leave: see `folklora.data.audit.release.release`.
    weights
        By what the federation weighs its clients that these examples are for: whoever joins it tells that, too.
    """
    tokens = tokens_of(rows.examples)
    exact, near = exact_duplicates(rows.examples), copies(rows.examples)
    order, in_blocks = regularity(tokens), regularities(rows.examples)
    comparable = regularity_of_blocks(in_blocks)
    may_leave = release(exact, in_blocks, epsilon, secret)
    quality = {by: round(quality_of(near.share, comparable, by), 4) for by in QUALITIES}
    told = leaves(may_leave) + ([] if weights == "none" else [_weighed(weights, quality[weights])])
    return {
        "schema": 1,
        "data": {"name": rows.name, "kind": rows.kind, "column": rows.column, "labelled": rows.labels is not None},
        "profile": _profile(profile(tokens, rows.labels), tokens),
        "duplicates": _duplicates(rows, exact, near),
        "measures": _measures(rows, tokens, order, comparable),
        "surrogates": {"observed": order.observed, "mean": order.surrogate, "spread": order.spread},
        "quality": quality,
        "release": _release(may_leave),
        "leaves": told,
        "stays": STAYS,
    }


# -- counts ------------------------------------------------------------------------------------------------------------


def _profile(found: Profile, tokens: Tokens) -> Document:
    labels = list((found.labels or {}).items())
    return {
        "examples": found.examples,
        "empty": found.empty,
        "tokens": found.tokens,
        "vocabulary": found.vocabulary,
        "once": asdict(found.once),
        "mean_length": asdict(found.mean_length),
        "lengths": {f"{quantile:g}": length for quantile, length in found.lengths.items()},
        "histogram": _histogram(tokens.lengths),
        "labels": dict(labels[:MOST_LABELS]) if found.labels is not None else None,
        "labels_in_all": len(labels),
        "effective_labels": asdict(found.effective_labels),
    }


def _histogram(lengths: np.ndarray) -> list[list[int]]:
    """[from, to, examples] of equally wide bars; the last one holds all that is longer than nearly all others."""
    most = int(np.quantile(lengths, 0.99))
    low, width = int(lengths.min()), max(1, -(-(most - int(lengths.min()) + 1) // MOST_BARS))
    edges = list(range(low, most + width + 1, width))
    counts = np.histogram(np.minimum(lengths, edges[-1] - 1), bins=edges)[0]
    ends = [*(edge - 1 for edge in edges[1:-1]), max(edges[-1] - 1, int(lengths.max()))]
    return [[start, end, int(count)] for start, end, count in zip(edges, ends, counts, strict=False)]


def _duplicates(rows: Rows, exact: Duplicates, near: Duplicates) -> Document:
    numbered = _numbered(exact)
    groups = sorted(near.groups, key=lambda group: (-len(group), group))
    return {
        "exact": {"copies": exact.copies, "share": exact.share},
        "near": {"copies": near.copies, "share": near.share},
        "groups": [_group(rows, numbered, group) for group in groups[:MOST_GROUPS]],
        "groups_in_all": len(groups),
    }


def _numbered(exact: Duplicates) -> dict[int, int]:
    """Which group of exact copies an example is in."""
    return {row: number for number, group in enumerate(exact.groups) for row in group}


def _group(rows: Rows, exact: Mapping[int, int], group: Sequence[int]) -> Document:
    """How many are in it, how many of these are the same to the letter, how many labels they have, where they are."""
    same = Counter(exact[row] for row in group if row in exact)
    return {
        "examples": len(group),
        "alike": max(same.values(), default=1),
        "labels": None if rows.labels is None else len({rows.labels[row] for row in group}),
        "places": [rows.places[row] for row in group[:MOST_PLACES]],
    }


# -- order -------------------------------------------------------------------------------------------------------------


def _measures(rows: Rows, tokens: Tokens, order: Measure, comparable: Measure) -> list[Document]:
    data = rows.examples if rows.kind == "text" else tokens
    unit = "word" if rows.kind == "text" else "item"
    found = (
        ("Approximate entropy", "nats", approximate_entropy(tokens),
         f"How uncertain the next {unit} is, of what is seen in these data. Short data make it small."),
        ("Ratio to shuffled data", "", order,
         "The same beside 20 random orders of these data. Near 1: as good as random; lower: more regular."),
        (f"The same, in blocks of {BLOCK} examples", "", comparable,
         "Comparable between clients of any size; copies within a block are left out."),
        ("Sample entropy", "nats", sample_entropy(tokens),
         f"Of two equal {unit}s, how surprising it is that they go on alike."),
        ("Entropy rate", "nats a token", entropy_rate(tokens),
         "From how far each place repeats an earlier one (Kontoyiannis et al. 1998)."),
        ("Shannon entropy", "nats", shannon(tokens), f"Of single {unit}s, whatever their order."),
        ("Compressed to", "", compression_ratio(data),  # type: ignore[arg-type]
         "Bytes that zlib makes of them, over the bytes that they are."),
    )  # fmt: skip
    return [{"name": name, "unit": unit, "says": says, **_plain(measure)} for name, unit, measure, says in found]


def _plain(measure: Measure) -> Document:
    return {"value": measure.value, "why": measure.why}


# -- what may leave ----------------------------------------------------------------------------------------------------

STAYS = [
    "The examples themselves, and every word in them: not even this audit holds one.",
    "Labels and how many examples each has; lengths, vocabulary, and where copies stand.",
    "All entropies, and every number that is not listed above.",
]


def _weighed(by: By, quality: float) -> str:
    return (
        f'Whoever joins this recipe, which has audit.weights = "{by}", also tells as how many examples its own count; '
        f"beside their number that is a quality, in coarse steps and without noise: about {quality:.3g}."
    )


def _release(found: Release) -> Document:
    bounds = {
        name: dict(zip(("distinct", "regularity"), pair, strict=True))
        for name, pair in (("sensitivity", found.sensitivity), ("scale", found.scale))
    }
    return {**asdict(found), **bounds, "means": STATUSES[found.status], "step": STEP}


def leaves(found: Release) -> list[str]:
    """What may leave, in words."""
    noise = "" if found.epsilon is None else "; with noise"
    told = [
        f"A status: {found.status}, which means: {STATUSES[found.status]}.",
        f"The share of different examples, in steps of {STEP:g}{noise}: {found.distinct:g}.",
        f"The regularity of blocks, in steps of {STEP:g}{noise}: {found.regularity:g}.",
        f"The number of examples, {found.examples:,}, which a federation knows anyway.",
    ]
    if found.epsilon is None:
        return [*told, "No noise was added: whoever knows all other examples may learn something of one."]
    return [
        *told,
        f"It is {found.epsilon:g}-differentially private for one example that is replaced by another: that moves the "
        f"share by at most 1/{found.examples}, the regularity by at most 1/{found.blocks} (the number of blocks), and "
        f"Laplace noise of the scales {found.scale[0]:.3g} and {found.scale[1]:.3g} is on them. Asked again, it is "
        "drawn again, and the epsilons add up.",
    ]
