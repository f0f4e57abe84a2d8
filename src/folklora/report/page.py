"""The report: one HTML file that needs nothing else, and its pictures as PNG files beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from folklora.backbones.metric import ACCURACY, KNOWN, Metric, metric_of
from folklora.report.audit import try_audit
from folklora.report.figures import RUN_PICTURES
from folklora.report.figures_compare import compare_pictures
from folklora.report.reading import Comparison, Run, read_comparison, read_run
from folklora.report.render import Card, Page, Preformatted, Sheet, draw, write_page
from folklora.report.tables import (
    CHOICE,
    NOTHING,
    Spread,
    by_variant,
    first_columns,
    grid,
    human_bytes,
    human_seconds,
    more_columns,
    note,
)

RUN_PAGE = "`folklora report` on one of these folders writes the page of that run: who holds what, similarities, time."

MOST_LINES = 500  # lines of a table; a federation may have a million clients


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html``, the audit and ``figures/*.png`` of a run, finished or not; returns the path of the page.

    Raises
    ------
    RunError
        The folder is no run directory, one of its files is broken, or the report cannot be written.
    """
    run = read_run(run_dir)
    images = draw(run, run.path / "figures", RUN_PICTURES)
    finished = run.finished
    notices = []
    if not finished:
        planned = run.section("train").get("rounds")
        done = run.rounds[-1].round if run.rounds else 0
        of = f" of {planned}" if planned is not None else ""
        notices.append(
            f"This run is not finished: {done}{of} rounds are on record and there is no summary.json yet. "
            "What follows is validation, not the test."
        )
    if run.stopped_early:
        done, planned = run.rounds[-1].round, run.section("train").get("rounds")
        notices.append(
            f"Stopped early: {done} of {planned} rounds, because {run.stopped}."
            if run.stopped
            else f"Stopped early: {done} of {planned} rounds; what follows is the model of round "
            f"{(run.row or {}).get('rounds', done)}, the best on validation."
        )
    drops = [(line.round, client, reason) for line in run.lines for client, reason in line.failed.items()]
    tables = [_clients_sheet(run, drops)]
    if run.newcomers:
        tables.append(_newcomers_sheet(run))
    if drops:
        tables.append(
            Sheet(
                _cut(f"Drop-outs and failures: {len(drops)}", len(drops)),
                ["round", "client", "reason"],
                [[str(number), client, reason] for number, client, reason in drops[:MOST_LINES]],
                frozenset({0, 1, 2}),
                folded=True,
            )
        )
    audited, pictures, unaudited = try_audit(run.path)
    if audited is None:
        notices.append(f"There is no privacy audit of this run: {unaudited}")
    page = Page(
        kind="FolkLoRA run" if finished else "FolkLoRA run, not finished",
        title=f"{run.method} on {_source(run)}",
        lead=_run_lead(run),
        facts=_run_facts(run),
        source=f"the run directory {run.path.resolve().name}",
        notices=notices,
        cards=_run_cards(run),
        tables=tables,
        images=[*images, *pictures],
        texts=[Preformatted("Recipe", run.recipe_text), *_environments([run])],
        audit=audited,
    )
    return write_page(run.path / "report.html", page)


