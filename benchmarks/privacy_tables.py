"""The tables of `privacy.py`'s results, from ``results/privacy.json`` alone; and of the attacks that there are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from table_parts import NOT_RUN, Row, decimals, label, load, markdown, percent, spread

from folklora.privacy.attacks import describe

WORST = ("gradient", True)
SENT = ("sent", False)
GRANTED = {WORST: "exact gradient, its own factors known", SENT: "what was sent"}
"""View, and whether the attacker was granted the client's private tensors -> in words."""


def attacks() -> str:
    lines = [[f"`{a['name']}`", a["title"], a["paper"], a["forms"]] for a in describe()]
    return markdown(["attack", "what it does", "paper", "on"], lines, left=4)


def part(name: str, setting: str | None = None) -> list[Row]:
    rows: list[Row] = (load("privacy") or {}).get("rows", [])
    return [row for row in rows if row["part"] == name and (setting is None or row["setting"] == setting)]


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def share(rows: Sequence[Row], metric: str) -> str:
    """`measured`, as a percentage."""
    return measured(rows, metric, 0, 100.0)


def measured(rows: Sequence[Row], metric: str, digits: int, times: float = 1.0) -> str:
    """Mean over seeds and, of several, standard deviation; in brackets the control: ``81 ± 4 (0)``."""
    found = [row["metrics"][metric] for row in rows if metric in row["metrics"]]
    if not found:
        return "-"
    told = [times * m["control"] for m in found if m["control"] is not None]
    control = f" ({statistics.fmean(told):.{digits}f})" if told else ""
    return spread([times * m["mean"] for m in found], decimals(digits)) + control


def accuracy(rows: Iterable[Row]) -> str:
    """Of runs, in percent."""
    return percent(row["row"]["accuracy_mean"] for row in rows)


def seeds(rows: Sequence[Row]) -> str:
    """How many seeds and victims a table rests on."""
    if not rows:
        return ""
    victims = sum({row["seed"]: row["victims_attacked"] for row in rows}.values())
    return f"\n*{_numbered(rows)}; {victims} victims for each number where all seeds are done.*\n"


