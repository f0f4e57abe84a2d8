"""What is shown of audits of data: a file's, and those of all clients of a recipe."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from folklora.recipe import Recipe
from folklora.terminal import err, out, print_json


def show_file(
    data: Path,
    recipe: Recipe | None,
    text: str | None,
    items: str | None,
    label: str | None,
    epsilon: float | None,
    to: Path | None,
    as_json: bool,
) -> None:
    """One file's audit."""
    from folklora.report.data_audit import PAGE, audit_file, lead, number

    document = audit_file(data, recipe, text=text, items=items, label=label, epsilon=epsilon, to=to)
    if as_json:
        print_json(document)
        return
    out.print(lead(document), soft_wrap=True)
    table = Table(title=f"{document['data']['name']}: {document['profile']['examples']:,} examples")
    for column in ("measure", "value", "unit"):
        table.add_column(column)
    for share in ("exact", "near"):
        table.add_row(f"Copies, {share}", f"{document['duplicates'][share]['share']:.2%}", "")
    for measure in document["measures"]:
        table.add_row(measure["name"], number(measure), measure["unit"] if measure["value"] is not None else "")
    out.print(table)
    out.print("What may leave, if you hand it over:")
    for line in document["leaves"]:
        out.print(f"  {line}", soft_wrap=True)
    if to is None:
        err.print("With --out FOLDER: a page with pictures, and release.json with what may leave.", soft_wrap=True)
    else:
        out.print(f"audit: {to / PAGE}", soft_wrap=True)


def show_clients(recipe: Recipe, as_json: bool) -> None:
    """Every client's audit, a row each."""
    from folklora.federation.auditing import audit_clients

    found = audit_clients(recipe)
    if as_json:
        print_json(found)
        return
    table = Table(title=f'{len(found["clients"])} clients; quality with audit.weights = "{found["weights"]}"')
    for column in ("client", "status", "train", "copies", "regularity", "quality", "counts as"):
        table.add_column(column, justify="left" if column in {"client", "status"} else "right")
    for client, entry in found["clients"].items():
        regularity = "—" if entry["regularity"] is None else f"{entry['regularity']:.3f}"
        numbers = (f"{entry['copies']:.1%}", regularity, f"{entry['quality']:.3g}", str(entry["counts_as"]))
        table.add_row(client, entry["status"], str(entry["examples"]), *numbers)
    out.print(table)
