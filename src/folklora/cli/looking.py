"""Looking, without training: methods, a recipe, a file of examples, what left the clients of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from folklora.cli.auditing import show_clients, show_file
from folklora.cli.common import Json, RunFolder, Set
from folklora.errors import RecipeError
from folklora.recipe import Recipe
from folklora.terminal import out, print_json


def inspect(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, such as recipes/banking77.toml", show_default=False)
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    data: Annotated[
        Path | None, typer.Option(help="In place of the recipe's: audit this file of examples, which is your own")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Its column of texts; default: text, or as in the recipe")] = None,
    items: Annotated[str | None, typer.Option(help="Its column of sequences of items, in place of texts")] = None,
    label: Annotated[str | None, typer.Option(help="Its column of labels; default: none, or as in the recipe")] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Folder for the audit's page, its pictures and release.json")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Differential privacy of what may leave; default: no noise")
    ] = None,
    clients: Annotated[bool, typer.Option("--audit", help="Audit the training examples of each client")] = False,
) -> None:
    """What a recipe will need, or what a file of examples is like; trains nothing.

    Of a recipe: clients, labels, model, adapter sizes, predicted bytes and memory; with --audit each client's data.
    Of a file (--data): counts, copies, entropies, and what of that may leave the machine.
    """
    _refuse_lost_options(recipe, data, {"--text": text, "--items": items, "--label": label, "--out": to,
                                        "--epsilon": epsilon}, clients=clients)  # fmt: skip
    read = None if recipe is None else Recipe.read(recipe, set_ or ())
    if data is not None:
        show_file(data, read, text, items, label, epsilon, to, as_json)
        return
    assert read is not None
    if clients:
        show_clients(read, as_json)
        return
    from folklora.federation.inspect import inspect as library_inspect

    found = library_inspect(read)
    if as_json:
        print_json(found)
        return
    model, method, memory = found["model"], found["method"], found["memory"]
    out.print(
        f"{model['name']} ({model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{len(model['adapted_layers'])} adapted layers, trains in {model['compute']})"
    )
    numbers = ", ".join(f"{kind} {count:,}" for kind, count in found["adapter"]["numbers"].items())
    out.print(f"one client's adapter: {numbers} numbers, {found['adapter']['bytes'] / 1e3:,.1f} kB")
    out.print(
        f"{method['name']}: {method['rounds']} rounds, per client and round "
        f"{method['bytes_up_per_client_round'] / 1e3:,.1f} kB up, "
        f"{method['bytes_down_per_client_round'] / 1e3:,.1f} kB down; "
        f"once, both ways, {method['bytes_once_per_client'] / 1e3:,.1f} kB"
    )
    if privacy := found["privacy"]:
        noise = f"noise {privacy['noise']:.3g}, " if "noise" in privacy else ""
        out.print(
            f"privacy of each {privacy['unit']}: clip {privacy['clip']:g}, {noise}epsilon {privacy['epsilon']:.3g} at "
            f"delta {privacy['delta']:g} after {method['rounds']} rounds, of which the budget affords "
            f"{privacy['rounds']}"
        )
    if told := found["secure"].get("words"):
        out.print(told)
    out.print(
        f"memory: backbone {memory['backbone'] / 1e6:,.0f} MB (stored: {memory['backbone_stored'] / 1e6:,.1f} MB), "
        f"all clients {memory['clients'] / 1e6:,.1f} MB, "
        f"training {memory['training'] / 1e6:,.0f} MB with {memory['clients_side_by_side']} clients side by side"
    )
    table = Table(
        title=f"{len(found['clients'])} clients, {found['classes']} classes, common test set: {found['test_examples']}"
    )
    for column in ("client", "rank", "train", "validation", "test", "classes", "largest class"):
        table.add_column(column, justify="left" if column in {"client", "largest class"} else "right")
    for client, entry in found["clients"].items():
        label, count = max(entry["labels"].items(), key=lambda item: item[1])
        sizes = (str(entry["examples"][part]) for part in ("train", "validation", "test"))
        table.add_row(client, str(entry["rank"]), *sizes, str(len(entry["labels"])), f"{label} ({count})")
    out.print(table)
    if newcomers := found["newcomers"]:
        out.print(f"newcomers, who take part in no round: {', '.join(newcomers)}")


def _refuse_lost_options(
    recipe: Path | None, data: Path | None, of_data: Mapping[str, object], *, clients: bool
) -> None:
    """An option that would say nothing is a mistake."""
    if recipe is None and data is None:
        raise RecipeError("inspect: neither a recipe nor --data; allowed: RECIPE, --data FILE, or both")
    given = [option for option, value in of_data.items() if value is not None]
    if data is None and given:
        raise RecipeError(f"{given[0]} without --data; allowed: inspect --data FILE {given[0]} ...")
    if data is not None and clients:
        raise RecipeError("--audit with --data; allowed: --audit with a recipe alone, for each of its clients")


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its options")] = None,
    as_json: Json = False,
    d_in: Annotated[int, typer.Option(min=1, help="Input width of an adapted layer")] = 384,
    d_out: Annotated[int, typer.Option(min=1, help="Output width")] = 384,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    clients: Annotated[int, typer.Option(min=1, help="In a round")] = 10,
) -> None:
    """All methods: paper, what travels, bytes per adapted layer and round; or the options of one."""
    from folklora.federation.traffic import describe_methods
    from folklora.methods import describe_options

    if name is not None:
        options = describe_options(name)
        if as_json:
            print_json({"name": name, "options": options})
            return
        table = Table(title=f"[method] name = {name!r}")
        for column in ("option", "allowed", "default", "what it is"):
            table.add_column(column)
        for option in options:
            table.add_row(option["key"], option["allowed"], option["default"], option["description"])
        out.print(table)
        return
    described = describe_methods(d_in, d_out, rank, clients)
    if as_json:
        print_json(described)
        return
    only_heads = ", ".join(entry["name"] for entry in described if entry["needs_head"])
    table = Table(
        title=f"bytes per client, round and adapted layer: {d_out} x {d_in}, rank {rank}, {clients} clients, float32",
        caption="Tasks without a head of their own (causal-lm, image-text): nothing of a head travels, once or in a "
        f"round; not for them: {only_heads}.",
    )
    for column in ("name", "method", "paper", "travels", "once", "up", "down", "mixed ranks"):
        table.add_column(column, justify="right" if column in {"up", "down"} else "left")
    for entry in described:
        table.add_row(
            entry["name"],
            entry["title"],
            entry["paper"] or "ours",
            ", ".join(entry["travels"]) or "nothing",
            entry["once"] or "",
            f"{entry['bytes_per_layer_up']:,.0f}",
            f"{entry['bytes_per_layer_down']:,.0f}",
            "yes" if entry["mixed_ranks"] else "",
        )
    out.print(table)


def audit(path: RunFolder, as_json: Json = False) -> None:
    """What left each client of a run, what was promised, and what is not protected: a page, and the same as JSON."""
    from folklora.report.audit import PAGE
    from folklora.report.audit import audit as library_audit

    document = library_audit(path)
    if as_json:
        print_json(document)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for line in document["summary"]:
        table.add_row(line["about"], line["says"])
    out.print(table)
    out.print(f"audit: {path / PAGE}", soft_wrap=True)
