"""Planning: which size is worth its cost."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from folklora.backbones.metric import metric_of
from folklora.cli.common import Json, RecipeFile, Set
from folklora.recipe import Recipe
from folklora.terminal import Shown, out, print_json


class Measured(StrEnum):
    """Which cells are run."""

    small = "small"
    all = "all"
    none = "none"


def plan(
    recipe: RecipeFile,
    axes: Annotated[
        list[str] | None,
        typer.Option("--axes", help="Levels of adapter.rank, layers or data: adapter.rank=1,2,4 (repeatable)"),
    ] = None,
    budget_parameters: Annotated[int | None, typer.Option(min=1, help="Numbers that a client trains")] = None,
    budget_bytes: Annotated[float | None, typer.Option(min=1, help="Of a client and round, both ways")] = None,
    budget_seconds: Annotated[float | None, typer.Option(min=0, help="Of all rounds, on this machine")] = None,
    finished: Annotated[list[Path] | None, typer.Option("--from", help="A finished run (repeatable)")] = None,
    measure: Annotated[
        Measured | None,
        typer.Option(help="Cells to run: small (no axis at its largest level), all, none; default: none with --from"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell")] = 1,
    to: Annotated[Path, typer.Option("--out", help="Directory; what is finished there is reused")] = Path("runs/plan"),
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Measure small adapters, fit a Performance Law, and say which size is best under a budget."""
    from folklora.planning.axes import parse_axes
    from folklora.planning.plan import FILE, PICTURE, Budget
    from folklora.planning.plan import plan as library_plan

    read = Recipe.read(recipe, set_ or ())
    with Shown() as shown:
        document = library_plan(
            read,
            parse_axes(axes, read) if axes else None,
            to,
            seeds=seeds,
            measure=measure.value if measure else "none" if finished else "small",
            finished=finished or (),
            budget=Budget(budget_parameters, budget_bytes, budget_seconds),
            progress=shown,
        )
    if as_json:
        print_json(document)
        return
    _show(document)
    out.print(f"plan: {to / FILE}, {to / PICTURE}", soft_wrap=True)


def _show(document: Mapping[str, Any]) -> None:
    # As of a row: {"metric": name, "higher": ...}.
    metric = metric_of({"metric": document["metric"]["name"], "higher": document["metric"]["higher"]})
    table = Table(
        title=f"validation {metric.words}{metric.unit}, measured and predicted by the {document['predictor']}"
    )
    for column in ("layers", "rank", "data", "parameters", "kB a round", "seconds", "measured", "predicted", ""):
        table.add_column(column, justify="left" if not column else "right")
    for row in document["cells"]:
        table.add_row(
            str(row["layers"]),
            str(row["rank"]),
            f"{row['data']:g}",
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e3:,.1f}",
            f"{row['seconds']:.1f}",
            "" if row["measured"] is None else metric.number(row["measured"]),
            _between(row, metric),
            " ".join(_notes(row, document)),
        )
    out.print(table)
    errors = Table(title="root mean square error on cells that were held out")
    for column in ("predictor", "larger than all fitted", "between them"):
        errors.add_column(column, justify="left" if column == "predictor" else "right")
    for name, ways in document["held_out"].items():
        shown = [ways[how]["rmse"] for how in ("beyond", "between")]
        errors.add_row(name, *("-" if each is None else metric.number(each) for each in shown))
    out.print(errors)
    if document["formula"] is not None:
        out.print(f"{document['formula']['of']} = {document['formula']['text']}", soft_wrap=True)
    for words, row in (("best", document["best"]), ("smallest that may be as good", document["smallest_alike"])):
        out.print(
            f"{words}: {row['layers']} layers, rank {row['rank']} ({row['parameters']:,} parameters): "
            f"{metric.words} {_between(row, metric)}",
            soft_wrap=True,
        )


def _between(row: Mapping[str, Any], metric: Any) -> str:
    if row["predicted"] is None:
        return "too far"
    return f"{metric.number(row['predicted'])} ({metric.number(row['low'])} to {metric.number(row['high'])})"


def _notes(row: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    found = [] if row["within_budget"] else ["over budget"]
    if row["extrapolated"]:
        found.append("extrapolated, untested" if row["untested"] else "extrapolated")
    return found + [words.replace("_", " ") for words in ("best", "smallest_alike") if row == document[words]]
