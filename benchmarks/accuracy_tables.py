"""The tables of `accuracy.py`'s results, from ``results/accuracy.json`` and ``results/tuning.json`` alone.

Two marks say what a difference is worth. **Bold** is the best of a column; *≈* is whoever is behind it by no more than
Tukey's honestly significant difference over the seeds (`folklora.report.ranking`), which the last line gives. Runs that
are planned and not done yet are counted below each table.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from table_parts import NOT_RUN, Row, counted, label, load, markdown, percent, picture

from folklora.methods import METHODS as REGISTRY
from folklora.methods.base import Method
from folklora.report.ranking import (
    Scores,
    complete,
    critical_difference,
    friedman,
    honest_difference,
    rank_difference,
    ranking,
)
from folklora.report.tables import human_bytes

BUDGETS = (10_000, 100_000, 500_000, 1_000_000, 5_000_000)
BOUGHT = "fedit"
"""Whose bytes a round are those of the part *equal bytes*."""
SOURCES = ("banking77", "snips", "goemotions")

Seeds = dict[int, float]


@dataclass(frozen=True)
class Results:
    """``accuracy.json``: the rows, and what was planned."""

    rows: Sequence[Row]
    described: Mapping[str, Any]

    @cached_property
    def grouped(self) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["variant"], row["setting"]), []).append(row)
        return found

    @property
    def seeds(self) -> int:
        return int(self.described["seeds"])

    def planned(self, part: str) -> dict[str, list[str]]:
        """Setting -> variants."""
        found: dict[str, list[str]] = self.described.get("parts", {}).get(part, {})
        return found

    def settings(self, part: str) -> list[str]:
        """Those of the part's settings of which anything is done, in the order of the plan."""
        return [name for name, variants in self.planned(part).items() if any(self.of(v, name) for v in variants)]

    def variants(self, part: str, settings: Sequence[str]) -> list[str]:
        planned = self.planned(part)
        return list(dict.fromkeys(variant for name in settings for variant in planned.get(name, ())))

    def of(self, variant: str, setting: str) -> list[Row]:
        return self.grouped.get((variant, setting), [])

    def values(self, variant: str, setting: str, key: str = "accuracy_mean") -> Seeds:
        return {row["seed"]: row[key] for row in self.of(variant, setting) if row[key] is not None}

    def moved(self, variant: str, setting: str) -> float | None:
        """Bytes a client moved in the whole run, both ways and one-off included; mean over seeds."""
        share = self.described.get("settings", {}).get(setting, {}).get("participation", 1.0)
        each = [
            row["bytes_once_per_client"]
            + share * row["rounds"] * (row["bytes_up_per_client_round"] + row["bytes_down_per_client_round"])
            for row in self.of(variant, setting)
        ]
        return statistics.fmean(each) if each else None

    def note(self, part: str, settings: Iterable[str] | None = None) -> str:
        """What of the plan is not done yet, as a line below a table; nothing if all is done."""
        planned = self.planned(part)
        names = [name for name in (planned if settings is None else settings) if name in planned]
        total = sum(self.seeds * len(planned[name]) for name in names)
        done = sum(len(self.of(variant, name)) for name in names for variant in planned[name])
        return f"\n*Partial: {done} of {total} runs are done.*\n" if done < total else ""


@cache
def accuracy_results() -> Results:
    document = load("accuracy")
    return Results(document["rows"], document["settings"])


# -- cells -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One setting's accuracies, judged: who is best, who is level with the best, and what difference counts."""

    best: str | None
    level: tuple[str, ...]
    difference: float | None

    @classmethod
    def of(cls, found: Mapping[str, Seeds]) -> Column:
        """``found``: row -> seed -> accuracy. Judged among rows and seeds of which nothing is missing."""
        results = {(row, "", seed): value for row, seeds in found.items() for seed, value in seeds.items()}
        if not results:
            return cls(None, (), None)
        scores = complete(results)
        means = dict(zip(scores.methods, scores.values.mean(axis=0).tolist(), strict=True))
        best = max(means, key=means.__getitem__)
        difference = honest_difference(scores.values)
        noise = difference or 0.0  # equals are level even where noise is not known
        level = [m for m, mean in means.items() if means[best] - mean <= noise]
        return cls(best, tuple(m for m in level if m != best), difference)

    def mark(self, row: str, text: str) -> str:
        return f"**{text}**" if row == self.best else f"{text} ≈" if row in self.level else text