def write_compare_report(compare_dir: str | Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` of compared runs; returns the path of the page.

    Raises
    ------
    RunError
        The folder holds no runs, one of their files is broken, or the report cannot be written.
    """
    comparison = read_comparison(compare_dir)
    images = draw(comparison, comparison.path / "figures", compare_pictures(comparison.metric))
    rows = comparison.rows
    notices = []
    waiting = [run.path.name for run in comparison.runs if not run.finished]
    if not comparison.finished or waiting:
        names = f"; still without a result: {', '.join(waiting)}" if waiting else ""
        notices.append(
            f"This comparison is not finished: {len(rows)} of the {len(comparison.runs)} runs begun have a result"
            f"{names}."
        )
    first: dict[str, Run] = {}
    for name, run in zip(comparison.labels, comparison.runs, strict=True):
        first.setdefault(name, run)
    tables = []
    if rows:
        tables = [
            Sheet("Methods, best first", *grid(rows, first_columns), note=note(rows), first_is_best=True),
            Sheet("More numbers", *grid(rows, more_columns), folded=True),
            _runs_sheet(comparison),
        ]
    sources = sorted({_source(run) for run in comparison.runs})
    page = Page(
        kind="FolkLoRA comparison",
        title=f"{_counted(comparison)} on {', '.join(sources)}",
        lead=_compare_lead(comparison),
        facts=_run_facts(comparison.runs[0], seeds=[run.seed for run in comparison.runs]),
        source=f"the folder {comparison.path.resolve().name}",
        notices=notices,
        tables=tables,
        images=images,
        texts=[
            *(Preformatted(f"Recipe of {name}, seed {run.seed}", run.recipe_text) for name, run in first.items()),
            *_environments(comparison.runs),
        ],
    )
    return write_page(comparison.path / "report.html", page)


def _run_lead(run: Run) -> str:
    number = len(run.clients)
    clients = f"{number} client{'s' * (number != 1)}"
    row, metric = run.row or {}, run.metric or ACCURACY
    up, once = row.get("bytes_up_per_client_round"), row.get("bytes_once_per_client")
    cost = "" if up is None else f", for {human_bytes(up)} sent per client and round"
    if row.get("rounds") == 0 and once is not None:
        cost = f", for {human_bytes(once)} per client, once"
    if (score := row.get(f"{metric.name}_mean")) is not None:
        return f"{_told(metric, 'test', score)} on average over {clients}{cost}."
    if run.evaluated:
        last, validation = run.evaluated[-1]
        return f"{_told(metric, 'validation', validation.mean)} on average over {clients} after round {last}{cost}."
    return f"{clients}; no round has been evaluated yet."


def _told(metric: Metric, split: str, score: float) -> str:
    """``73.0 % test accuracy``, ``Test loss 2.345``."""
    if metric.percent:
        return f"{metric.show(score)} {split} {metric.words}"
    return f"{split.capitalize()} {metric.named(score)}"


def _compare_lead(comparison: Comparison) -> str:
    metric = comparison.metric
    spreads = {name: Spread.of(group, f"{metric.name}_mean") for name, group in by_variant(comparison.rows).items()}
    known = [(name, spread) for name, spread in spreads.items() if spread is not None]
    if not known:
        return "No run has a test result yet."
    (best, top), *others = known
    superlative = "highest" if metric.higher else "lowest"
    lead = f"{best} reaches the {superlative} mean test {metric.words}, {top.show(metric.number)}{metric.unit}"
    if others:
        lead += f"; next is {others[0][0]} with {others[0][1].show(metric.number)}{metric.unit}"
    return lead + "."


def _counted(comparison: Comparison) -> str:
    """``5 methods``, or ``7 variants of 2 methods``."""
    variants, methods = len(set(comparison.labels)), len({run.method for run in comparison.runs})
    count = f"{methods} method{'s' * (methods != 1)}"
    return count if variants == methods else f"{variants} variants of {count}"


def _environments(runs: Sequence[Run]) -> list[Preformatted]:
    texts = ["\n".join(f"{key} {value}" for key, value in run.environment.items()) for run in runs if run.environment]
    different = list(dict.fromkeys(texts))
    return [Preformatted("Environment" + "s" * (len(different) > 1), "\n\n".join(different))] if different else []


def _run_facts(run: Run, seeds: Sequence[int | None] | None = None) -> list[str]:
    data, train = run.section("data"), run.section("train")
    kind = data.get("partition")
    skew = {"dirichlet": "alpha", "pathological": "classes_per_client", "natural": "by", "shards": "shards_per_client"}
    option = skew.get(str(kind), "")
    detail = f" ({option.replace('_', ' ')} {data[option]})" if data.get(option) is not None else ""
    planned = train.get("rounds")
    if seeds is None and run.finished and not run.stopped_early:
        planned = len(run.rounds)  # a method that trains nothing has none, whatever the recipe says
    many = sorted({seed for seed in seeds or [run.seed] if seed is not None})
    facts = [
        f"{len(run.clients)} client{'s' * (len(run.clients) != 1)}",
        f"{len(run.classes)} classes" if len(run.classes) > 1 else "",
        f"partition {kind}{detail}" if kind and not _has_own_rows(run) else "",
        f"model {Path(str(run.section('model').get('name'))).name}" if run.section("model").get("name") else "",
        f"rank {rank}" if (rank := run.section("adapter").get("rank")) is not None else "",
        f"{planned} round{'s' * (planned != 1)}" if planned is not None else "",
        f"seed{'s' * (len(many) > 1)} {', '.join(map(str, many))}" if many else "",
    ]
    return [fact for fact in facts if fact]


def _run_cards(run: Run) -> list[Card]:
    cards: list[Card] = []
    row, metric = run.row or {}, run.metric or ACCURACY

    def add(label: str, key: str, write: Callable[[float], str], remark: str = "") -> None:
        if row.get(key) is not None:
            cards.append(Card(label, write(row[key]), remark))

    def score(label: str, key: str, remark: str) -> None:
        add(label, f"{metric.name}_{key}", metric.show, remark)

    spread = row.get(f"{metric.name}_std_clients")
    beside = f"± {metric.number(spread)} std over clients" if spread is not None else ""
    score(f"Test {metric.words}, mean", "mean", beside)
    for other in KNOWN.values():
        if other != metric:
            add(f"Test {other.words}, mean", f"{other.name}_mean", other.show)
    score("Worst tenth of clients", "worst_tenth", f"test {metric.words}")
    if run.rounds:
        score("Tuned at home", "tuned_mean", "before the server's last reply")
        score("Each client's choice", "chosen_mean", "with or without that reply, by validation")
    score("Global model", "global", "on the common test set")
    score("Newcomers", "newcomers", _newcomers_remark(run))
    add("Depth, mean", "depth_mean", "{:.3g}".format, "times that a client applies the shared block")
    if not run.finished and run.evaluated:
        last, validation = run.evaluated[-1]
        remark = f"after round {last}"
        cards.append(Card(f"Validation {metric.words}, mean", metric.show(validation.mean), remark))
        for name, value in validation.beside.items():
            other = metric_of({"metric": name})
            cards.append(Card(f"Validation {other.words}, mean", other.show(value), remark))
        if validation.worst_tenth is not None:
            worst = metric.show(validation.worst_tenth)
            cards.append(Card("Worst tenth of clients", worst, f"validation, {remark}"))
    down = row.get("bytes_down_per_client_round")
    beside = "per client and round" + (f"; {human_bytes(down)} down" if down is not None else "")
    if run.rounds:
        add("Sent up", "bytes_up_per_client_round", human_bytes, beside)
    add("Sent once", "bytes_once_per_client", human_bytes, "per client, up and down")
    total = row.get("seconds_total")
    add("Training time", "seconds_train", human_seconds, f"{human_seconds(total)} in all" if total is not None else "")
    add("Aggregation error", "aggregation_error", lambda value: f"{value:.3g}")
    return cards


def _clients_sheet(run: Run, drops: Sequence[tuple[int, str, str]]) -> Sheet:
    taken = dict.fromkeys(run.clients, 0)
    for line in run.rounds:
        for client in line.participants:
            taken[client] = taken.get(client, 0) + 1
    dropped: dict[str, int] = {}
    for _, client, _ in drops:
        dropped[client] = dropped.get(client, 0) + 1
    sent, received = dict.fromkeys(run.clients, 0), dict.fromkeys(run.clients, 0)
    for line in run.lines:
        for total, counts in ((sent, line.bytes_up_clients), (received, line.bytes_down_clients)):
            for client, count in counts.items():
                total[client] = total.get(client, 0) + count
    last = run.evaluated[-1][1].clients if run.evaluated else {}
    metric = run.metric or ACCURACY
    deep = any(result.depth is not None for result in run.results.values())
    beside = [name for name in KNOWN if any(name in result.beside for result in run.results.values())]
    lines = []
    for client in run.clients[:MOST_LINES]:
        result, size = run.results.get(client), run.examples[client]
        scores = (last.get(client), *((result.score, result.tuned, result.chosen) if result else (None,) * 3))
        others = result.beside if result else {}
        lines.append(
            [
                client,
                f"{taken[client]} of {len(run.rounds)}",
                str(dropped.get(client, 0)),
                *(str(number) for number in (size.train, size.validation, size.test)),
                *(NOTHING if score is None else metric.number(score) for score in scores),
                *(KNOWN[name].number(others[name]) if name in others else NOTHING for name in beside),
                *([str(result.depth) if result and result.depth else NOTHING] if deep else []),
                human_bytes(sent[client]),
                human_bytes(received[client]),
            ]
        )
    titles = [
        "client",
        "took part",
        "dropped out",
        "train",
        "validation",
        "test",
        *(title + metric.unit for title in ("last validation", "test", "tuned", "chosen")),
        *(KNOWN[name].words + KNOWN[name].unit for name in beside),
        *(["depth"] if deep else []),
        "sent",
        "received",
    ]
    return Sheet(_cut("Clients and participation", len(run.clients)), titles, lines, note=CHOICE, folded=True)


def _newcomers_remark(run: Run) -> str:
    told = f"{len(run.joined.clients) if run.joined else 0} of {len(run.newcomers)} clients without a round"
    return f"{told}; without {run.joined.lacks}" if run.joined and run.joined.lacks else told


def _newcomers_sheet(run: Run) -> Sheet:
    """Those who took part in no round."""
    metric, joined = run.metric or ACCURACY, run.joined
    lines = []
    for client, size in list(run.newcomers.items())[:MOST_LINES]:
        result = joined.clients.get(client) if joined else None
        score = (result.model_extra or {}).get(metric.name) if result else None
        shown = metric.number(float(score)) if isinstance(score, int | float) else NOTHING
        failure = joined.failed.get(client, "") if joined else ""
        lines.append([client, *(str(number) for number in (size.train, size.validation, size.test)), shown, failure])
    note = "They took part in no round: when all was over each sent its sketch, and was scored with what came back."
    if joined:
        sent, received = human_bytes(joined.bytes_up_per_client), human_bytes(joined.bytes_down_per_client)
        note += f" Each sent {sent} and received {received}."
        note += f" They are without {joined.lacks}." if joined.lacks else ""
    titles = ["client", "train", "validation", "test", f"test {metric.words}{metric.unit}", "failed"]
    title = _cut("Newcomers", len(run.newcomers))
    return Sheet(title, titles, lines, frozenset({0, 5}), note=note, folded=True)


def _runs_sheet(comparison: Comparison) -> Sheet:
    metric = comparison.metric
    lines = []
    for name, run in zip(comparison.labels, comparison.runs, strict=True):
        row = run.row or {}
        failed = sum(len(line.failed) for line in run.lines)
        score = row.get(f"{metric.name}_mean")
        lines.append(
            [
                run.path.name,
                name,
                str(run.seed),
                f"{len(run.rounds)}{', stopped early' if run.stopped_early else ''}",
                str(failed),
                NOTHING if score is None else metric.number(score),
                NOTHING if row.get("seconds_total") is None else human_seconds(row["seconds_total"]),
            ]
        )
    titles = ["run", "method", "seed", "rounds", "drop-outs", metric.words + metric.unit, "time"]
    return Sheet("Runs", titles, lines, frozenset({0, 1}), note=RUN_PAGE, folded=True)


def _cut(title: str, count: int) -> str:
    return title if count <= MOST_LINES else f"{title} (the first {MOST_LINES} of {count})"


def _has_own_rows(run: Run) -> bool:
    """Whether members brought files of their own: then the server was told the labels, and read no source."""
    return run.section("engine").get("kind") == "flower" and bool(run.section("data").get("classes"))


def _source(run: Run) -> str:
    return (
        "members' own data" if _has_own_rows(run) else Path(str(run.section("data").get("source", "unknown data"))).name
    )
