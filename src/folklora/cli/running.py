"""Runs: begin one, go on with one, compare methods, write a report again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from folklora.cli.common import Insecure, Json, Listen, Port, RecipeFile, RunFolder, Set
from folklora.recipe import Recipe
from folklora.terminal import Shown, at_work, out, print_json


def run(
    recipe: RecipeFile,
    to: Annotated[Path, typer.Option("--out", help="New run directory")] = Path("runs/run"),
    set_: Set = None,
) -> None:
    """Run one recipe."""
    from folklora.federation.run import run as library_run

    with Shown() as shown:
        summary = library_run(Recipe.read(recipe, set_ or ()), to, shown)
    finished(summary, to)


def resume(
    path: RunFolder,
    previous: Annotated[bool, typer.Option("--previous", help="Step back one committed round first")] = False,
    federation: Annotated[
        Path | None, typer.Option(help="Of a run that `folklora serve` began: the federation's folder")
    ] = None,
    listen: Listen = None,
    port: Port = None,
    insecure: Insecure = False,
) -> None:
    """Go on with a run that was interrupted."""
    if federation is not None:
        from folklora.federation.flower.serve import resume as library_resume_served

        with at_work(f"go on with: folklora resume {path} --federation {federation}"), Shown() as shown:
            summary = library_resume_served(
                path, federation, shown, previous=previous, listen=listen, port=port, insecure=insecure
            )
    else:
        from folklora.federation.run import resume as library_resume

        with Shown() as shown:
            summary = library_resume(path, shown, previous=previous)
    finished(summary, path)


def finished(summary: Mapping[str, Any], path: Path) -> None:
    """What is shown of a run that ended: its row, and where its report is."""
    from folklora.report.page import write_report
    from folklora.report.tables import rich_table

    out.print(rich_table([summary["row"]]))
    out.print(f"report: {write_report(path)}", soft_wrap=True)


def compare(
    recipe: RecipeFile,
    methods: Annotated[str, typer.Option(help="Names with commas; settings behind colons: celora:basis=frozen")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from the recipe's")] = 1,
    to: Annotated[Path, typer.Option("--out", help="Directory; what is finished there is reused")] = Path(
        "runs/compare"
    ),
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run several methods with the same data, model and seeds, and compare them."""
    from folklora.federation.run import compare as library_compare
    from folklora.report.page import write_compare_report
    from folklora.report.tables import rich_table

    # Not at commas within brackets: adapter.rank=[4,8]
    names = [name.strip() for name in re.split(r",(?![^\[]*\])", methods) if name.strip()]
    with Shown() as shown:
        document = library_compare(Recipe.read(recipe, set_ or ()), names, seeds, to, shown)
    page = write_compare_report(to)
    if as_json:
        print_json(document)
    else:
        out.print(rich_table(document["rows"]))
        out.print(f"report: {page}", soft_wrap=True)


def report(path: RunFolder) -> None:
    """Write the HTML report and the figures of a run or a comparison again."""
    from folklora.report.page import write_compare_report, write_report

    write = write_compare_report if (path / "compare.json").is_file() else write_report
    out.print(f"report: {write(path)}", soft_wrap=True)