def judged(
    rows: Sequence[str], columns: Sequence[str], found: Callable[[str, str], Seeds], planned: int
) -> tuple[dict[str, list[str]], list[str]]:
    """The marked cells of each row that has any, and the line of differences that count."""
    cells: dict[str, list[str]] = {row: [] for row in rows}
    noise = []
    for column in columns:
        values = {row: found(row, column) for row in rows}
        judgement = Column.of(values)
        noise.append("-" if judgement.difference is None else f"{100 * judgement.difference:.1f}")
        for row in rows:
            cells[row].append(judgement.mark(row, percent(values[row].values(), planned)))
    return {row: made for row, made in cells.items() if any(cell != "-" for cell in made)}, noise


_BYTES = ("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_once_per_client")
COUNTS = "*a difference that counts*"


def bytes_cells(rows: Sequence[Row]) -> list[str]:
    """What a client sends a round, receives a round, and once; mean over seeds."""
    return [human_bytes(statistics.fmean(row[key] for row in rows)) for key in _BYTES]


# -- tables ----------------------------------------------------------------------------------------------------------


def settings() -> str:
    """Where the examples of each setting come from, how long is trained, and what is right without reading them."""
    results, floor = accuracy_results(), (load("majority") or {"rows": []})["rows"]
    lines = []
    for name, told in results.described.get("settings", {}).items():
        if told["partition"] == "natural":
            split = f"natural, by {told['by']}"
        else:
            split = f"{told['partition']} {told['alpha']:g}, {told['clients']} clients"
        sampled = f"{100 * told.get('participation', 1.0):g} %"
        done = sum(name == row["setting"] for row in results.rows)
        blind = [percent(row[whose] for row in floor if row["setting"] == name) for whose in ("everybody", "own")]
        lines.append([name, split, *(str(told[key]) for key in ("limit", "rounds")), sampled, *blind, str(done)])
    header = ["setting", "split", "examples", "rounds", "clients in a round", "one label", "its own label", "runs done"]
    return markdown(header, sorted(lines, key=lambda line: _mild_first(line[0])), left=2)


def accuracy(chosen: Callable[[str], bool]) -> Callable[[], str]:
    """Mean test accuracy over clients, by method and setting; bytes are those of the table's first setting."""

    def table() -> str:
        results = accuracy_results()
        names = sorted(filter(chosen, results.settings("methods")), key=_mild_first)
        if not names:
            return NOT_RUN
        variants = results.variants("methods", names)
        cells, noise = judged(variants, names, results.values, results.seeds)
        lines = []
        for variant, made in cells.items():
            some = next(rows for name in names if (rows := results.of(variant, name)))
            lines.append([label(variant), *made, *bytes_cells(some)])
        header = ["method", *names, "up, client and round", "down", "once"]
        return markdown(header, [*lines, [COUNTS, *noise, "", "", ""]]) + results.note("methods", names)

    return table


def _mild_first(name: str) -> tuple[bool, float, int]:
    """Dirichlet skews before other splits, the mildest first, and data sets in an order that stays."""
    alpha, source = re.search(r"dirichlet ([\d.]+)", name), name.partition(" ")[0]
    return alpha is None, -float(alpha[1]) if alpha else 0.0, SOURCES.index(source) if source in SOURCES else -1


def details(setting: str) -> Callable[[], str]:
    """All of one setting: personalised, worst tenth, tuned, chosen, global, error of the aggregation."""

    def table() -> str:
        results = accuracy_results()
        variants = results.variants("methods", [setting])
        keys = ("mean", "worst_tenth", "weighted", "tuned_mean", "chosen_mean", "global")
        titles = ("mean", "worst tenth", "weighted", "tuned", "chosen", "global")
        cells, noise = judged(variants, keys, lambda v, k: results.values(v, setting, f"accuracy_{k}"), results.seeds)
        if not cells:
            return NOT_RUN
        lines = []
        for variant, made in cells.items():
            errors = results.values(variant, setting, "aggregation_error").values()
            error = f"{statistics.fmean(errors):.1e}" if errors else "-"
            seconds = statistics.fmean(results.values(variant, setting, "seconds_train").values())
            lines.append([label(variant), *made, error, f"{seconds:.0f}"])
        header = ["method", *titles, "aggregation error", "train s"]
        return markdown(header, [*lines, [COUNTS, *noise, "", ""]]) + results.note("methods", [setting])

    return table