def _numbered(rows: Sequence[Row]) -> str:
    numbers = sorted({row["seed"] for row in rows})
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def variants(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def by_batch(name: str, metric: str) -> Callable[[], str]:
    """Methods by batch and by what the attacker is granted."""

    def table() -> str:
        rows = part(name)
        if not rows:
            return NOT_RUN
        granted = [g for g in GRANTED if of(rows, view=g[0], bases=g[1])]
        batches = sorted({row["batch"] for row in rows})
        lines = [
            [label(v)]
            + [
                share(of(rows, variant=v, view=view, bases=bases, batch=batch), metric)
                for view, bases in granted
                for batch in batches
            ]
            for v in variants(rows)
        ]
        header = ["method", *(f"{GRANTED[g]}, batch {batch}" for g in granted for batch in batches)]
        return markdown(header, lines) + seeds(rows)

    return table


def by_steps() -> str:
    rows = part("local steps")
    if not rows:
        return NOT_RUN
    steps = sorted({row["steps"] for row in rows})
    lines = [[label(v), *(share(of(rows, variant=v, steps=n), "token_recall") for n in steps)] for v in variants(rows)]
    return markdown(["method", *(f"{n} step{'s' if n > 1 else ''}" for n in steps)], lines) + seeds(rows)


def reconstructed(name: str, shown: Sequence[tuple[str, str, int]]) -> Callable[[], str]:
    """``shown``: metric, heading, digits (0: a percentage)."""

    def table() -> str:
        rows = part(name)
        if not rows:
            return NOT_RUN
        lines = []
        for view, bases in GRANTED:
            for v in variants(rows):
                found = of(rows, variant=v, view=view, bases=bases)
                if found:
                    cells = [_shown(found, metric, digits) for metric, _, digits in shown]
                    lines.append([label(v), GRANTED[view, bases], *cells])
        return markdown(["method", "attacker holds", *(h for _, h, _ in shown)], lines, left=2) + seeds(rows)

    return table


def _shown(rows: Sequence[Row], metric: str, digits: int) -> str:
    return measured(rows, metric, digits) if digits else share(rows, metric)


def side_by_side() -> str:
    """One core and RAVAN's several, of as many numbers a layer: the exact gradient, all that stays home granted."""
    one, several = of(part("span by rank"), seed=0), part("cores side by side")
    if not several:
        return NOT_RUN
    batches = sorted({row["batch"] for row in several})
    shapes = [dict(option.split("=") for option in v.split(":")[1:]) for v in variants(several)]
    lines = []
    for v, shape in zip(variants(several), shapes, strict=True):
        heads, rank = int(shape["heads"]), int(shape["adapter.rank"])
        whole = round((heads * rank**2) ** 0.5)
        alike = [row for row in one if row["variant"].startswith(f"folklora:adapter.rank={whole}:")]
        told = [share(of(rows, batch=b), "token_recall") for rows in (alike, of(several, variant=v)) for b in batches]
        lines.append([str(heads * rank**2), f"{whole}", f"{heads} x {rank}", *told])
    header = ["numbers a layer", "folklora, rank", "ravan, heads x rank"]
    header += [f"{name}, batch {b}" for name in ("folklora", "ravan") for b in batches]
    return markdown(header, lines) + seeds(several)


def every_method() -> str:
    """One text a batch: what each method's messages tell, beside what it reaches."""
    rows = [*of(part("span"), batch=1, seed=0), *part("every method")]
    reached = [*of(part("utility", "banking77"), seed=0), *part("every method reaches")]
    if not part("every method"):
        return NOT_RUN
    lines = [
        [
            label(v),
            *(share(of(rows, variant=v, view=view, bases=bases), "token_recall") for view, bases in GRANTED),
            share(of(part("canary"), variant=v), "canary_recall"),
            accuracy(of(reached, variant=v)),
        ]
        for v in variants(rows)
    ]
    granted = (f"tokens, {words}, %" for words in GRANTED.values())
    header = ["method", *granted, "a hidden secret, what was sent, %", "accuracy, %"]
    return markdown(header, lines) + seeds(part("every method"))


INFERRED = (
    ("once", "hit", "a class's mean is nearest to one of its own sentences, among candidates, %"),
    ("once", "summed_precision", "sentences picked from a list of candidates that are the client's, %"),
    ("membership", "auc_pooled_loss", "membership by loss, AUC, %"),
    ("membership", "auc_pooled_lira_offline", "membership by LiRA, offline, AUC, %"),
    ("labels", "label_distance_sketch", "labels off the sketch, total variation, %"),
    ("labels", "label_distance_shadows", "labels off the update, total variation, %"),
)
"""Part, metric, and what it is; 50 is chance for an AUC, and a distance is small where labels are found out."""


def inference() -> str:
    named = {"once": ("once",), "membership": ("membership", "membership under epsilon"), "labels": ("labels",)}
    rows = [row for names in named.values() for name in names for row in part(name)]
    if not rows:
        return NOT_RUN
    told = [each for each in INFERRED if any(each[1] in r["metrics"] for r in part(each[0]))]
    lines = [
        [
            label(v),
            *(share([r for r in of(rows, variant=v) if r["part"] in named[name]], m) for name, m, _ in told),
        ]
        for v in variants(rows)
    ]
    return markdown(["method", *(words for *_, words in told)], lines) + seeds(rows)


def first_gradient() -> str:
    """What Fed-SB's one-off message tells, by how many examples are in it."""
    rows = part("first gradient")
    if not rows:
        return NOT_RUN
    lines = []
    for v in variants(rows):
        found = of(rows, variant=v)
        told = dict(part.split("=") for part in v.split(":")[1:])
        shown = [victim for row in found for victim in row["victims"] if "pairs" in victim]
        counted = ([victim[key] for victim in shown] for key in ("pairs", "dimensions"))
        sizes = [f"{statistics.fmean(each):.0f}" if each else "-" for each in counted]
        cells = [share(found, metric) for metric in ("word_recall", "word_precision", "pair_recall")]
        lines.append([told["gradient_examples"], told.get("message.dtype", "float32"), *sizes, *cells])
    header = ["examples in it", "as", "tokens at their places", "dimensions of 384"]
    header += ["words told, %", "right of what is told, %", "told at their places, %"]
    return markdown(header, lines) + seeds(rows)


def victims() -> str:
    """The same attacks on other data: the first metric of its kind that each attack has."""
    rows = part("victims")
    if not rows:
        return NOT_RUN
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    lines = []
    for setting in settings:
        for v in variants(of(rows, setting=setting)):
            found = of(rows, setting=setting, variant=v)
            text = "token_recall" in found[0]["metrics"]
            kinds = ((True, "token_recall", 0), (True, "rouge_l", 0), (False, "psnr", 1), (False, "ssim", 2))
            cells = [_shown(found, metric, digits) if text == told else "-" for told, metric, digits in kinds]
            lines.append([setting, found[0]["attack"], label(v), *cells])
    header = ["victims", "attack", "method", "tokens, %", "ROUGE-L, %", "PSNR, dB", "SSIM"]
    return markdown(header, lines, left=3) + seeds(rows)


def epsilon(name: str, attacks: str | None) -> Callable[[], str]:
    """Accuracy by epsilon in one part, and what the span attack of another one still gets."""

    def table() -> str:
        return _epsilons(part(name), part(attacks) if attacks else [])

    return table


def _epsilons(rows: Sequence[Row], attacked: Sequence[Row]) -> str:
    if not rows:
        return NOT_RUN
    asked = sorted({_epsilon(row["variant"]) for row in rows}, reverse=True)
    plain = list(dict.fromkeys(_plain(row["variant"]) for row in rows))
    lines = []
    for method in plain:
        line = [label(method)]
        for each in asked:
            found = [r for r in rows if _plain(r["variant"]) == method and _epsilon(r["variant"]) == each]
            line.append(accuracy(found))
        for each in asked[1:]:
            found = [r for r in attacked if _plain(r["variant"]) == method and _epsilon(r["variant"]) == each]
            if attacked:
                line.append(share(found, "token_recall") if found else "-")
        lines.append(line)
    header = ["method", *("no noise" if e == NONE else f"epsilon {e:g}" for e in asked)]
    header += [f"tokens told at epsilon {e:g}, %" for e in asked[1:]] if attacked else []
    return markdown(header, lines) + f"\n*Test accuracy, %; {_numbered(rows)}.*\n"


NONE = float("inf")


def _epsilon(variant: str) -> float:
    return next((float(o.partition("=")[2]) for o in variant.split(":") if o.startswith("privacy.epsilon")), NONE)


def _plain(variant: str) -> str:
    return ":".join(o for o in variant.split(":") if not o.startswith("privacy."))


def utility() -> str:
    """What each method reaches on the same recipes."""
    rows = part("utility")
    if not rows:
        return NOT_RUN
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    lines = [[label(v), *(accuracy(of(rows, variant=v, setting=s)) for s in settings)] for v in variants(rows)]
    return markdown(["method", *(f"{s}, accuracy %" for s in settings)], lines)


QUOTED = (
    ("span", "span", ("fedit", "celora", "folklora")),
    ("texts", "lamp", ("fedit", "celora", "folklora")),
    ("once", "mixture", ("folklora", "folklora:dp_epsilon=8.0")),
)
"""Part, attack and the variants whose sentences are shown."""
LONGEST = {"original": 100, "recovered": 100, "control": 40}
"""Characters of a sentence that are shown."""


def sentences() -> str:
    """Of the first victim: its sentence, what the attack makes of the message, and what it makes of a shuffled one."""
    lines = []
    for name, attack, shown in QUOTED:
        for v in shown:
            for row in of(part(name), variant=v, seed=0, attack=attack):
                if row["batch"] == 1 and row["victims"]:
                    first = row["victims"][0]
                    told = [_quoted(first[key], longest) for key, longest in LONGEST.items()]
                    lines.append([attack, label(v), GRANTED[row["view"], row["bases"]], *told])
    if not lines:
        return NOT_RUN
    return markdown(["attack", "method", "attacker holds", *LONGEST], lines, left=6)


def _quoted(texts: Sequence[str], longest: int) -> str:
    """The first of a victim's texts, fit for a cell."""
    text = " ".join(texts[0].split()) if texts else ""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") or "*nothing*"


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "privacy-span": ("privacy", by_batch("span", "token_recall")),
    "privacy-ranks": ("privacy", by_batch("span by rank", "token_recall")),
    "privacy-heads": ("privacy", side_by_side),
    "privacy-methods": ("privacy", every_method),
    "privacy-steps": ("privacy", by_steps),
    "privacy-texts": (
        "privacy",
        reconstructed(
            "texts", (("token_recall", "tokens, %", 0), ("rouge_l", "ROUGE-L, %", 0), ("exact_match", "exact, %", 0))
        ),
    ),
    "privacy-sentences": ("privacy", sentences),
    "privacy-pictures": (
        "privacy",
        reconstructed(
            "pictures",
            (("mse", "MSE", 3), ("psnr", "PSNR, dB", 1), ("ssim", "SSIM", 2), ("perceptual", "perceptual distance", 2)),
        ),
    ),
    "privacy-inference": ("privacy", inference),
    "privacy-first-gradient": ("privacy", first_gradient),
    "privacy-epsilon": ("privacy", epsilon("epsilon", "attacked under epsilon")),
    "privacy-clients": ("privacy", epsilon("epsilon of clients", None)),
    "privacy-victims": ("privacy", victims),
    "privacy-utility": ("privacy", utility),
}
"""Marker -> the results it needs, and what makes it."""