def within_bytes(setting: str) -> Callable[[], str]:
    """The best validation accuracy each method reaches before a client has moved so many bytes, both ways, all in."""

    def table() -> str:
        results = accuracy_results()
        variants = results.variants("methods", [setting])
        curves = {v: {row["seed"]: row["curve"] for row in results.of(v, setting) if row["curve"]} for v in variants}

        def best(variant: str, budget: str) -> Seeds:
            within = {
                seed: [a for moved, a in points if moved <= int(budget)] for seed, points in curves[variant].items()
            }
            return {seed: max(found) for seed, found in within.items()} if all(within.values()) else {}

        cells, noise = judged(variants, [str(budget) for budget in BUDGETS], best, results.seeds)
        if not cells:
            return NOT_RUN
        header = ["method", *(human_bytes(budget) for budget in BUDGETS)]
        lines = [[label(variant), *made] for variant, made in cells.items()]
        return markdown(header, [*lines, [COUNTS, *noise]]) + results.note("methods", [setting])

    return table


def ablations() -> str:
    """One setting changed at a time, beside what it changes; every row of a column over the same seeds."""
    results = accuracy_results()
    names = results.settings("ablations")
    if not names:
        return NOT_RUN
    changed = results.variants("ablations", names)
    ours = next((i for i, variant in enumerate(changed) if variant.startswith("folklora")), len(changed))
    variants = ("fedit", "local", "celora", *changed[:ours], "folklora", *changed[ours:], "sketch")
    shown: dict[str, dict[str, str]] = {}
    for name in names:
        ran = {v: results.values(v, name) for v in variants}
        common = set.intersection(*(set(seeds) for seeds in ran.values() if seeds))
        shown[name] = {
            v: percent([a for seed, a in seeds.items() if seed in common], results.seeds) for v, seeds in ran.items()
        }
    lines = [[label(v), *(shown[n][v] for n in names)] for v in variants if any(shown[n][v] != "-" for n in names)]
    return markdown(["variant", *names], lines) + results.note("ablations")


def tuning() -> str:
    """Validation accuracy by learning rate; methods that train by plain gradients have rates of their own."""
    document = load("tuning")
    found: dict[str, dict[str, list[str]]] = {}
    for scores in document["validation"].values():
        for key, value in scores.items():
            variant, _, rate = key.rpartition(" ")
            found.setdefault(variant, {}).setdefault(rate, []).append(f"{100 * value:.1f}")
    made = []
    for rates in (document["grid"], document.get("sgd_grid", ())):
        lines = [
            [
                label(variant),
                *(" / ".join(scores.get(rate, ["-"])) for rate in rates),
                document["chosen"].get(variant, "-"),
            ]
            for variant, scores in found.items()
            if ("train.optimizer=sgd" in variant) == (rates is not document["grid"])
        ]
        if lines:
            made.append(markdown(["method", *(f"lr {rate}" for rate in rates), "chosen"], lines))
    return "\n".join(made)


def equal_rank(results: Results) -> dict[tuple[str, str, int], float]:
    """(method, setting, seed) -> accuracy: methods at the common rank, without a size of their own."""
    return {
        (variant, name, seed): value
        for name, variants in results.planned("methods").items()
        for variant in variants
        if ":adapter." not in variant
        for seed, value in results.values(variant, name).items()
    }


def bought(results: Results, setting: str) -> dict[str, str]:
    """Method -> its variant at the common budget of bytes: at another rank, or as it is where that is its price.

    What sends nothing in any round, at whatever rank, is not among them.
    """
    entries: dict[str, str] = results.described.get("equal_bytes", {}).get(setting, {})
    found = {}
    for variant in results.variants("methods", [setting]):
        if ":adapter." not in variant:
            rows = results.of(variant, setting)
            if variant in entries:
                found[variant] = entries[variant]
            elif any(row["bytes_up_per_client_round"] for row in rows):
                found[variant] = variant
    return found


def equal_bytes() -> str:
    """Accuracy where every method may send what FedIT sends: at the rank whose bytes come closest."""
    results = accuracy_results()
    names = results.settings("equal bytes")
    if not names:
        return NOT_RUN
    entries = {name: bought(results, name) for name in names}
    methods = list(dict.fromkeys(method for name in names for method in entries[name]))

    def values(method: str, name: str) -> Seeds:
        return results.values(entries[name].get(method, ""), name)

    cells, noise = judged(methods, names, values, results.seeds)
    lines = []
    for method, made in cells.items():
        name = next(name for name in names if values(method, name))
        variant = entries[name][method]
        rank = next((s.partition("=")[2] for s in variant.split(":") if s.startswith("adapter.rank=")), "as it is")
        rows = results.of(variant, name)
        up_down = statistics.fmean(r["bytes_up_per_client_round"] + r["bytes_down_per_client_round"] for r in rows)
        lines.append([label(method), *made, rank, f"{rows[0]['lr']:g}", human_bytes(up_down)])
    header = ["method", *names, f"rank ({names[0]})", "lr", "up and down, client and round"]
    return markdown(header, [*lines, [COUNTS, *noise, "", "", ""]]) + results.note("equal bytes")


def ranks() -> str:
    """Clients of unequal rank: every method that takes them, and FedIT with everybody at the lowest or highest."""
    results = accuracy_results()
    names = results.settings("ranks")
    if not names:
        return NOT_RUN
    entries: dict[str, dict[str, str]] = {}
    columns = []
    for title, each in results.described["ranks"].items():
        listed = json.dumps(each, separators=(",", ":")), f"{each[0]}:adapter.promote={each[-1]}"
        for name in names:
            column = f"{name}: ranks {title}"
            columns.append(column)
            for variant in results.planned("ranks")[name]:
                plain, _, rank = variant.partition(":adapter.rank=")
                if rank in listed:
                    entries.setdefault(label(plain), {})[column] = variant
                elif rank in (str(min(each)), str(max(each))):
                    everybody = "lowest" if rank == str(min(each)) else "highest"
                    entries.setdefault(f"{label(plain)}, all at the {everybody} rank", {})[column] = variant

    def values(row: str, column: str) -> Seeds:
        return results.values(entries[row].get(column, ""), column.rpartition(": ranks ")[0])

    cells, noise = judged(list(entries), columns, values, results.seeds)
    lines = []
    for row, made in cells.items():
        column = next(column for column in columns if values(row, column))
        lines.append([row, *made, *bytes_cells(results.of(entries[row][column], column.rpartition(": ranks ")[0]))[:2]])
    header = ["method", *columns, "up, client and round", "down"]
    return markdown(header, [*lines, [COUNTS, *noise, "", ""]]) + results.note("ranks")


def ranked(scores: Scores) -> str:
    """Mean ranks with their intervals, and below what they rest on."""
    blocks, settings = len(scores.values), len(set(scores.settings))
    firsts = (scores.values == scores.values.max(axis=1, keepdims=True)).sum(axis=0)  # equals are both first
    lines = []
    for place in ranking(scores):
        interval = "-" if place.low is None else f"{place.low:.1f} to {place.high:.1f}"
        first = int(firsts[scores.methods.index(place.method)])
        lines.append([label(place.method), f"{place.mean:.1f}", interval, str(first), "≈" if place.level else "behind"])
    text = markdown(["method", "mean rank", "95 % interval", "times first", "against the first"], lines)
    told = [f"{len(scores.methods)} methods in {counted(settings, 'setting')}, {blocks} blocks of setting and seed."]
    difference = rank_difference(scores)
    if difference is not None:
        told.append(f"Mean ranks less than {difference:.1f} apart are level (Tukey).")
    if len(scores.methods) > 1:
        told.append(f"Nemenyi's difference: {critical_difference(len(scores.methods), settings):.1f}.")
    if (chance := friedman(scores)) is not None:
        told.append(f"All alike: p = {chance:.1g} (Friedman).")
    left, holes = scores.left_out
    if left or holes:
        missing = ", ".join(label(method) for method in left) or "no method"
        told.append(f"Left out, since something is missing: {missing}; {holes} blocks.")
    return text + "\n" + " ".join(told) + "\n"


def mean_ranks() -> str:
    results = equal_rank(accuracy_results())
    return ranked(complete(results)) if results else NOT_RUN


def bought_results(results: Results) -> dict[tuple[str, str, int], float]:
    """(method, setting, seed) -> accuracy at the common budget of bytes."""
    return {
        (method, name, seed): value
        for name in results.settings("equal bytes")
        for method, variant in bought(results, name).items()
        for seed, value in results.values(variant, name).items()
    }


def mean_ranks_bytes() -> str:
    results = bought_results(accuracy_results())
    return ranked(complete(results)) if results else NOT_RUN


def choosing() -> str:
    """Setting by setting: the best at equal rank, who is level with it, and which of those moves the fewest bytes."""
    results = accuracy_results()
    lines = []
    for name in results.settings("methods"):
        found = {v: results.values(v, name) for v in results.variants("methods", [name]) if ":adapter." not in v}
        column = Column.of(found)
        if column.best is None or column.difference is None:
            continue
        level = sorted((column.best, *column.level), key=lambda v: (results.moved(v, name), v))
        cheapest = f"{label(level[0])}, {human_bytes(results.moved(level[0], name) or 0.0)}"
        others = [label(v) for v in sorted(column.level, key=lambda v: -statistics.fmean(found[v].values()))]
        best = f"{label(column.best)}, {100 * statistics.fmean(found[column.best].values()):.1f}"
        lines.append([name, best, ", ".join(others) or "nobody", cheapest])
    header = ["setting", "best", "level with it", "cheapest of all these, bytes a client in all"]
    return markdown(header, lines, left=4) + results.note("methods") if lines else NOT_RUN


def own_model(cls: type[Method]) -> bool:
    """Whether clients predict with a model that is not everybody's."""
    return not cls.has_global_model or cls.model is not Method.model


def methods() -> str:
    """What a method is and what it costs: read off its class, and measured in one setting."""
    results = accuracy_results()
    setting = next(iter(results.settings("methods")), None)
    if setting is None:
        return NOT_RUN
    reference = results.values(BOUGHT, setting, "seconds_train")
    lines = []
    for name, cls in REGISTRY.items():
        rows = results.of(name, setting)
        times = [r["seconds_train"] / reference[r["seed"]] for r in rows if reference.get(r["seed"])]
        errors = [row["aggregation_error"] for row in rows if row["aggregation_error"] is not None]
        lines.append(
            [
                name,
                cls.title,
                (cls.paper or "").removeprefix("arXiv:"),
                "own" if own_model(cls) else "one for all",
                "yes" if cls.mixed_ranks else "no",
                *(bytes_cells(rows) if rows else ["-", "-", "-"]),
                f"{statistics.fmean(errors):.1e}" if errors else "-",
                f"{statistics.fmean(times):.1f}" if times else "-",
            ]
        )
    header = [
        "name",
        "method",
        "arXiv",
        "model",
        "mixed ranks",
        "up, client and round",
        "down",
        "once",
        "aggregation error",
        "train time, FedIT = 1",
    ]
    return markdown(header, lines, left=5)


MAIN = ("banking77 dirichlet 0.5", "snips dirichlet 0.5", "banking77 dirichlet 0.1", "snips dirichlet 0.1")
DISJOINT = "banking77 disjoint labels"

PICTURES = {
    "bytes-banking77": "Accuracy against bytes, Banking77",
    "bytes-snips": "Accuracy against bytes, Snips",
    "bytes-sgd": "Accuracy against bytes, clients by service",
    "mean-ranks": "Mean ranks at equal rank",
    "mean-ranks-bytes": "Mean ranks at equal bytes",
}
"""What `figures.py` draws, once there are results for it."""

TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "accuracy": ("accuracy", accuracy(lambda name: name in (*MAIN, DISJOINT))),
    "accuracy-more": ("accuracy", accuracy(lambda name: name not in (*MAIN, DISJOINT) and "clients)" not in name)),
    "accuracy-clients": ("accuracy", accuracy(lambda name: "clients)" in name)),
    "details-dirichlet": ("accuracy", details(MAIN[0])),
    "details-disjoint": ("accuracy", details(DISJOINT)),
    "bytes-dirichlet": ("accuracy", within_bytes(MAIN[0])),
    "bytes-disjoint": ("accuracy", within_bytes(DISJOINT)),
    "equal-bytes": ("accuracy", equal_bytes),
    "ranks": ("accuracy", ranks),
    "mean-ranks": ("accuracy", mean_ranks),
    "mean-ranks-bytes": ("accuracy", mean_ranks_bytes),
    "ablations": ("accuracy", ablations),
    "choosing": ("accuracy", choosing),
    "methods": ("accuracy", methods),
    "settings": ("accuracy", settings),
    "tuning": ("tuning", tuning),
    **{f"picture-{file}": ("accuracy", picture(file, what)) for file, what in PICTURES.items()},
}
"""Marker -> the results it needs, and what makes it."""
